"""Losses on the maps themselves, point by point: FitNet, attention transfer, activation boundary.

Axis letters: ``b`` sample, ``c`` channel, ``h w`` space; ``p`` counts the sensing points from 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import reduce
from parts.baselines.inputs import full_precision, map_pairs
from torch import Tensor, nn

__all__ = ["ActivationBoundary", "AttentionTransfer", "FitNet"]


class FitNet(nn.Module):
    """Compare the maps entry by entry, through a regressor where their widths differ.

    Equation: Romero et al. 2015; Σ_p mean_bchw (r_p(s_p) - t_p)².

    Differs from the source: every sensing point is compared, not one, as in the program of Lee &
    Song. r_p is a 1×1 convolution without bias, and the identity where the channels agree; the
    program projects the teacher's map instead.

    Gradient reaches the student and the regressors; these are the module's parameters.

    Args:
        student_channels: Channels of the student's maps, front to back.
        teacher_channels: Channels of the teacher's.

    Shape:
        - student, teacher: lists of ``b c h w``, floating; at a point the same b, h and w
        - returns: ``()``
    """

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = _by_point(student_channels, teacher_channels)
        self.regressors = nn.ModuleList(
            nn.Identity() if s == t else nn.Conv2d(s, t, kernel_size=1, bias=False)
            for s, t in self.channels
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the loss."""
        pairs = map_pairs(student, teacher, same="b h w", channels=self.channels)
        with full_precision(student[0]):
            errors = [
                F.mse_loss(regressor(s), t)
                for regressor, (s, t) in zip(self.regressors, pairs, strict=True)
            ]
        return torch.stack(errors).sum()


class AttentionTransfer(nn.Module):
    """Compare where in space the maps are large.

    Equation: Zagoruyko & Komodakis 2017; Σ_p mean_bhw (q(s_p) - q(t_p))², where
    q(x) = mean_c x² scaled to unit length over h w.

    Differs from the source: the mean over h w, where the paper takes the length of the difference,
    as in the program of Lee & Song.

    Gradient reaches the student alone. Widths may differ; the loss does not see the scale of a map.

    Shape:
        - student, teacher: lists of ``b c h w``, floating; at a point the same b, h and w
        - returns: ``()``
    """

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the loss."""
        pairs = map_pairs(student, teacher, same="b h w")
        return torch.stack([F.mse_loss(_attention(s), _attention(t)) for s, t in pairs]).sum()


class ActivationBoundary(nn.Module):
    """Ask of each of the student's units to be on, with a margin, where the teacher's is.

    Equation: Heo et al. 2019; Σ_p 2^p mean_b Σ_chw max(0, 1 - x)² where t_p > 0 and
    max(0, 1 + x)² elsewhere, x the connector's image of s_p.

    Differs from the source: the teacher's maps are those behind the ReLU, so that off means zero,
    and the points weigh 2^p, as in the program of Lee & Song. Connectors start with PyTorch's
    weights.

    Gradient reaches the student and the connectors, 1×1 convolution and batch norm, the module's
    parameters. The batch norm takes the statistics of the batch, in evaluation too.

    Args:
        student_channels: Channels of the student's maps, front to back.
        teacher_channels: Channels of the teacher's.

    Shape:
        - student, teacher: lists of ``b c h w``, floating; at a point the same b, h and w
        - returns: ``()``
    """

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = _by_point(student_channels, teacher_channels)
        self.connectors = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(s, t, kernel_size=1, bias=False),
                nn.BatchNorm2d(t, track_running_stats=False),
            )
            for s, t in self.channels
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the loss."""
        pairs = map_pairs(student, teacher, same="b h w", channels=self.channels)
        losses = []
        with full_precision(student[0]):
            for p, (connector, (s, t)) in enumerate(zip(self.connectors, pairs, strict=True)):
                response = connector(s)
                missing = F.relu(1 - torch.where(t > 0, response, -response))
                losses.append(2**p * missing.square().sum() / len(s))
        return torch.stack(losses).sum()


def _attention(maps: Tensor) -> Tensor:
    """Return q, ``b (h w)``."""
    return F.normalize(reduce(maps.square(), "b c h w -> b (h w)", "mean"), dim=1)


def _by_point(student: Sequence[int], teacher: Sequence[int]) -> list[tuple[int, int]]:
    if len(student) != len(teacher):
        raise ValueError(
            "`student_channels` and `teacher_channels` must name the same sensing points; "
            f"got {list(student)} and {list(teacher)}."
        )
    return list(zip(student, teacher, strict=True))
