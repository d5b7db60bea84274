"""Benchmark of growth: memory and time of the transfer loss over the size of the batch."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from parts.timing import median_ratio, paired_seconds, peak_memory
from torch import Tensor

from graph_kd import GraphTransferLoss

__all__ = ["measure_growth"]

CHANNELS = (64, 128)  # one pair; vectors, so that the graphs are all there is


def measure_growth(
    sizes: tuple[int, ...], plain_up_to: int, repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """Return a row a batch size: the default (row blocks) and whole graphs, forward and backward.

    Whole graphs are measured up to ``plain_up_to`` samples: they need gigabytes beyond.
    """
    rows = []
    for size in sizes:
        forms: dict[str, int | None] = {"blocks": max(1, min(size // 4, 1024**2 // size))}
        forms["default"] = None
        if size <= plain_up_to:
            forms["plain"] = size
        generator = torch.Generator().manual_seed(0)
        student, teacher = (
            [torch.randn(size, c, generator=generator).to(device) for c in CHANNELS]
            for _ in range(2)
        )
        losses = {
            name: GraphTransferLoss(CHANNELS, block_rows=block_rows).to(device)
            for name, block_rows in forms.items()
        }
        tasks = {name: partial(_step, loss, student, teacher) for name, loss in losses.items()}
        seconds = paired_seconds(tasks, repeats, device)
        row: dict[str, Any] = {"samples": size, "block_rows": forms["blocks"]}
        for name, task in tasks.items():
            row[f"{name}_seconds"] = statistics.median(seconds[name])
            row[f"{name}_bytes"] = peak_memory(task, device)
        if "plain" in seconds:
            row["blocks / plain"] = median_ratio(seconds["blocks"], seconds["plain"])
        rows.append(row)
    return rows


def _step(loss: GraphTransferLoss, student: list[Tensor], teacher: list[Tensor]) -> None:
    inputs = [features.detach().requires_grad_() for features in student]
    torch.autograd.grad(loss(inputs, teacher), inputs)
