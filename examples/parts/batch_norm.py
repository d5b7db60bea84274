"""Batch norm whose statistics are those of all processes' samples, on any device.

Axis letters: ``b`` sample, ``c`` channel, ``h w`` space.
"""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from einops import rearrange, reduce
from parts.distributed import mean_over_processes, num_processes
from torch import Tensor, nn

__all__ = ["GlobalBatchNorm2d", "synchronise_batch_norm"]

M = TypeVar("M", bound=nn.Module)


def synchronise_batch_norm(model: M) -> M:
    """Let every `nn.BatchNorm2d` of ``model`` span all processes; a single one changes nothing.

    Parameters, buffers, hooks and the names in a state_dict stay what they are.
    """
    for module in model.modules():
        if num_processes() > 1 and type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d
    return model


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Give what `nn.BatchNorm2d` gives on the concatenated batch, to its part in this process.

    Every process must hold the same number of samples. `nn.SyncBatchNorm` does so on GPUs only.

    Shape:
        - images_bchw: ``b c h w``
        - returns: ``b c h w``, same dtype
    """

    def forward(self, images_bchw: Tensor) -> Tensor:
        """Normalise by the statistics of all processes, or by the running ones in evaluation."""
        if not self.training:
            return super().forward(images_bchw)
        images = images_bchw.to(self.weight.dtype)  # autocast hands over halves
        mean = mean_over_processes(reduce(images, "b c h w -> c 1 1", "mean"))
        centred = images - mean
        variance = mean_over_processes(reduce(centred.square(), "b c h w -> c 1 1", "mean"))
        self._track(mean, variance, num_processes() * images[:, 0].numel())
        scale = rearrange(self.weight, "c -> c 1 1") * (variance + self.eps).rsqrt()
        normalised = centred * scale + rearrange(self.bias, "c -> c 1 1")
        return normalised.to(images_bchw.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics, of which the variance is the unbiased one."""
        unbiased = variance * (count / (count - 1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            cast(Tensor, running).lerp_(rearrange(new, "c 1 1 -> c"), cast(float, self.momentum))
        cast(Tensor, self.num_batches_tracked).add_(1)
