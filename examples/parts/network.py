"""What every network of the examples tells the scripts, and the sizes it can have."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["Network", "scale_channels"]

IMAGE_SIZES = (32, 64)  # pixels: CIFAR-100, TinyImageNet
MOST_WIDTH = 4  # a factor above it is a slip of the pen


class Network(nn.Module):
    """A network with known sensing points.

    Args:
        num_classes: Classes. Count.
        image_size: Height and width of the images, 32 or 64 pixels.

    Attributes:
        channels: Channels at the sensing points, from front to back.
        sensing_points: Submodules whose outputs are the sensing points, for `FeatureHooks`.
        embedding: Submodule whose output, ``b d``, is what the last layer makes the logits of.

    Raises:
        ValueError: there are no classes, the size is another, or, on call, the images do not fit.
    """

    channels: tuple[int, ...]
    sensing_points: tuple[str, ...]
    embedding: str

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"`num_classes` must be an int ≥ 1; got {num_classes}.")
        if image_size not in IMAGE_SIZES:
            raise ValueError(f"`image_size` must be 32 or 64; got {image_size}.")
        self.image_size = image_size

    def check_images(self, images: Tensor) -> None:
        """Refuse images that the network was not made for; a pooled network would take any."""
        size = self.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"`images` must have shape (b, 3, {size}, {size}); got {tuple(images.shape)}. "
                "Networks are made for 32×32 or 64×64 images with `image_size`."
            )


def scale_channels(channels: Sequence[int], width: float) -> tuple[int, ...]:
    """Multiply channel counts by ``width``, to at least one."""
    if not 0 < width <= MOST_WIDTH:
        raise ValueError(f"`width` must be above 0 and at most {MOST_WIDTH}; got {width}.")
    return tuple(max(1, round(count * width)) for count in channels)
