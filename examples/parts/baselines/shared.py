"""Losses on what two neighbouring sensing points share: FSP and KD-SVD, and KD-SVD without it.

Axis letters: ``b`` sample, ``c d`` channels of the front and the back point, ``h w`` space, ``k``
singular vector; ``p`` counts the sensing points from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from parts.baselines.inputs import full_precision, map_pairs
from torch import Tensor, nn

from graph_kd import SVDFeature, align_singular_vectors

__all__ = ["FSP", "KDSVD", "KDSVDF"]

CANDIDATES = 4  # of the student's singular vectors, one of which is aligned to the teacher's first


class FSP(nn.Module):
    """Compare the flow between neighbouring points: the products of their channels.

    Equation: Yim et al. 2017; Σ_p ½ mean_b Σ_cd (G_S - G_T)², G = (1 / hw) Σ_hw x_p,c x_p+1,d.

    Differs from the source: the half and the missing weights of pairs are those of the program of
    Lee & Song. Where the front map is larger, it is max pooled to the size of the back one.

    Gradient reaches the student alone. Space may differ between teacher and student.

    Shape:
        - student, teacher: lists of two or more ``b c h w``, floating; at a point the same b and c
        - returns: ``()``

    Raises:
        ValueError: a map's size does not divide that of the map before it, or as in `map_pairs`.
    """

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the loss."""
        pairs = map_pairs(student, teacher, same="b c", fewest=2)
        of_student, of_teacher = zip(*pairs, strict=True)
        with full_precision(student[0]):
            losses = [
                (flow_s - flow_t).square().sum() / (2 * len(flow_s))
                for flow_s, flow_t in zip(
                    _flows("student", of_student), _flows("teacher", of_teacher), strict=True
                )
            ]
        return torch.stack(losses).sum()


class KDSVD(nn.Module):
    """Compare how the singular vectors of neighbouring points lie to each other.

    Equation: Lee et al. 2018; Σ_p Σ_bcd (K_S - K_T)², K = exp(-(v_p+1,d - v_p,c)² / 8), where v_p
    is the first right singular vector of the position × channel matrix, the student's aligned to
    the teacher's.

    Differs from the source: the sum over samples and the missing singular values (of one vector,
    normalised, always one) are those of the program of Lee & Song; signs of the teacher's vectors
    and the gradient are `SVDFeature`'s, canonical and exact.

    Gradient reaches the student alone. Space may differ between teacher and student.

    Shape:
        - student, teacher: lists of two or more ``b c h w``, floating; at a point the same b and c
        - returns: ``()``
    """

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the loss."""
        vectors = _aligned(student, teacher, fewest=2)
        losses = [
            (_relation(front_s, back_s) - _relation(front_t, back_t)).square().sum()
            for (front_s, front_t), (back_s, back_t) in pairwise(vectors)
        ]
        return torch.stack(losses).sum()


class KDSVDF(nn.Module):
    """Compare the singular vectors themselves, the part of KD-SVD without a relation.

    Equation: Lee & Song 2019, a baseline of theirs; Σ_p Σ_bc (v_S - v_T)², the vectors of `KDSVD`.
    For unit vectors that is Σ_p Σ_b 2 (1 - cosine).

    Differs from the source: it says no more than L2 distance, and the published program does not
    hold this method; the square and the sum over samples and points are ours, after `KDSVD`.

    Gradient reaches the student alone. Space may differ between teacher and student.

    Shape:
        - student, teacher: lists of ``b c h w``, floating; at a point the same b and c
        - returns: ``()``
    """

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the loss."""
        vectors = _aligned(student, teacher, fewest=1)
        return torch.stack([(s - t).square().sum() for s, t in vectors]).sum()


def _flows(name: str, maps: Sequence[Tensor]) -> list[Tensor]:
    """Return G of each pair of neighbours, ``b c d``."""
    flows = []
    for p, (front, back) in enumerate(pairwise(maps)):
        (h, w), (larger_h, larger_w) = back.shape[2:], front.shape[2:]
        if larger_h % h or larger_w % w:
            raise ValueError(
                f"`{name}[{p}]` must have a height and width that those of `{name}[{p + 1}]`, "
                f"{h} and {w}, divide; got {larger_h} and {larger_w}. List the sensing points "
                f"from front to back."
            )
        pooled = F.max_pool2d(front, (larger_h // h, larger_w // w))
        flow: Tensor = einsum(pooled, back, "b c h w, b d h w -> b c d")
        flows.append(flow / (h * w))
    return flows


def _aligned(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, fewest: int
) -> list[tuple[Tensor, Tensor]]:
    """Return the vectors of student and teacher at each point, ``b c``."""
    vectors = []
    for s, t in map_pairs(student, teacher, same="b c", fewest=fewest):
        candidates = min(CANDIDATES, s.shape[1], s.shape[2] * s.shape[3])
        target = SVDFeature(k=1)(t)
        aligned = align_singular_vectors(SVDFeature(candidates)(s), target)
        vectors.append((rearrange(aligned, "b 1 c -> b c"), rearrange(target, "b 1 c -> b c")))
    return vectors


def _relation(front: Tensor, back: Tensor) -> Tensor:
    """Return K, ``b d c``."""
    difference = rearrange(back, "b d -> b d 1") - rearrange(front, "b c -> b 1 c")
    return (-difference.square() / 8).exp()
