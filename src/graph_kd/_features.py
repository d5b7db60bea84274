"""Read the features that a loss is given: one map a sensing point, of any layout.

Axes: ``b`` sample, ``c`` channel, ``h w`` space, ``t`` time, ``n`` position.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from graph_kd._checks import check_count, check_floating

__all__ = [
    "Layout",
    "channel_axis",
    "check_channel_dim",
    "check_fit_of_heads",
    "check_layouts",
    "fits",
    "in_order",
    "read_matrices",
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


def check_layouts(channels: Any, student_channels: Any, channel_dim: Any) -> tuple[Layout, Layout]:
    """Return what the teacher's and the student's maps must look like."""
    teacher_dim, student_dim = check_channel_dim(channel_dim)
    teacher = Layout("channels", _counts("channels", channels), teacher_dim)
    if student_channels is None:
        return teacher, teacher._replace(channel_dim=student_dim)
    student = Layout("student_channels", _counts("student_channels", student_channels), student_dim)
    if len(student.channels) != len(teacher.channels):
        raise ValueError(
            f"`student_channels` must have one entry for each of the {len(teacher.channels)} "
            f"sensing points of `channels`; got {list(student.channels)}."
        )
    return teacher, student


def _counts(argument: str, channels: Any) -> tuple[int, ...]:
    if not isinstance(channels, Sequence) or isinstance(channels, str) or len(channels) < 2:
        raise ValueError(
            f"`{argument}` must be a list of the channel counts of at least two sensing points, "
            f"front to back; got {channels!r}."
        )
    return tuple(check_count(f"{argument}[{p}]", c) for p, c in enumerate(channels))


def check_channel_dim(channel_dim: Any) -> tuple[int | None, int | None]:
    """Return the channel axes of the teacher's and of the student's maps."""
    pair = channel_dim if isinstance(channel_dim, Sequence) else (channel_dim, channel_dim)
    given = [axis for axis in pair if axis is not None]
    if len(pair) != 2 or any(isinstance(a, bool) or not isinstance(a, int) for a in given):
        raise TypeError(
            "`channel_dim` must be an int, None, or a pair of them (teacher, student); "
            f"got {channel_dim!r}."
        )
    if any(a == 0 or abs(a) > 4 for a in given):
        raise ValueError(
            "`channel_dim` must name an axis of maps of rank 4 or 5 other than the batch axis 0; "
            f"got {channel_dim!r}."
        )
    return pair[0], pair[1]


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
    if not -rank <= channel_dim < rank or channel_dim % rank == 0:
        raise ValueError(
            f"`channel_dim` must name an axis of `{name}` other than the batch axis 0; "
            f"got {channel_dim} for shape {tuple(features.shape)}."
        )
    return channel_dim % rank


def to_rows(features: Tensor, name: str, axis: int) -> Tensor:
    """View feature maps as one position × channel matrix per sample, ``b n c``."""
    if 0 in features.shape[1:]:
        raise ValueError(
            f"`{name}` must have at least one position and one channel; "
            f"got shape {tuple(features.shape)}."
        )
    return rearrange(features.movedim(axis, -1), "b ... c -> b (...) c")


def in_order(
    keys: tuple[Any, ...] | None, **features: Any
) -> tuple[tuple[Any, ...] | None, dict[str, list[Any]]]:
    """Return the order of the keys of mappings, and the maps of each network as a list.

    The order is ``keys``, else that of the last mapping: in every call the teacher's.
    """
    mappings = [tuple(given) for given in features.values() if isinstance(given, Mapping)]
    keys = keys or (mappings[-1] if mappings else None)
    return keys, {name: _as_list(name, given, keys) for name, given in features.items()}


def _as_list(name: str, features: Any, keys: Any) -> list[Any]:
    if isinstance(features, (Tensor, set, frozenset)) or not isinstance(features, Iterable):
        raise TypeError(
            f"`{name}` must be a list with one tensor per sensing point; "
            f"got {type(features).__name__}."
        )
    if not isinstance(features, Mapping):
        return list(features)
    if set(features) != set(keys):
        raise ValueError(
            f"`{name}` must have the keys {list(keys)}, those of the teacher's first mapping; "
            f"got {list(features)}. Maps are paired by key. To pair them by position, pass "
            "`list(features.values())` of both networks, in the order of `channels`."
        )
    return [features[key] for key in keys]


def read_matrices(
    maps: dict[str, list[Any]], layouts: Sequence[Layout], *, fewest: int
) -> list[dict[str, Tensor]]:
    """Return the maps of each network as matrices ``b n c`` that fit, by their names in errors."""
    networks: list[dict[str, Tensor]] = []
    batch = None
    for (name, of_one), layout in zip(maps.items(), layouts, strict=True):
        if len(of_one) != len(layout.channels):
            raise ValueError(
                f"`{name}` must hold {len(layout.channels)} tensors, one for each entry of "
                f"{layout.argument}={list(layout.channels)}; got {len(of_one)}."
            )
        networks.append({})
        for p, features in enumerate(of_one):
            point = f"{name}[{p}]"
            check_floating(point, features)
            axis = channel_axis(features, point, layout.channel_dim if features.ndim > 3 else None)
            if features.shape[axis] != layout.channels[p]:
                raise ValueError(_wrong_channels(point, p, features, axis, layout))
            batch = len(features) if batch is None else batch
            if len(features) != batch:
                raise ValueError(
                    f"`{point}` must hold the same {batch} samples as the points before it; "
                    f"got {len(features)} in shape {tuple(features.shape)}. Axis 0 is the batch: "
                    "run both networks on the same one."
                )
            if batch < fewest:
                raise ValueError(
                    f"`{point}` must hold at least 2 samples: a graph relates samples to each "
                    f"other; got {batch}. Drop the last incomplete batch of an epoch, or train on "
                    "the task alone: `optimizer.backward(task_loss)`."
                )
            networks[-1][point] = to_rows(features, point, axis)
    return networks


def fits(maps: list[Any], layout: Layout) -> bool:
    """Return whether maps are those of a network of this layout."""
    try:
        read_matrices({"features": maps}, [layout], fewest=0)
    except (TypeError, ValueError):
        return False
    return True


def check_fit_of_heads(
    matrices: dict[str, Tensor], dtype: torch.dtype, device: torch.device, *, capturable: bool
) -> None:
    """Check that the vectors of these matrices can enter attention heads of a dtype."""
    for point, matrix in matrices.items():
        if matrix.device != device:
            raise ValueError(
                f"`{point}` must be on {device}, where the attention heads are; "
                f"got {matrix.device}. Move one of them with `.to(...)`."
            )
        if matrix.dtype == torch.float64 and capturable:
            raise TypeError(
                f"`{point}` must not be float64 with capturable=True: its decomposition "
                "waits for the host. Convert the features with `.float()`."
            )
        if matrix.dtype == torch.float64 and dtype != torch.float64:
            raise TypeError(
                f"`{point}` of torch.float64 gives vectors that do not fit attention heads of "
                f"{dtype}. Convert the loss with `.to(torch.float64)`."
            )


def _wrong_channels(point: str, p: int, features: Tensor, axis: int, layout: Layout) -> str:
    """Say which other axis fits, or how networks of other channels are compared."""
    wanted, shape = layout.channels[p], tuple(features.shape)
    message = (
        f"`{point}` must have {wanted} channels on axis {axis}, as {layout.argument}[{p}] says; "
        f"got {shape[axis]} in shape {shape}."
    )
    fitting = [str(a) for a in (*range(1, len(shape) - 1), -1) if shape[a] == wanted]
    if fitting and len(shape) > 3:
        message += (
            f" {wanted} entries are on axis {' and axis '.join(fitting)}: if those are channels, "
            f"pass channel_dim={' or '.join(fitting)} for both networks, or a pair (teacher, "
            "student) if their layouts differ."
        )
    elif fitting:
        message += (
            f" Axis 1 has {wanted}: maps of rank 3 are tokens `b n c`; if the channels are on axis "
            "1 (Conv1d), pass `features.mT`."
        )
    elif len(shape) == 3 and shape[0] == wanted:
        message += f" Axis 0 has {wanted}: if the batch axis is missing, pass `features[None]`."
    if point.startswith("student") and layout.argument == "channels":
        message += (
            " For a student with other channels than the teacher, build the loss with "
            "`student_channels`: the student then gets attention heads of its own."
        )
    return message
