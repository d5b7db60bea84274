"""The nine networks of the poster by name, as in the authors' slides."""

from __future__ import annotations

from collections.abc import Callable

from parts.network import Network
from parts.three_stages import BasicBlock, ThreeStages, WideBlock, plain_block, separable_block
from parts.vgg import VGG

__all__ = ["NETWORKS", "TEACHERS", "VGG", "Network", "build"]

# Each makes a network for a number of classes, a width and an image size.
NETWORKS: dict[str, Callable[[int, float, int], Network]] = {
    "VGG16": lambda *sizes: VGG((2, 2, 3, 3, 3), *sizes),
    "VGG7": lambda *sizes: VGG((1, 1, 1, 1, 1), *sizes, hidden_layers=1),
    "WRN-22-4": lambda *sizes: ThreeStages(WideBlock, (3, 3, 3), *sizes, pre_activation=True),
    "WRN-10-4": lambda *sizes: ThreeStages(WideBlock, (1, 1, 1), *sizes, pre_activation=True),
    "ResNet-small": lambda *sizes: ThreeStages(BasicBlock, (1, 1, 1), *sizes),
    "MobileNet": lambda *sizes: ThreeStages(separable_block, (1, 2, 2), *sizes),
    "VGG-modified": lambda *sizes: ThreeStages(plain_block, (2, 2, 2), *sizes),
    "ResNet32": lambda *sizes: ThreeStages(BasicBlock, (5, 5, 5), *sizes, stem=32),
    "ResNet8": lambda *sizes: ThreeStages(BasicBlock, (1, 1, 1), *sizes, stem=32),
}

# The teacher of each student.
TEACHERS = {
    "VGG7": "VGG16",
    "WRN-10-4": "WRN-22-4",
    "ResNet-small": "WRN-22-4",
    "MobileNet": "WRN-22-4",
    "VGG-modified": "WRN-22-4",
    "ResNet8": "ResNet32",
}


def build(name: str, num_classes: int, width: float = 1.0, image_size: int = 32) -> Network:
    """Return a network of `NETWORKS`.

    Args:
        name: One of `NETWORKS`.
        num_classes: Classes. Count.
        width: Factor on every channel count and hidden layer.
        image_size: Height and width of the images, 32 or 64 pixels.

    Raises:
        ValueError: there is no such network, or a size is out of range.
    """
    if name not in NETWORKS:
        raise ValueError(f"`name` must be one of {', '.join(NETWORKS)}; got {name!r}.")
    return NETWORKS[name](num_classes, width, image_size)
