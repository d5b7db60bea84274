"""Losses on the networks' answers: soft logits and deep mutual learning.

Axis letters: ``b`` sample, ``c`` class.
"""

from __future__ import annotations

import torch.nn.functional as F
from parts.baselines.inputs import pair
from torch import Tensor, nn

__all__ = ["DeepMutualLearning", "SoftLogits"]


class SoftLogits(nn.Module):
    """Compare the softened answers of student and teacher.

    Equation: Hinton et al. 2015; mean_b KL(softmax(t / T) ‖ softmax(s / T)), natural logarithm.

    Differs from the source: without the factor T², as in the program of Lee & Song.

    Gradient reaches the student alone.

    Args:
        temperature: T, dimensionless, > 0.

    Shape:
        - student, teacher: ``b c``, floating
        - returns: ``()``
    """

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"`temperature` must be > 0; got {temperature}.")
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss."""
        student, teacher = pair(student, teacher, "b c", same="b c")
        return _divergence(teacher / self.temperature, student / self.temperature)

    def extra_repr(self) -> str:
        """Name the settings in ``print(module)``."""
        return f"temperature={self.temperature}"


class DeepMutualLearning(nn.Module):
    """Compare the answers of two networks that learn together.

    Equation: Zhang et al. 2018; ½ mean_b [KL(p_t ‖ p_s) + KL(p_s ‖ p_t)], p the softmax.

    Differs from the source: there a network learns from KL(p_other ‖ p_own) alone; the program of
    Lee & Song gives the symmetric half to both.

    Gradient reaches student *and* teacher.

    Shape:
        - student, teacher: ``b c``, floating
        - returns: ``()``
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss."""
        student, teacher = pair(student, teacher, "b c", same="b c", teacher_learns=True)
        return (_divergence(teacher, student) + _divergence(student, teacher)) / 2


def _divergence(target: Tensor, estimate: Tensor) -> Tensor:
    """Return mean_b KL(softmax(target) ‖ softmax(estimate))."""
    return F.kl_div(
        estimate.log_softmax(dim=1),
        target.log_softmax(dim=1),
        reduction="batchmean",
        log_target=True,
    )
