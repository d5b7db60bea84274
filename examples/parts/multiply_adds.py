"""Count what a network costs an image."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["count_multiply_adds", "count_parameters"]


def count_multiply_adds(model: nn.Module, image_size: int) -> int:
    """Return the multiply-adds of convolutions and linear layers for one image.

    Biases, batch norm, activations and pooling are not counted. Nothing is computed and ``model``
    stays as it is: a copy without data (on torch's meta device) runs.
    """
    copy = deepcopy(model).to("meta").eval()
    counts: list[int] = []

    def count(layer: nn.Conv2d | nn.Linear, _inputs: Any, output: Tensor) -> None:
        counts.append(output.numel() * layer.weight[0].numel())  # each output sums over a filter

    for layer in copy.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    copy(torch.zeros(1, 3, image_size, image_size, device="meta"))
    return sum(counts)


def count_parameters(model: nn.Module) -> int:
    """Return the number of trained weights."""
    return sum(parameter.numel() for parameter in model.parameters())
