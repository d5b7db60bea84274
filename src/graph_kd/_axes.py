"""Find the channel axis of a layer's output by the layers of torch that ran in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

__all__ = ["Channels", "watch_channels"]

_LAST = (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.Embedding, getattr(nn, "RMSNorm", nn.Linear))
_SECOND = (_ConvNd, _NormBase, nn.GroupNorm)


class Channels(NamedTuple):
    """The last layer of torch that knows its channel axis, and the shape of what it gave."""

    module: nn.Module
    axis: int
    shape: tuple[int, ...]


@contextmanager
def watch_channels(
    modules: dict[str, nn.Module], layers: Sequence[str]
) -> Iterator[dict[str, Channels]]:
    """Yield, for each of ``layers`` that runs, the last knowing layer that ran by then.

    A layer whose output has the shape of that layer's has its channels on the same axis: an
    activation after a convolution, or a residual block. Any other shape says nothing.
    """
    last: list[Channels] = []
    found: dict[str, Channels] = {}

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            axis = output.ndim - 1 if isinstance(module, _LAST) else 1
            last[:] = [Channels(module, axis, tuple(output.shape))]

    def keep(name: str) -> Any:
        return lambda *_: found.update({name: last[0]} if last else {})

    knowing = {module for module in modules.values() if isinstance(module, _LAST + _SECOND)}
    handles = [module.register_forward_hook(note) for module in knowing]
    handles += [modules[name].register_forward_hook(keep(name)) for name in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
