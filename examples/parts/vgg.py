"""VGG as in the authors' slides: five stages, whose outputs are the sensing points."""

from __future__ import annotations

from einops.layers.torch import Rearrange
from parts.network import Network, scale_channels
from torch import Tensor, nn

__all__ = ["VGG"]

STAGE_CHANNELS = (64, 128, 256, 512, 512)
HIDDEN = 1024  # units of each fully connected layer


class VGG(Network):
    """VGG with five stages: VGG16 has ``(2, 2, 3, 3, 3)`` convolutions, VGG7 ``(1, 1, 1, 1, 1)``.

    Each stage is 3×3 convolutions and 2×2 max pooling, which the fourth has on 64×64 images only;
    hidden layers and the classifier follow. Batch norm stands between convolution and ReLU; it is
    ours: the slides show none. Weights begin as torch's layers do: with He's the deep one did not
    learn at a rate of 0.1.

    Args:
        convs: Convolutions of each stage.
        num_classes: Classes. Count.
        width: Factor on every channel count and hidden layer.
        image_size: Height and width of the images, 32 or 64 pixels.
        hidden_layers: Fully connected layers before the classifier: 2 in VGG16, 1 in VGG7.

    Shape:
        - images: ``b 3 s s``, s the image size
        - returns: logits ``b classes``

    Raises:
        ValueError: a size is out of range, or, on call, the images have another shape.
    """

    def __init__(
        self,
        convs: tuple[int, int, int, int, int],
        num_classes: int,
        width: float = 1.0,
        image_size: int = 32,
        *,
        hidden_layers: int = 2,
    ) -> None:
        super().__init__(num_classes, image_size)
        if hidden_layers < 1:
            raise ValueError(f"`hidden_layers` must be an int ≥ 1; got {hidden_layers}.")
        self.channels = scale_channels(STAGE_CHANNELS, width)
        self.sensing_points = tuple(f"stages.{stage}" for stage in range(len(STAGE_CHANNELS)))
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
            if stage != 3 or image_size == 64:
                layers.append(nn.MaxPool2d(2))
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        layers, incoming = [Rearrange("b c h w -> b (c h w)")], incoming * 2 * 2
        for _ in range(hidden_layers):
            layers += [nn.Linear(incoming, hidden), nn.ReLU()]
            incoming = hidden
        self.embedding = f"classifier.{len(layers) - 1}"
        self.classifier = nn.Sequential(*layers, nn.Linear(incoming, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        self.check_images(images)
        logits: Tensor = self.classifier(self.stages(images))
        return logits
