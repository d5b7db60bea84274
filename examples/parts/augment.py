"""Minibatches and augmentation on the device that holds the images, without a loop over samples.

Axis letters: ``b`` sample, ``c`` channel, ``h w`` space.

Whatever is random is drawn on the generator's device and then moved: a CPU generator gives the same
batches, crops and flips on every device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange, repeat
from parts.data import ImageSet
from torch import Tensor

__all__ = ["Normalize", "batches", "random_crop_flip"]


class Normalize:
    """Standardise each channel by the mean and standard deviation of the training pixels.

    Args:
        train: The images that give the two numbers a channel, both in pixel levels, 0 to 255.

    Shape:
        - images_bchw: ``b c h w``, any dtype and device
        - returns: ``b c h w``, float32, on the same device

    Raises:
        ValueError: Where a channel is constant.
    """

    def __init__(self, train: ImageSet) -> None:
        # A histogram makes the moments exact and needs no float copy of the whole set.
        channels = (rearrange(c, "n h w -> (n h w)") for c in train.images.unbind(dim=1))
        counts = torch.stack([torch.bincount(channel, minlength=256) for channel in channels])
        share = counts.double() / counts[0].sum()
        level = torch.arange(256, dtype=torch.float64, device=share.device)
        mean = (share * level).sum(dim=1, keepdim=True)
        std = (share * (level - mean).square()).sum(dim=1, keepdim=True).sqrt()
        if not bool((std > 0).all()):
            got = rearrange(std, "c 1 -> c").tolist()
            raise ValueError(f"`train` must vary in every channel; got standard deviations {got}.")
        self.mean = rearrange(mean, "c 1 -> c 1 1").float()
        self.std = rearrange(std, "c 1 -> c 1 1").float()

    def __call__(self, images_bchw: Tensor) -> Tensor:
        """Return the standardised images."""
        mean, std = self.mean.to(images_bchw.device), self.std.to(images_bchw.device)
        return (images_bchw.float() - mean) / std


def random_crop_flip(images_bchw: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Shift each image at random, filling by reflection, and mirror every other one or so.

    The same as to pad by reflection, crop at random back to size and flip with probability 1/2; but
    the padded images are never built, each output pixel is looked up where it comes from.

    Args:
        images_bchw: The images, of any dtype.
        generator: Source of the two offsets and the flip of each image.
        padding: Pixels added on each side, 0 ≤ padding < min(h, w).

    Shape:
        - images_bchw: ``b c h w``
        - returns: ``b c h w``, same dtype, device and memory format

    Raises:
        ValueError: Where ``images_bchw`` has other axes or ``padding`` is out of range.
    """
    if images_bchw.ndim != 4:
        raise ValueError(
            f'`images_bchw` must have axes "b c h w"; got shape {tuple(images_bchw.shape)}.'
        )
    b, c, h, w = images_bchw.shape
    if not 0 <= padding < min(h, w):
        raise ValueError(
            f"`padding` must be from 0 to min(h, w) - 1 = {min(h, w) - 1}; got {padding}."
        )
    source, device = generator.device, images_bchw.device
    top_left = torch.randint(-padding, padding + 1, (2, b, 1), generator=generator, device=source)
    mirror = torch.randint(2, (1, b, 1), generator=generator, device=source)
    # A blocking copy would wait for all that the GPU has been given to do, at every batch.
    top, left, flip = torch.cat([top_left, mirror]).to(device, non_blocking=device.type == "cuda")
    column = torch.arange(w, device=device)
    rows = _reflect(top + torch.arange(h, device=device), h)
    columns = _reflect(left + torch.where(flip.bool(), column.flip(0), column), w)
    # One look-up by flat position is five times as fast on a CPU as one by four coordinates.
    position = rearrange(rows * w, "b h -> b h 1") + rearrange(columns, "b w -> b 1 w")
    pixels = rearrange(images_bchw, "b c h w -> b c (h w)")
    drawn = pixels.gather(2, repeat(position, "b h w -> b c (h w)", c=c))
    # Into the memory format of the input: a gather's own result is never channels-last.
    return torch.empty_like(images_bchw).copy_(rearrange(drawn, "b c (h w) -> b c h w", h=h))


def _reflect(position: Tensor, size: int) -> Tensor:
    """Fold positions outside 0 to ``size`` - 1 back inside, without repeating the border."""
    last = size - 1
    return last - (last - position.abs()).abs()


def batches(
    image_set: ImageSet, batch_size: int, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over minibatches of images and labels, once through the set.

    With a generator, for training: in an order drawn anew by each call, without the last incomplete
    batch. Without one, for evaluation: in stored order, every image.

    Args:
        image_set: The images; the batches are on its device.
        batch_size: Images in a batch, ≥ 1.
        generator: Source of the order; None keeps the stored order.

    Raises:
        ValueError: Where ``batch_size`` is below 1, or above the number of images in training.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"`batch_size` must be an int; got {batch_size!r}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be an int ≥ 1; got {batch_size}.")
    images, labels = image_set.images, image_set.labels
    if generator is None:
        return zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)
    count = len(images)
    if count < batch_size:
        raise ValueError(
            f"`batch_size` must be ≤ {count}, the number of training images; got {batch_size}. "
            f"Training drops the last incomplete batch, so none would be left."
        )
    order = torch.randperm(count, generator=generator, device=generator.device).to(images.device)
    order = order[: count - count % batch_size]
    return ((images[chosen], labels[chosen]) for chosen in torch.split(order, batch_size))
