"""The nine networks of the poster, and a table of what each costs.

    python examples/networks.py

The table counts the multiply-adds of convolutions and linear layers for one image. The poster's
numbers do not follow from the architectures in its authors' slides; they stand beside ours.

Axis letters: ``b`` sample, ``c`` channel, ``h w`` space.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from math import sqrt

import torch
from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

VGG_CHANNELS, VGG_HIDDEN = (64, 128, 256, 512, 512), 1024
STAGE_CHANNELS = (64, 128, 256)  # of all others


class Network(nn.Sequential):
    """A network that names its sensing points: parts in sequence, "stages" among them.

    Attributes:
        name: The architecture, as "VGG16".
        channels: Channels at the sensing points, which are the outputs of the stages, in order.
        sensing_points: Names of the stages, for `FeatureHooks`.
        embedding: Submodule whose output, ``b c``, the last layer turns into logits.

    Shape:
        - images: ``b 3 s s``, s the image size
        - returns: logits ``b classes``
    """

    name: str

    def __init__(self, channels: Sequence[int], embedding: str, **parts: nn.Module) -> None:
        super().__init__(OrderedDict(parts))
        self.channels, self.embedding = tuple(channels), embedding
        self.sensing_points = tuple(f"stages.{stage}" for stage in range(len(channels)))


def vgg(
    convs: Sequence[int], hidden_layers: int, classes: int, width: float, image_size: int
) -> Network:
    """Return a VGG: five stages of 3×3 convolutions, hidden layers and a classifier.

    A stage ends in 2×2 max pooling; the fourth does so on 64×64 images only. Batch norm between
    convolution and ReLU is ours: the slides show none. Weights start as in torch's layers.
    """
    *channels, hidden = scaled((*VGG_CHANNELS, VGG_HIDDEN), width)
    stages, incoming = nn.Sequential(), 3
    for place, (count, outgoing) in enumerate(zip(convs, channels, strict=True)):
        stage = nn.Sequential()
        for _ in range(count):
            stage.extend([convolution(incoming, outgoing), *norm_relu(outgoing)])
            incoming = outgoing
        if place != 3 or image_size == 64:
            stage.append(nn.MaxPool2d(2))
        stages.append(stage)
    classifier, incoming = nn.Sequential(Rearrange("b c h w -> b (c h w)")), incoming * 2 * 2
    for _ in range(hidden_layers):
        classifier.extend([nn.Linear(incoming, hidden), nn.ReLU()])
        incoming = hidden
    embedding = f"classifier.{len(classifier) - 1}"
    classifier.append(nn.Linear(incoming, classes))
    return Network(channels, embedding, stages=stages, classifier=classifier)


def three_stages(
    block: Callable[[int, int, int], nn.Module],
    blocks: Sequence[int],
    classes: int,
    width: float,
    image_size: int,
    *,
    stem: int = 16,
    pre_activation: bool = False,
) -> Network:
    """Return a first convolution, three stages of blocks, average pooling and a classifier.

    The second and the third stage halve height and width. On 64×64 images the first convolution has
    stride 2: the slides say so of the WRN. Convolutions start normal with variance 2 / fan-out.
    With ``pre_activation`` the blocks start with batch norm and ReLU, as in a WRN.
    """
    incoming, *channels = scaled((stem, *STAGE_CHANNELS), width)
    first = convolution(3, incoming, stride=2 if image_size == 64 else 1)
    front = first if pre_activation else nn.Sequential(first, norm_relu(incoming))
    stages = nn.Sequential()
    for outgoing, count, stride in zip(channels, blocks, (1, 2, 2), strict=True):
        stage = nn.Sequential(block(incoming, outgoing, stride))
        stage.extend(block(outgoing, outgoing, 1) for _ in range(count - 1))
        stages.append(stage)
        incoming = outgoing
    network = Network(
        channels,
        "pool",
        stem=front,
        stages=stages,
        last=norm_relu(incoming) if pre_activation else nn.Identity(),
        pool=Reduce("b c h w -> b c", "mean"),
        classifier=nn.Linear(incoming, classes),
    )
    return network.apply(draw_weights)


class BasicBlock(nn.Module):
    """The block of ResNet: two convolutions and a shortcut, then ReLU."""

    def __init__(self, incoming: int, channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            convolution(incoming, channels, stride),
            norm_relu(channels),
            convolution(channels, channels),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or incoming != channels:
            conv = Pointwise(incoming, channels, stride)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, feature: Tensor) -> Tensor:
        """Return the ReLU of residual plus shortcut."""
        return torch.relu(self.residual(feature) + self.shortcut(feature))


class WideBlock(nn.Module):
    """The block of WRN: batch norm, ReLU, convolution, twice, plus a shortcut.

    The slides show dropout without a rate; there is none here.
    """

    def __init__(self, incoming: int, channels: int, stride: int) -> None:
        super().__init__()
        self.activate = norm_relu(incoming)
        self.residual = nn.Sequential(
            convolution(incoming, channels, stride),
            norm_relu(channels),
            convolution(channels, channels),
        )
        self.shortcut: nn.Module | None = None
        if stride != 1 or incoming != channels:
            self.shortcut = Pointwise(incoming, channels, stride)

    def forward(self, feature: Tensor) -> Tensor:
        """Return residual plus shortcut."""
        active = self.activate(feature)
        added: Tensor = self.residual(active)
        return added + (feature if self.shortcut is None else self.shortcut(active))


def plain_block(incoming: int, channels: int, stride: int) -> nn.Module:
    """Return the block of the modified VGG: convolution, batch norm, ReLU."""
    return nn.Sequential(convolution(incoming, channels, stride), norm_relu(channels))


def separable_block(incoming: int, channels: int, stride: int) -> nn.Module:
    """Return the block of MobileNet: a depthwise and a pointwise convolution."""
    return nn.Sequential(
        convolution(incoming, incoming, stride, groups=incoming),
        norm_relu(incoming),
        Pointwise(incoming, channels),
        norm_relu(channels),
    )


def convolution(incoming: int, channels: int, stride: int = 1, *, groups: int = 1) -> nn.Conv2d:
    """Return a 3 × 3 convolution; batch norm follows, so no bias."""
    return nn.Conv2d(incoming, channels, 3, stride, padding=1, groups=groups, bias=False)


class Pointwise(nn.Conv2d):
    """A 1 × 1 convolution of every ``step``-th row and column, without bias.

    With a stride in its place, and fewer than 8 channels that are stored last, oneDNN writes past
    its memory on a CPU that has AVX2 and no more (uxlfoundation/oneDNN, issue 6035).
    """

    def __init__(self, incoming: int, channels: int, step: int = 1, *, groups: int = 1) -> None:
        super().__init__(incoming, channels, kernel_size=1, groups=groups, bias=False)
        self.step = step

    def forward(self, feature: Tensor) -> Tensor:
        """Return the map, ``b c h w``."""
        return super().forward(feature[:, :, :: self.step, :: self.step])


def norm_relu(channels: int) -> nn.Sequential:
    """Return batch norm and ReLU; not in place, or it would change a sensing point's output."""
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


