"""Pair the student's singular vectors with the teacher's (Lee & Song 2019, "align").

Axes: ``b`` sample, ``c`` channel, ``i`` student vector, ``k`` teacher vector.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.functional import pad

from graph_kd._checks import check_floating

__all__ = ["align_singular_vectors", "closest"]


def align_singular_vectors(
    student: Tensor, teacher: Tensor, *, null: Tensor | None = None
) -> Tensor:
    """Pick for each teacher vector the student vector closest to it, in the teacher's direction.

    The sign of a singular vector is arbitrary, and the student's order follows its own singular
    values. Both are matched to the teacher's here. Two teacher vectors may pick the same one.

    Equation: Lee & Song 2019, "align"; i_k = argmax_i |v_T,k · v_S,i|, a_k = sign(v_T,k · v_S,i_k),
    V_S = [a_k v_S,i_k].

    Differs from the source: a cosine of zero, up to rounding, gives the sign +1 (there: a zero
    vector). Of exactly tied vectors the first is taken (there: their sum). Vectors of singular
    value zero, marked by ``null``, are the last choice.

    Gradient flows to the student alone; the choice and the sign are constants.

    Args:
        student: Unit singular vectors of the student, the candidates.
        teacher: Unit singular vectors of the teacher, the targets.
        null: Which student vectors have a singular value of zero. They are arbitrary, and are
            chosen only where a sample has no other.

    Shape:
        - student: ``b i c``
        - teacher: ``b k c``
        - null: ``b i``, bool
        - returns: ``b k c``

    Raises:
        TypeError: ``student`` or ``teacher`` is no floating-point tensor.
        ValueError: student or teacher is not of rank 3, their batch or channels differ, there is no
            candidate, or ``null`` does not fit.
    """
    check_floating("student", student)
    check_floating("teacher", teacher)
    if not student.ndim == teacher.ndim == 3 or student.shape[::2] != teacher.shape[::2]:
        raise ValueError(
            "`student` and `teacher` must have axes (b, i, c) and (b, k, c) with the same b and c; "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    if student.shape[1] == 0:
        raise ValueError("`student` must hold at least one candidate a sample; got none.")
    if null is None:
        null = torch.zeros(student.shape[:2], dtype=torch.bool, device=student.device)
    is_tensor = isinstance(null, Tensor)
    if not is_tensor or null.dtype != torch.bool or null.shape != student.shape[:2]:
        got = f"{null.dtype} {tuple(null.shape)}" if is_tensor else type(null).__name__
        raise ValueError(
            f"`null` must be a bool tensor with axes (b, i) = {tuple(student.shape[:2])}, one "
            f"per candidate; got {got}."
        )
    ((choice, sign),) = closest([student], [teacher], [null])
    return sign * student.gather(1, repeat(choice, "b k -> b k c", c=student.shape[2]))


def closest(
    students: list[Tensor], teachers: list[Tensor], nulls: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Return which student vector is closest to each of the teacher's, and its sign.

    One pair a point: the index ``b k``, the first of exact ties, and the sign ``b k 1``. All points
    share b and k.
    """
    most = max(student.shape[1] for student in students)
    cosines, barred = [], []
    for student, teacher, null in zip(students, teachers, nulls, strict=True):
        dtype = torch.promote_types(student.dtype, teacher.dtype)
        # No matrix product: autocast and TF32 would round it.
        pairs = rearrange(teacher.to(dtype), "b k c -> b k 1 c")
        pairs = pairs * rearrange(student.to(dtype), "b i c -> b 1 i c")
        cosine = pairs.sum(dim=-1)
        more = most - student.shape[1]  # candidates that this point lacks
        cosines.append(pad(cosine, (0, more)) if more else cosine)
        barred.append(pad(null, (0, more), value=True) if more else null)
    cosine = torch.cat(cosines)
    # Of orthogonal vectors rounding alone would decide.
    cosine = torch.where(cosine.abs() > torch.finfo(cosine.dtype).eps ** 0.75, cosine, 0)
    closeness = cosine.abs().masked_fill(rearrange(torch.cat(barred), "b i -> b 1 i"), -1)
    choice = closeness.argmax(dim=-1, keepdim=True)
    sign = torch.where(cosine.gather(-1, choice) < 0, -1, 1)
    b = len(students[0])
    return list(zip(torch.split(choice[..., 0], b), torch.split(sign, b), strict=True))
