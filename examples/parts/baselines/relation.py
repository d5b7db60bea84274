"""A loss on how the samples of a batch lie to each other: relational knowledge distillation.

Axis letters: ``i j k`` samples, ``c`` channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from parts.baselines.inputs import full_precision, pair
from torch import Tensor, nn

__all__ = ["RelationalKD"]

COINCIDE = 1e-12  # squared distance of unit embeddings below which two are one


class RelationalKD(nn.Module):
    """Compare the distances between samples, and the angles among three of them.

    Equation: Park et al. 2019; 25 mean_ij h(D_S - D_T) + 50 mean_ijk h(A_S - A_T), where h is
    Huber's loss with its knee at 1, D_ij = ‖x_i - x_j‖ over the mean of all distances, and A_ijk
    the cosine of the angle at i between j and k.

    Differs from the source: embeddings are scaled to unit length, the mean distance counts the
    diagonal, and all entries are averaged, as in the program of Lee & Song. Samples that coincide
    have no direction and get no gradient through one.

    Gradient reaches the student alone. Widths may differ. Memory and time grow with b³.

    Args:
        distance_weight: Factor of the distances.
        angle_weight: Factor of the angles.

    Shape:
        - student, teacher: ``b c``, floating; the same b
        - returns: ``()``
    """

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0) -> None:
        super().__init__()
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss."""
        student, teacher = pair(student, teacher, "b c", same="b")
        with full_precision(student):
            distance_s, angle_s = _relations(student)
            distance_t, angle_t = _relations(teacher)
            distance = F.huber_loss(distance_s, distance_t)
            angle = F.huber_loss(angle_s, angle_t)
        return self.distance_weight * distance + self.angle_weight * angle

    def extra_repr(self) -> str:
        """Name the settings in ``print(module)``."""
        return f"distance_weight={self.distance_weight}, angle_weight={self.angle_weight}"


def _relations(embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Return the relative distances, ``i j``, and the cosines, ``i j k``."""
    unit = F.normalize(embedding, dim=1)
    # Differences, not |x|² + |y|² - 2xy: small distances would drown in rounding.
    difference = rearrange(unit, "j c -> 1 j c") - rearrange(unit, "i c -> i 1 c")
    squared = difference.square().sum(dim=-1)
    distance = squared.clamp_min(COINCIDE).sqrt()
    apart = rearrange(squared > COINCIDE, "i j -> i j 1")
    direction = torch.where(apart, difference, 0) / rearrange(distance, "i j -> i j 1")
    cosine: Tensor = einsum(direction, direction, "i j c, i k c -> i j k")
    return distance / distance.mean(), cosine
