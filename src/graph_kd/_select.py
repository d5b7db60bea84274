"""Take the tensor wanted from what a layer gives, and say what it gave where there is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx

__all__ = ["Select", "Untaken", "check_select", "take"]

Select = int | str | Callable[[Any], Tensor] | None

_MOST_ENTRIES, _DEPTH = 8, 3  # of an output, in a message


def check_select(select: Any, layers: Sequence[str]) -> list[Select]:
    """Return one entry per layer."""
    entries = list(select) if isinstance(select, list | tuple) else [select] * len(layers)
    if len(entries) != len(layers):
        raise ValueError(
            f"`select` must have one entry per layer; got {len(entries)} for {len(layers)} layers."
        )
    for entry in entries:
        known = entry is None or isinstance(entry, int | str) or callable(entry)
        if not known or isinstance(entry, bool):
            raise TypeError(
                "`select` must be an index, a key, a callable or None, or a list of these, one per "
                f"layer; got {entry!r}."
            )
    return entries


def take(output: Any, select: Select) -> Any:
    """Return the selected tensor, or an `Untaken`. An index or a key leaves a tensor as it is."""
    if isinstance(output, fx.Proxy) or (isinstance(output, Tensor) and not callable(select)):
        return output  # a Proxy stands for any output while torch.fx traces
    if select is None:
        return Untaken(output, select, None)
    try:
        found: Any
        if callable(select):
            found = select(output)
        elif isinstance(select, str) and not isinstance(output, Mapping):
            found = getattr(output, select)
        else:
            found = output[select]
    except Exception as error:  # noqa: BLE001 # a model's forward goes on; reading features raises
        found = error.with_traceback(None)
    return found if isinstance(found, (Tensor, fx.Proxy)) else Untaken(output, select, found)


class Untaken(NamedTuple):
    """An output that no tensor was taken from, and what was taken or went wrong."""

    output: Any
    select: Select
    found: Any

    def error(self, layer: str) -> TypeError:
        """Return what reading the features raises."""
        gave = f"Layer {layer!r} gave {_describe(self.output)}"
        if self.select is None:
            problem = f"{gave}, which is no tensor."
        elif isinstance(self.found, Exception):
            kind = type(self.found).__name__
            problem = f"{gave}; `select={self.select!r}` failed with {kind}: {self.found}."
        else:
            problem = f"{gave}; `select={self.select!r}` took {_describe(self.found)}, no tensor."
        error = TypeError(f"{problem} Pass {_advice(self.output)}.")
        error.__cause__ = self.found if isinstance(self.found, Exception) else None
        return error


def _entries(output: Any) -> list[tuple[Any, str, Any]]:
    """Return key, Python access and value of what an output holds."""
    if isinstance(output, Mapping):
        return [(key, f"[{key!r}]", value) for key, value in output.items()]
    fields = getattr(output, "_fields", None)  # of a namedtuple
    if dataclasses.is_dataclass(output):
        fields = [field.name for field in dataclasses.fields(output)]
    if fields is not None:
        return [(name, f".{name}", getattr(output, name)) for name in fields]
    if isinstance(output, list | tuple):
        return [(index, f"[{index}]", value) for index, value in enumerate(output)]
    return []


def _describe(output: Any, depth: int = _DEPTH) -> str:
    kind = type(output).__name__
    if isinstance(output, Tensor):
        return f"{kind} {tuple(output.shape)}"
    entries = _entries(output)
    if not entries or depth == 0:
        return kind
    named = not isinstance(entries[0][0], int)
    shown = [
        (f"{key!r}: " if named else "") + _describe(value, depth - 1)
        for key, _, value in entries[:_MOST_ENTRIES]
    ]
    rest = ["..."] if len(entries) > _MOST_ENTRIES else []
    return f"{kind} ({', '.join(shown + rest)})"


def _advice(output: Any) -> str:
    """Return the `select` that takes the first tensor."""
    for key, _, value in _entries(output):
        if isinstance(value, Tensor) and isinstance(key, int | str):
            return f"`select={key!r}`"
    path = _path(output)
    return f"`select=lambda output: {'...' if path is None else 'output' + path}`"


def _path(output: Any, depth: int = _DEPTH) -> str | None:
    for _, access, value in _entries(output) if depth else []:
        deeper = "" if isinstance(value, Tensor) else _path(value, depth - 1)
        if deeper is not None:
            return access + deeper
    return None
