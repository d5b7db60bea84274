"""Find the channel axis of a layer's output by the layers of torch that ran in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

__all__ = ["Channels", "watch_channels"]

_LAST = (nn.Linear, nn.Bilinear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
_SECOND = (_ConvNd, _NormBase, nn.GroupNorm)
_COUNTS = (
    "out_channels",
    "out_features",
    "num_features",
    "num_channels",
    "embedding_dim",
    "normalized_shape",
)


@dataclass(frozen=True)
class Channels:
    """A layer that knows its channels, how many they are, and what it gave."""

    module: nn.Module
    count: int
    output: Tensor

    def axis_in(self, feature: Tensor) -> int | None:
        """Return the channel axis of a tensor made from the output; None where it is not sure.

        Made without a change of shape (an activation, a residual block) or by a permutation.
        """
        shape = feature.shape
        if sorted(shape) != sorted(self.output.shape):
            return None
        if feature is self.output and type(self.module).__module__.startswith("torch.nn.modules."):
            return len(shape) - 1 if isinstance(self.module, _LAST) else 1
        fitting = [axis for axis in range(1, len(shape)) if shape[axis] == self.count]
        return fitting[0] if len(fitting) == 1 else None


@contextmanager
def watch_channels(
    modules: dict[str, nn.Module], layers: Sequence[str]
) -> Iterator[dict[str, Channels | None]]:
    """Yield, for each of ``layers`` that runs, the last layer that ran by then and knows, or None.

    The order is that in which they run.
    """
    last: list[Channels] = []
    found: dict[str, Channels | None] = {}

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        count = next(getattr(module, name) for name in _COUNTS if hasattr(module, name))
        counts = count if isinstance(count, tuple) else (count,)
        # A norm over several axes does not say which one has the channels.
        if isinstance(output, Tensor) and len(counts) == 1:
            last[:] = [Channels(module, counts[0], output)]

    def keep(name: str) -> Any:
        return lambda *_: found.update({name: last[0] if last else None})

    knowing = {module for module in modules.values() if isinstance(module, _LAST + _SECOND)}
    handles = [module.register_forward_hook(note) for module in knowing]
    handles += [modules[name].register_forward_hook(keep(name)) for name in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
