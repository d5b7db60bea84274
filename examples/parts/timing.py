"""Time and memory of functions, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm  # type: ignore[import-untyped] # it ships no types

__all__ = ["median_ratio", "paired_seconds", "peak_memory"]

LONG, FEW = 2.0, 3  # seconds of a turn, and the rounds that are enough for such tasks


def paired_seconds(
    tasks: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Time each task ``repeats`` times, all of them in every round, after one that warms up.

    What slows the machine for a while slows all tasks, so that their ratios hold. A task that takes
    seconds leaves after a few rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_number in tqdm(range(repeats + 1), desc="rounds", leave=False):
        for name, task in tasks.items():
            if len(seconds[name]) >= FEW and min(seconds[name]) > LONG:
                continue
            started = _now(device)
            task()
            if round_number:
                seconds[name].append(_now(device) - started)
    return seconds


def peak_memory(task: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of tensors that a task holds at a time beside those there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        task()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        task()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median of the ratios of two tasks over the rounds that both took part in."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=False))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
