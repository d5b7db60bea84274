"""WRN, ResNet, MobileNet and the modified VGG: one outline, told apart by their blocks.

A first convolution, three stages whose outputs are the sensing points, average pooling, classifier.
No ReLU works in place: the pre-activation of a next block would change a sensing point's output.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch
from einops.layers.torch import Reduce
from parts.network import Network, scale_channels
from torch import Tensor, nn

__all__ = ["BasicBlock", "ThreeStages", "WideBlock", "plain_block", "separable_block"]

STAGE_CHANNELS = (64, 128, 256)

Block = Callable[[int, int, int], nn.Module]  # of incoming channels, channels, stride


class ThreeStages(Network):
    """Three stages of blocks; the second and the third halve height and width in their first block.

    The first convolution has stride 2 on 64×64 images. The slides say so of the WRN; for the other
    networks, which the poster did not run on TinyImageNet, it is our choice. Convolutions begin as
    is usual for the WRN, and as in the authors' ResNet: normal, variance 2 / fan-out.

    Args:
        block: What a stage repeats.
        blocks: Blocks of each stage.
        num_classes: Classes. Count.
        width: Factor on every channel count.
        image_size: Height and width of the images, 32 or 64 pixels.
        stem: Channels of the first convolution. Count.
        pre_activation: Blocks begin with batch norm and ReLU, so these end the last stage and do
            not follow the first convolution.

    Shape:
        - images: ``b 3 s s``, s the image size
        - returns: logits ``b classes``

    Raises:
        ValueError: a size is out of range, or, on call, the images have another shape.
    """

    def __init__(
        self,
        block: Block,
        blocks: tuple[int, int, int],
        num_classes: int,
        width: float = 1.0,
        image_size: int = 32,
        *,
        stem: int = 16,
        pre_activation: bool = False,
    ) -> None:
        super().__init__(num_classes, image_size)
        (incoming,) = scale_channels([stem], width)
        self.channels = scale_channels(STAGE_CHANNELS, width)
        self.sensing_points = ("stages.0", "stages.1", "stages.2")
        self.embedding = "pool"
        first = _conv(3, incoming, stride=2 if image_size == 64 else 1)
        self.stem = first if pre_activation else nn.Sequential(first, _norm_relu(incoming))
        stages = []
        for channels, count, stride in zip(self.channels, blocks, (1, 2, 2), strict=True):
            layers = [block(incoming, channels, stride)]
            layers += [block(channels, channels, 1) for _ in range(count - 1)]
            stages.append(nn.Sequential(*layers))
            incoming = channels
        self.stages = nn.Sequential(*stages)
        self.last = _norm_relu(incoming) if pre_activation else nn.Identity()
        self.pool = Reduce("b c h w -> b c", "mean")
        self.classifier = nn.Linear(incoming, num_classes)
        self.apply(_draw_weights)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        self.check_images(images)
        logits: Tensor = self.classifier(self.pool(self.last(self.stages(self.stem(images)))))
        return logits


def plain_block(incoming: int, channels: int, stride: int) -> nn.Module:
    """Return convolution, batch norm and ReLU: the modified VGG."""
    return nn.Sequential(_conv(incoming, channels, stride), _norm_relu(channels))


def separable_block(incoming: int, channels: int, stride: int) -> nn.Module:
    """Return a depthwise and a pointwise convolution, each with batch norm and ReLU: MobileNet."""
    return nn.Sequential(
        _conv(incoming, incoming, stride, groups=incoming),
        _norm_relu(incoming),
        _conv(incoming, channels, kernel_size=1),
        _norm_relu(channels),
    )


class BasicBlock(nn.Module):
    """The post-activation block of ResNet, as in the authors' program.

    The shortcut is the input or, where stride or channels change, its 1×1 convolution with batch
    norm. Padding is one pixel on each side; TensorFlow's at stride 2 is below and right only.
    """

    def __init__(self, incoming: int, channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _conv(incoming, channels, stride),
            _norm_relu(channels),
            _conv(channels, channels),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or incoming != channels:
            conv = _conv(incoming, channels, stride, kernel_size=1)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, feature: Tensor) -> Tensor:
        """Return the ReLU of residual plus shortcut."""
        return torch.relu(self.residual(feature) + self.shortcut(feature))


class WideBlock(nn.Module):
    """The pre-activation block of WRN: BN-ReLU-conv-dropout-BN-ReLU-conv, plus the shortcut.

    The shortcut is the input or, where stride or channels change, a 1×1 convolution of the input
    after the first BN-ReLU. The slides show dropout and give no rate; it is 0 unless one is given.
    """

    def __init__(self, incoming: int, channels: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.activate = _norm_relu(incoming)
        self.residual = nn.Sequential(
            _conv(incoming, channels, stride),
            nn.Dropout(dropout),
            _norm_relu(channels),
            _conv(channels, channels),
        )
        self.shortcut: nn.Module | None = None
        if stride != 1 or incoming != channels:
            self.shortcut = _conv(incoming, channels, stride, kernel_size=1)

    def forward(self, feature: Tensor) -> Tensor:
        """Return residual plus shortcut."""
        active = self.activate(feature)
        shortcut = feature if self.shortcut is None else self.shortcut(active)
        added: Tensor = self.residual(active) + shortcut
        return added


def _conv(
    incoming: int, channels: int, stride: int = 1, *, kernel_size: int = 3, groups: int = 1
) -> nn.Conv2d:
    return nn.Conv2d(
        incoming,
        channels,
        kernel_size,
        stride,
        padding=kernel_size // 2,
        groups=groups,
        bias=False,  # batch norm follows
    )


def _norm_relu(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


def _draw_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        # torch's own fan_out forgets the groups: depthwise filters would be too small.
        fan_out = module.out_channels * module.weight[0, 0].numel() // module.groups
        nn.init.normal_(module.weight, std=sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