def draw_weights(module: nn.Module) -> None:
    """Initialise one layer."""
    if isinstance(module, nn.Conv2d):  # torch's own fan-out does not divide by the groups
        fan_out = module.out_channels * module.weight[0, 0].numel() // module.groups
        nn.init.normal_(module.weight, std=sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def scaled(channels: Sequence[int], width: float) -> list[int]:
    """Return the channel counts times ``width``, at least one."""
    return [max(1, round(count * width)) for count in channels]


# Each is called with classes, width and image size.
NETWORKS: dict[str, Callable[[int, float, int], Network]] = {
    "VGG16": partial(vgg, (2, 2, 3, 3, 3), 2),
    "VGG7": partial(vgg, (1, 1, 1, 1, 1), 1),
    "WRN-22-4": partial(three_stages, WideBlock, (3, 3, 3), pre_activation=True),
    "WRN-10-4": partial(three_stages, WideBlock, (1, 1, 1), pre_activation=True),
    "ResNet-small": partial(three_stages, BasicBlock, (1, 1, 1)),
    "MobileNet": partial(three_stages, separable_block, (1, 2, 2)),
    "VGG-modified": partial(three_stages, plain_block, (2, 2, 2)),
    "ResNet32": partial(three_stages, BasicBlock, (5, 5, 5), stem=32),
    "ResNet8": partial(three_stages, BasicBlock, (1, 1, 1), stem=32),
}
POSTER = {  # millions of operations (its "FLOPS") and of parameters, on CIFAR-100
    "VGG16": ("143.7", "11.83"),
    "VGG7": ("17.6", "2.19"),
    "WRN-22-4": ("374.2", "0.417"),
    "WRN-10-4": ("93.2", "0.1404"),
}


def build(name: str, classes: int, width: float = 1.0, image_size: int = 32) -> Network:
    """Return a new network of `NETWORKS`, for images of 32×32 or of 64×64 pixels."""
    network = NETWORKS[name](classes, width, image_size)
    network.name = name
    return network


def costs(name: str, classes: int, image_size: int) -> tuple[str, str, str]:
    """Return channels at the sensing points, and millions of multiply-adds and of parameters."""
    with torch.device("meta"), torch.no_grad():  # shapes alone
        network = build(name, classes, image_size=image_size).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, image_size, image_size))
    adds, weights = counter.get_total_flops() / 2, sum(p.numel() for p in network.parameters())
    return ", ".join(map(str, network.channels)), f"{adds / 1e6:.1f}", f"{weights / 1e6:.3f}"


def table() -> str:
    """Return what each network costs, as Markdown."""
    head = ["network", "channels at the sensing points"]
    for what in ("multiply-adds, M", "parameters, M"):
        head += [f"{what}: CIFAR-100", "poster", "Tiny ImageNet"]
    rows = [head, ["---"] * len(head)]
    for name in NETWORKS:
        channels, *cifar = costs(name, 100, 32)
        _, *tiny = costs(name, 200, 64)
        poster = POSTER.get(name, "––")
        rows.append([name, channels, cifar[0], poster[0], tiny[0], cifar[1], poster[1], tiny[1]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())
