"""Read the features that a loss is given: one map a sensing point, of any layout.

Axes: ``b`` sample, ``c`` channel, ``h w`` space, ``t`` time, ``n`` position.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from einops import rearrange
from torch import Tensor

from graph_kd._checks import check_count, check_floating

__all__ = [
    "Layout",
    "channel_axis",
    "check_channel_dim",
    "check_channels",
    "in_order",
    "read_rows",
    "to_rows",
]


class Layout(NamedTuple):
    """What the maps of one network must look like.

    ``channels`` has one entry a sensing point. ``argument`` is the name that users know it by.
    ``channel_dim`` is the channel axis of maps of rank 4 and 5, None for axis 1.
    """

    argument: str
    channels: tuple[int, ...]
    channel_dim: int | None


def check_channels(argument: str, channels: Any) -> tuple[int, ...]:
    """Return channel counts as a tuple."""
    if not isinstance(channels, Sequence) or isinstance(channels, str) or len(channels) < 2:
        raise ValueError(
            f"`{argument}` must list the channel counts of at least two sensing points, front to "
            f"back; got {channels!r}."
        )
    return tuple(check_count(f"{argument}[{p}]", c) for p, c in enumerate(channels))


def check_channel_dim(channel_dim: Any) -> tuple[int | None, int | None]:
    """Return the channel axes of the teacher's and of the student's maps."""
    pair = channel_dim if isinstance(channel_dim, Sequence) else (channel_dim, channel_dim)
    kinds = all(a is None or (isinstance(a, int) and not isinstance(a, bool)) for a in pair)
    if len(pair) != 2 or not kinds:
        raise TypeError(
            "`channel_dim` must be an int, None, or a pair of them (teacher, student); "
            f"got {channel_dim!r}."
        )
    if any(a is not None and (a == 0 or not -4 <= a <= 4) for a in pair):
        raise ValueError(
            "`channel_dim` must name an axis of maps of rank 4 or 5 other than the batch axis 0; "
            f"got {channel_dim!r}."
        )
    teacher, student = pair
    return teacher, student


def channel_axis(features: Tensor, name: str, channel_dim: int | None) -> int:
    """Return the channel axis: ``channel_dim``, or the usual one of the rank."""
    rank = features.ndim
    if channel_dim is None:
        if rank not in (2, 3, 4, 5):
            raise ValueError(
                f'`{name}` must have axes "b c h w", "b c t h w", "b n c" or "b c"; '
                f"got shape {tuple(features.shape)}. Add a batch axis with `features[None]`, or "
                f"say with `channel_dim` where the channels are."
            )
        return 1 if rank >= 4 else rank - 1
    if rank < 2 or not -rank <= channel_dim < rank or channel_dim % rank == 0:
        raise ValueError(
            f"`channel_dim` must name an axis of `{name}` other than the batch axis 0; "
            f"got {channel_dim} for shape {tuple(features.shape)}."
        )
    return channel_dim % rank


def to_rows(features: Tensor, *, name: str = "features", channel_dim: int | None = None) -> Tensor:
    """View feature maps as one position × channel matrix per sample, ``b n c``."""
    check_floating(name, features)
    channels_last = features.movedim(channel_axis(features, name, channel_dim), -1)
    if 0 in features.shape[1:]:
        raise ValueError(
            f"`{name}` must have at least one position and one channel; "
            f"got shape {tuple(features.shape)}."
        )
    return rearrange(channels_last, "b ... c -> b (...) c")


def in_order(name: str, features: Any, names: tuple[Any, ...] | None) -> list[Any]:
    """Return the maps as a list; those of a mapping in the order of ``names``, if there are any."""
    if isinstance(features, Tensor) or not isinstance(features, Iterable):
        raise TypeError(
            f"`{name}` must be a list with one tensor a sensing point; "
            f"got {type(features).__name__}."
        )
    if not isinstance(features, Mapping):
        return list(features)
    if names is None:
        return list(features.values())
    if set(features) != set(names):
        raise ValueError(
            f"`{name}` must have the keys {list(names)}, as the first mapping this loss was given; "
            f"got {list(features)}. Maps are paired by key. To pair them by position, pass "
            "`list(features.values())` of both networks, in the order of `channels`."
        )
    return [features[key] for key in names]


def read_rows(
    name: str, maps: list[Any], layout: Layout, *, batch: int | None = None
) -> list[Tensor]:
    """Check the maps of one network against its layout; return them as matrices ``b n c``."""
    if len(maps) != len(layout.channels):
        raise ValueError(
            f"`{name}` must hold {len(layout.channels)} tensors, one for each entry of "
            f"{layout.argument}={list(layout.channels)}; got {len(maps)}."
        )
    rows = []
    for p, features in enumerate(maps):
        point = f"{name}[{p}]"
        check_floating(point, features)
        channel_dim = layout.channel_dim if features.ndim >= 4 else None
        axis = channel_axis(features, point, channel_dim)
        if features.shape[axis] != layout.channels[p]:
            raise ValueError(_wrong_channels(point, p, features, axis, layout))
        batch = len(features) if batch is None else batch
        if len(features) != batch:
            raise ValueError(
                f"`{point}` must hold the same {batch} samples as the points before it; "
                f"got {len(features)} in shape {tuple(features.shape)}. Axis 0 is the batch."
            )
        rows.append(to_rows(features, name=point, channel_dim=channel_dim))
    return rows


def _wrong_channels(point: str, p: int, features: Tensor, axis: int, layout: Layout) -> str:
    """Say which other axis fits, or how networks of other channels are compared."""
    wanted, shape = layout.channels[p], tuple(features.shape)
    message = (
        f"`{point}` must have {wanted} channels on axis {axis}, as {layout.argument}[{p}] says; "
        f"got {shape[axis]} in shape {shape}."
    )
    fitting = [a for a in range(1, len(shape)) if a != axis and shape[a] == wanted]
    if fitting and features.ndim >= 4:
        dims = [-1 if a == features.ndim - 1 else a for a in fitting]
        message += (
            f" Axis {' and axis '.join(map(str, dims))} has {wanted}: if the channels are there, "
            f"pass channel_dim={' or '.join(map(str, dims))} for both networks, or "
            "channel_dim=(teacher, student) if their layouts differ."
        )
    elif fitting:
        message += (
            f" Axis 1 has {wanted}: maps of rank 3 are tokens `b n c`; if the channels are on axis "
            "1 (Conv1d), pass `features.mT`."
        )
    if point.startswith("student") and layout.argument == "channels":
        message += (
            " For a student with other channels than the teacher, build the loss with "
            "`student_channels`: the student then gets attention heads of its own."
        )
    return message
