"""What a loss is given: checked, in at least float32, and the teacher's without a gradient.

Axis letters: ``b`` sample, ``c`` channel, ``h w`` space.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["checked", "full_precision", "map_pairs", "pair"]

AXIS_NAMES = {"b": "samples", "c": "channels", "h": "height", "w": "width"}


def checked(name: str, features: Tensor, axes: str, channels: int | None = None) -> Tensor:
    """Return the features in at least float32.

    Args:
        name: What an error calls them, as "student[2]".
        features: Features of a student or teacher.
        axes: The axes they must have, as "b c".
        channels: Their channels, where a loss fixes them.

    Raises:
        TypeError: they are no floating-point tensor.
        ValueError: axes or channels do not fit.
    """
    if not isinstance(features, Tensor) or not features.is_floating_point():
        got = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"`{name}` must be a floating-point tensor; got {got}.")
    if features.ndim != len(axes.split()):
        raise ValueError(f'`{name}` must have axes "{axes}"; got shape {tuple(features.shape)}.')
    if channels is not None and features.shape[1] != channels:
        raise ValueError(
            f"`{name}` must have {channels} channels, as `{name.split('[')[0]}_channels` says; "
            f"got {features.shape[1]} in shape {tuple(features.shape)}."
        )
    return features.to(torch.promote_types(features.dtype, torch.float32))


def pair(
    student: Tensor,
    teacher: Tensor,
    axes: str,
    *,
    same: str,
    channels: tuple[int, int] | None = None,
    point: str = "",
    teacher_learns: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return both features `checked`, the teacher's without a gradient.

    Args:
        student: Features of the student.
        teacher: Features of the teacher.
        axes: The axes that both must have, as "b c".
        same: Those in which they must be of one size.
        channels: Channels of the student's and of the teacher's, where a loss fixes them.
        point: What follows ``student`` and ``teacher`` in an error, as "[2]".
        teacher_learns: Leave the teacher its gradient.

    Raises:
        TypeError: a feature is no floating-point tensor.
        ValueError: axes, channels or sizes do not fit.
    """
    of_student, of_teacher = channels or (None, None)
    student = checked(f"student{point}", student, axes, of_student)
    teacher = checked(f"teacher{point}", teacher, axes, of_teacher)
    for letter, got, wanted in zip(axes.split(), student.shape, teacher.shape, strict=True):
        if letter in same and got != wanted:
            raise ValueError(
                f"`student{point}` must have the {AXIS_NAMES[letter]} of `teacher{point}`, "
                f"{wanted}; got {got} in shape {tuple(student.shape)}."
            )
    return student, teacher if teacher_learns else teacher.detach()


def map_pairs(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    same: str,
    channels: Sequence[tuple[int, int]] | None = None,
    fewest: int = 1,
) -> list[tuple[Tensor, Tensor]]:
    """Return the `pair` of maps ``b c h w`` of each sensing point.

    Args:
        student: Maps of the student, front to back.
        teacher: Maps of the teacher at the same points.
        same: Axes in which the two maps of a point must be of one size.
        channels: Channels of the two maps at each point, where a loss fixes them.
        fewest: Sensing points needed.

    Raises:
        TypeError: a list is a tensor, or an entry no floating-point tensor.
        ValueError: counts, axes, channels or sizes do not fit.
    """
    for name, maps in (("student", student), ("teacher", teacher)):
        if isinstance(maps, Tensor):
            raise TypeError(f"`{name}` must be a list with one map a sensing point; got a tensor.")
        if channels is not None and len(maps) != len(channels):
            raise ValueError(
                f"`{name}` must hold {len(channels)} maps, as `{name}_channels` says; "
                f"got {len(maps)}."
            )
    if len(student) != len(teacher) or len(student) < fewest:
        raise ValueError(
            f"`student` and `teacher` must hold the same number of maps, at least {fewest}; "
            f"got {len(student)} and {len(teacher)}."
        )
    return [
        pair(s, t, "b c h w", same=same, channels=channels[p] if channels else None, point=f"[{p}]")
        for p, (s, t) in enumerate(zip(student, teacher, strict=True))
    ]


def full_precision(features: Tensor) -> torch.autocast:
    """Switch autocast off: a loss compares numbers that half precision does not tell apart."""
    return torch.autocast(features.device.type, enabled=False)
