"""Find the channel axis of a layer's output by what its modules say of themselves."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["find_channels"]

_COUNTS = (
    "out_channels",
    "out_features",
    "num_features",
    "num_channels",
    "embedding_dim",
    "normalized_shape",
)
_CHANNELS_LAST = (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.Embedding)


def find_channels(
    modules: dict[str, nn.Module], layer: str, feature: Tensor, axis: int, *, as_given: bool
) -> tuple[nn.Module, int, int] | None:
    """Return the module that contradicts ``axis``, its channels and their axis, or None.

    Asked is the layer itself, else the last module inside it or, for an activation, before it.
    torch's own layers are sure of their axis. Of others, whose output may be permuted or joined to
    another, only the count is known: it counts if it fits one axis, and this is not ``axis``.

    Args:
        modules: The model's modules by name, in order.
        layer: The name of the layer.
        feature: What it gave, ``b ...``.
        axis: Where the channels are taken to be.
        as_given: Whether the feature is the layer's output, not changed by a callable.
    """
    hooked = modules[layer]
    names = list(modules)
    before = [modules[name] for name in names[: names.index(layer)]]
    leaves = [m for m in [*before, *hooked.modules()] if next(m.children(), None) is None]
    counted = [(module, _count(module)) for module in leaves]
    telling = [(module, count) for module, count in counted if count is not None]
    if not telling:
        return None
    module, count = telling[-1]
    if module is hooked and as_given and type(module).__module__.startswith("torch.nn.modules."):
        own = feature.ndim - 1 if isinstance(module, _CHANNELS_LAST) else 1
        return None if own == axis else (module, count, own)
    fits = [n for n in range(1, feature.ndim) if feature.shape[n] == count]
    return (module, count, fits[0]) if len(fits) == 1 and fits[0] != axis else None


def _count(module: nn.Module) -> int | None:
    for name in _COUNTS:
        value = getattr(module, name, None)
        if isinstance(value, tuple) and len(value) == 1:  # a LayerNorm over one axis
            (value,) = value
        if isinstance(value, int):
            return value
    return None
