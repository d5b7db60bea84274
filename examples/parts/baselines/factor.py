"""A loss on a learnt summary of the last map: factor transfer.

Axis letters: ``b`` sample, ``c`` channel, ``h w`` space.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from parts.baselines.inputs import checked, full_precision, pair
from torch import Tensor, nn

__all__ = ["FactorTransfer", "Paraphraser"]

SLOPE = 0.2  # of the leaky ReLUs, TensorFlow's default


class Paraphraser(nn.Module):
    """Summarise maps in an eighth of their channels and half their size, and restore them.

    Equation: Kim et al. 2018; x ≈ decoder(encoder(x)).

    Differs from the source: its widths are the program of Lee & Song's, as is the leaky ReLU behind
    every layer of the decoder, the last included, and before the first. A layer of stride 2 pads as
    PyTorch does, which is TensorFlow's on the mirror image.

    Args:
        channels: Channels of the maps, at least 8.

    Shape:
        - maps: ``b c h w``, even h and w
        - returns: likewise
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 8:
            raise ValueError(f"`teacher_channels` must be at least 8; got {channels}.")
        half, quarter, eighth = channels // 2, channels // 4, channels // 8
        self.encoder = _encoder(channels, channels)
        self.decoder = nn.Sequential(
            nn.LeakyReLU(SLOPE),
            nn.ConvTranspose2d(eighth, quarter, kernel_size=3, padding=1),
            nn.LeakyReLU(SLOPE),
            nn.ConvTranspose2d(quarter, half, kernel_size=3, stride=2, padding=1, output_padding=1),
            nn.LeakyReLU(SLOPE),
            nn.ConvTranspose2d(half, channels, kernel_size=3, padding=1),
            nn.LeakyReLU(SLOPE),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Return the restored maps."""
        restored: Tensor = self.decoder(self.encoder(maps))
        return restored


class FactorTransfer(nn.Module):
    """Compare the teacher's factor, what its paraphraser makes of a map, with the translator's.

    Equation: Kim et al. 2018; mean_bchw |f(encoder(t)) - f(translator(s))|, where f scales each
    position to unit length over channels.

    Differs from the source: f is taken over channels, there over the whole factor; see
    `Paraphraser` too.

    The paraphraser is trained first, on the teacher alone, by `paraphraser_loss`; here it is
    constant. Gradient reaches the student and the translator, and neither teacher nor paraphraser.

    Args:
        student_channels: Channels of the student's map. Count.
        teacher_channels: Channels of the teacher's map, at least 8.

    Shape:
        - student, teacher: ``b c h w``, floating; the same b, and even h and w
        - returns: ``()``
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.channels = (student_channels, teacher_channels)
        self.paraphraser = Paraphraser(teacher_channels)
        self.translator = _encoder(student_channels, teacher_channels)

    def paraphraser_loss(self, teacher: Tensor) -> Tensor:
        """Return mean_bchw |t - paraphraser(t)|; it trains the paraphraser.

        The program adds 5e-4 |w|² over the paraphraser's kernels, without the usual half.
        """
        teacher = checked("teacher", teacher, "b c h w", self.channels[1]).detach()
        _check_even(teacher)
        with full_precision(teacher):
            return F.l1_loss(self.paraphraser(teacher), teacher)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss; it trains student and translator."""
        student, teacher = pair(student, teacher, "b c h w", same="b h w", channels=self.channels)
        _check_even(teacher)
        with full_precision(student):
            with torch.no_grad():
                factor_t = F.normalize(self.paraphraser.encoder(teacher), dim=1)
            factor_s = F.normalize(self.translator(student), dim=1)
            return F.l1_loss(factor_s, factor_t)


def _check_even(teacher: Tensor) -> None:
    if teacher.shape[2] % 2 or teacher.shape[3] % 2:
        raise ValueError(
            f"`teacher` must have even height and width; got shape {tuple(teacher.shape)}."
        )


def _encoder(incoming: int, channels: int) -> nn.Sequential:
    """Return the layers that make a factor of ``channels`` // 8 channels."""
    return nn.Sequential(
        nn.Conv2d(incoming, channels // 2, kernel_size=3, padding=1),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(channels // 2, channels // 4, kernel_size=3, stride=2, padding=1),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(channels // 4, channels // 8, kernel_size=3, padding=1),
    )
