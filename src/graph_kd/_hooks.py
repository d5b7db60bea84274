"""Read features at sensing points, from models that do not return them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from graph_kd._forward_pass import ForwardPass, HookedFeatures, record_estimator_use, record_use

__all__ = ["FeatureHooks", "check_estimator_fresh", "check_fresh", "training_batch_norms"]


class FeatureHooks:
    """Collect the outputs of named layers during a forward pass.

    Outputs are kept as they are: with gradient where the layer gives it, until the next forward
    pass of the model begins. Names are those of the plain model: `DistributedDataParallel` and
    `torch.compile` wrappers are seen through. Place hooks before a compiled model's first call;
    torch ignores those that come later. An in-place operation after a sensing point (such as
    ``ReLU(inplace=True)``) changes what was collected; name that layer instead. A copy of the model
    (an average of weights, say) leaves the hooks of the original alone, and so does a pickle.

    Args:
        model: The model; its own forward must be called, it marks the beginning of a pass.
        layers: Dotted module names, as in ``model.named_modules()``, in the order wanted.

    Raises:
        TypeError: ``model`` is no module or is a `DataParallel`, or ``layers`` is a single string.
        ValueError: ``layers`` is empty, repeats a name, or holds one the model does not have.
        RuntimeError: on access, a layer did not run, or ran more than once, in the last forward.

    Example:
        >>> import torch
        >>> from graph_kd import FeatureHooks
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
        >>> with FeatureHooks(model, ["0", "1"]) as hooks:
        ...     output = model(torch.randn(2, 4))
        ...     [tuple(feature.shape) for feature in hooks.features]
        [(2, 8), (2, 8)]
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        plain = unwrap(model)
        if isinstance(layers, str):
            raise TypeError(f"`layers` must be a list of module names; got the string {layers!r}.")
        if not isinstance(layers, Iterable):
            raise TypeError(
                f"`layers` must be a list of module names; got {type(layers).__name__}."
            )
        self.layers = tuple(layers)
        if not self.layers:
            raise ValueError("`layers` must name at least one layer; got none.")
        modules = _named_modules(plain)
        for name in self.layers:
            if name not in modules:
                raise ValueError(_unknown(name, list(modules)))
            if self.layers.count(name) > 1:
                raise ValueError(f"`layers` must name each layer once; got {name!r} twice.")
        self._source = (id(plain), self.layers)
        self._batch_norms: tuple[tuple[str, nn.Module], ...] = tuple(
            (name, module)
            for name, module in modules.items()
            if isinstance(module, _BatchNorm) and module.track_running_stats
        )
        self._kept = _Kept(self.layers)
        self._handles = [plain.register_forward_pre_hook(_Begin(plain, self._kept))]
        self._handles += [
            modules[name].register_forward_hook(_Keep(modules[name], self._kept.outputs[name]))
            for name in self.layers
        ]

    @property
    def features(self) -> list[Any]:
        """The layers' outputs in the last forward pass, in the order of `layers`.

        They stay readable after `remove`. The list knows which pass it came from. So the losses
        notice when the hooked model no longer runs: a list read anew for a second step, without a
        new forward pass, raises there. A list that is kept in a variable may be used again.
        """
        outputs = self._kept.outputs
        for name, kept in outputs.items():
            if not kept:
                raise RuntimeError(
                    f"Layer {name!r} did not run in the last forward pass. Call the model itself "
                    "before reading `features`, and name layers that its forward uses."
                )
            if len(kept) > 1:
                raise RuntimeError(
                    f"Layer {name!r} ran {len(kept)} times in the last forward pass; a sensing "
                    "point must run once. Give each use a module of its own, and call the model "
                    "itself, which marks the beginning of a pass."
                )
        features = [kept[0] for kept in outputs.values()]
        if torch.compiler.is_compiling():
            return features
        if self._kept.record is None:
            self._kept.record = ForwardPass(self._source, self._batch_norms)
        self._kept.record.copy_ran = self._kept.copy_ran
        return HookedFeatures(features, self._kept.record)

    def remove(self) -> None:
        """Detach everything from the model; calling it twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.features)

    def __len__(self) -> int:
        return len(self.layers)

    def __enter__(self) -> FeatureHooks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"FeatureHooks(layers={list(self.layers)})"


def check_fresh(student: Any, teacher: Any) -> None:
    """Raise if hooked features serve a second training step without a new forward pass.

    Both arguments are as the user gave them: hooks, which are read anew, a list read from hooks, or
    anything else, which is not checked. A list from hooks may be used again as long as it is the
    same object.

    Raises:
        RuntimeError: features of one forward pass were read twice, for different steps.
    """
    if not torch.compiler.is_compiling():
        record_use(_read(student), _read(teacher))


def check_estimator_fresh(teacher: Any) -> None:
    """Raise if attention heads train on one pass twice while a copy of the hooked model ran.

    Raises:
        RuntimeError: features of one forward pass were read twice, and a copy ran since.
    """
    if not torch.compiler.is_compiling():
        record_estimator_use(_read(teacher))


def training_batch_norms(features: Any) -> list[str]:
    """Name the batch norms of the hooked model that are in training mode, now.

    They are collected when the hooks are placed; their mode is looked up in this call, so call it
    right after the forward pass. Features that no hooks gave have none.
    """
    if isinstance(features, FeatureHooks):
        batch_norms = features._batch_norms
    elif isinstance(features, HookedFeatures):
        batch_norms = features.forward_pass.batch_norms
    else:
        return []
    return [name for name, module in batch_norms if module.training]


def _read(features: Any) -> Any:
    return features.features if isinstance(features, FeatureHooks) else features


class _Kept:
    """What one forward pass left. Compiled code only clears and sets it, and reads nothing."""

    def __init__(self, layers: Iterable[str]) -> None:
        self.outputs: dict[str, list[Any]] = {name: [] for name in layers}
        self.record: ForwardPass | None = None  # made when the features are read
        self.copy_ran = False


class _Hook:
    """A hook on one module. A copy of the model keeps it, as the same object, and it stays idle."""

    def __init__(self, module: nn.Module) -> None:
        self.module: nn.Module | None = module

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"module": None}  # idle in a pickle too, which must not hold a batch's outputs


class _Begin(_Hook):
    """Forget the outputs of the pass before."""

    def __init__(self, module: nn.Module, kept: _Kept) -> None:
        super().__init__(module)
        self.kept = kept

    def __call__(self, module: nn.Module, _inputs: Any) -> None:
        if module is self.module:
            for outputs in self.kept.outputs.values():
                outputs.clear()
            self.kept.record = None
            self.kept.copy_ran = False
        elif self.module is not None:  # a pickle has neither
            self.kept.copy_ran = True


class _Keep(_Hook):
    """Keep the output of a layer."""

    def __init__(self, module: nn.Module, kept: list[Any]) -> None:
        super().__init__(module)
        self.kept = kept

    def __call__(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        if module is self.module:
            self.kept.append(output)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the plain model inside `DistributedDataParallel` and `torch.compile` wrappers."""
    if isinstance(model, DataParallel):
        raise TypeError(
            "`model` must not be a DataParallel: its replicas live for one forward pass and hooks "
            "see the part of the batch that one of them gets. Use DistributedDataParallel, or hook "
            "the plain model (`model.module`) on one device."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module; got {type(model).__name__}.")
    if isinstance(model, DistributedDataParallel):
        return unwrap(model.module)
    compiled = getattr(model, "_orig_mod", None)
    return unwrap(compiled) if isinstance(compiled, nn.Module) else model


def _named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return modules by every name they have, without the wrappers of compiled submodules."""
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modules.setdefault(name.replace("._orig_mod", ""), module)
    return modules


def _unknown(name: Any, known: list[str]) -> str:
    nearest = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    hint = (
        "The nearest names are " + ", ".join(repr(near) for near in nearest)
        if nearest
        else "See `model.named_modules()` for the names there are"
    )
    return f"`layers` must name modules of the model; it has no {name!r}. {hint}."
