"""The networks of the poster, with a width factor; ``VGG`` for now.

Sensing points are the outputs of ``stages.0`` … ``stages.4``, as in the authors' slides.
"""

from __future__ import annotations

from collections.abc import Sequence

from einops.layers.torch import Rearrange
from torch import Tensor, nn

__all__ = ["VGG", "scale_channels"]

STAGE_CHANNELS = (64, 128, 256, 512, 512)
HIDDEN = 1024  # units of each fully connected layer


def scale_channels(channels: Sequence[int], width: float) -> tuple[int, ...]:
    """Multiply channel counts by ``width``, to at least one."""
    if not 0 < width <= 4:
        raise ValueError(f"`width` must be above 0 and at most 4; got {width}.")
    return tuple(max(1, round(count * width)) for count in channels)


class VGG(nn.Module):
    """VGG with five stages: VGG16 for ``convs=(2, 2, 3, 3, 3)``, VGG7 for ``(1, 1, 1, 1, 1)``.

    Each stage is 3×3 convolutions, and 2×2 max pooling but for the fourth; the fifth is followed by
    two hidden layers and the classifier. Batch norm stands between convolution and ReLU; it is
    ours: the slides show none.

    Args:
        convs: Convolutions of each stage.
        num_classes: Classes. Count.
        width: Factor on every channel count and hidden layer.

    Shape:
        - images: ``b 3 32 32``
        - returns: logits ``b classes``
    """

    def __init__(
        self, convs: tuple[int, int, int, int, int], num_classes: int, width: float = 1.0
    ) -> None:
        super().__init__()
        self.channels = scale_channels(STAGE_CHANNELS, width)
        (hidden,) = scale_channels([HIDDEN], width)
        stages, incoming = [], 3
        for stage, (count, channels) in enumerate(zip(convs, self.channels, strict=True)):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [
                    nn.Conv2d(incoming, channels, kernel_size=3, padding=1, bias=False),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                ]
                incoming = channels
            if stage != 3:
                layers.append(nn.MaxPool2d(2))
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Sequential(
            Rearrange("b c h w -> b (c h w)"),
            nn.Linear(incoming * 2 * 2, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.classifier(self.stages(images))
        return logits
