"""Benchmark of the singular vectors: time, memory and error of each way to compute them.

A step is what a training step needs at every sensing point: one vector of the teacher's map without
gradient, four candidates of the student's, alignment, and the gradient of the aligned vector.

Axes: ``b`` sample, ``n`` position, ``c`` channel, ``k`` singular vector.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from parts.decompositions import DECOMPOSITIONS, gram
from parts.timing import median_ratio, paired_seconds, peak_memory
from torch import Tensor

from graph_kd import SVDFeature, align_singular_vectors

__all__ = ["Point", "measure_vectors", "small_gaps"]

Decompose = Callable[[Tensor, int], Tensor]
BARE = "bare Gram"
CANDIDATES = 4
GAP = 0.01  # relative gap from which a vector counts as isolated
RATIO = 1.015  # between neighbouring singular values of the synthetic maps


@dataclass(frozen=True)
class Point:
    """Hold the maps ``b c h w`` of teacher and student at one sensing point."""

    name: str
    teacher: Tensor
    student: Tensor


def small_gaps(points: list[Point]) -> list[Point]:
    """Return maps of the same shapes whose neighbouring singular values differ by 1.5 %."""
    generator = torch.Generator().manual_seed(0)

    def like(features: Tensor) -> Tensor:
        b, c, h, w = features.shape
        size = min(c, h * w)
        values = RATIO ** -torch.arange(size, dtype=torch.float64)
        left, right = (
            torch.linalg.qr(torch.randn(b, rows, size, generator=generator).double())[0]
            for rows in (h * w, c)
        )
        matrix = (left * values) @ right.mT
        maps: Tensor = rearrange(matrix, "b (h w) c -> b c h w", h=h)
        return maps.to(features).contiguous()

    return [Point(p.name, like(p.teacher), like(p.student)) for p in points]


def measure_vectors(
    points: list[Point], repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """Return a row a method: seconds of a step over all points, peak memory, errors."""
    steps: dict[str, list[Callable[[], Tensor]]] = {BARE: [partial(_bare, p) for p in points]}
    errors: dict[str, dict[str, float]] = {BARE: {}}
    failed = []
    for name, decompose in DECOMPOSITIONS.items():
        found = _errors(decompose, points)
        if isinstance(found, str):
            failed.append({"method": name, "fails": found})
        else:
            errors[name], steps[name] = found, [partial(_step, decompose, p) for p in points]
    tasks = {f"{name}/{i}": step for name, part in steps.items() for i, step in enumerate(part)}
    seconds = paired_seconds(tasks, repeats, device)
    totals = {
        name: [
            sum(r) for r in zip(*(seconds[f"{name}/{i}"] for i in range(len(part))), strict=False)
        ]
        for name, part in steps.items()
    }
    rows = [
        {
            "method": name,
            "seconds": statistics.median(totals[name]),
            "ours / this": median_ratio(totals["graph-kd"], totals[name]),
            "peak_bytes": max(peak_memory(step, device) for step in part),
            "seconds_of_points": {
                p.name: statistics.median(seconds[f"{name}/{i}"]) for i, p in enumerate(points)
            },
            **errors[name],
        }
        for name, part in steps.items()
    ]
    return rows + failed


def _step(decompose: Decompose, point: Point) -> Tensor:
    student = point.student.detach().requires_grad_()
    with torch.no_grad():
        target = decompose(_rows(point.teacher), 1)
    vectors = align_singular_vectors(decompose(_rows(student), _candidates(student)), target)
    gradient: Tensor
    (gradient,) = torch.autograd.grad(vectors, student, target)
    return gradient


def _bare(point: Point) -> Tensor:
    """The Gram matrices that every method but the SVD starts from, and their backward."""
    student = point.student.detach().requires_grad_()
    with torch.no_grad():
        gram(_rows(point.teacher))
    matrix = gram(_rows(student))
    (gradient,) = torch.autograd.grad(matrix, student, matrix.detach())
    return gradient


def _errors(decompose: Decompose, points: list[Point]) -> dict[str, float] | str:
    """Return the largest errors over all points, or why the method fails on them."""
    try:
        pairs = [_errors_at(decompose, point) for point in points]
    except RuntimeError as error:  # torch's decompositions raise it, or a class of it
        return str(error).splitlines()[0]
    vector, gradient = (max(values) for values in zip(*pairs, strict=True))
    return {"vector": vector, "gradient": gradient}


def _errors_at(decompose: Decompose, point: Point) -> tuple[float, float]:
    """Return the largest errors over isolated vectors, k = 1 of the teacher and 4 of the student.

    Against float64: 1 - |cos| of the vectors, and of their gradients for a random cotangent the
    relative error.
    """
    vector = gradient = 0.0
    for features, k in (point.teacher, 1), (point.student, _candidates(point.student)):
        isolated = _isolated(_rows(features), k)
        truth = features.double().requires_grad_()
        tested = features.detach().requires_grad_()
        wanted, got = SVDFeature(k)(_rows(truth)), decompose(_rows(tested), k)
        cosine = (wanted * got).sum(dim=-1).detach()
        vector = max(vector, _worst(1 - cosine.abs(), isolated))
        generator = torch.Generator().manual_seed(0)
        cotangent = torch.randn(wanted.shape, generator=generator).to(wanted)
        for i in range(k):
            # A vector of the other sign has the other gradient for the same cotangent.
            turned = cotangent[:, i] * cosine[:, i : i + 1].sign()
            (true,) = torch.autograd.grad(wanted[:, i], truth, cotangent[:, i], retain_graph=True)
            (own,) = torch.autograd.grad(got[:, i], tested, turned.to(got), retain_graph=True)
            error = (own - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)
            gradient = max(gradient, _worst(error, isolated[:, i]))
    return vector, gradient


def _worst(error: Tensor, isolated: Tensor) -> float:
    """Return the largest error of isolated vectors; infinity for NaN."""
    chosen = error[isolated].nan_to_num(torch.inf)
    return float(chosen.max()) if len(chosen) else 0.0


def _isolated(rows_bnc: Tensor, k: int) -> Tensor:
    """Tell which of the top k singular values stand off both neighbours, ``b k``."""
    values = torch.linalg.svdvals(rows_bnc.double())
    values = torch.nn.functional.pad(values, (0, 1))
    own, after = values[:, :k], values[:, 1 : k + 1]
    before = torch.cat([torch.full_like(own[:, :1], torch.inf), own[:, :-1]], dim=1)
    return (own - after >= GAP * own) & (before - own >= GAP * own)


def _candidates(features: Tensor) -> int:
    _, n, c = _rows(features).shape
    return min(CANDIDATES, n, c)


def _rows(features: Tensor) -> Tensor:
    return rearrange(features, "b c h w -> b (h w) c")
