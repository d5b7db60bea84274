"""How the benchmark measures, and its part on singular vectors: time, memory and error.

A step is what training needs at every sensing point: one vector of the teacher's map without
gradient, four candidates of the student's, alignment, and the gradient of the aligned vector.

Axis letters: ``b`` sample, ``n`` position, ``c`` channel, ``k`` singular vector, ``s`` row of the
Gram matrix of the shorter side.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import save_figure
from einops import rearrange
from matplotlib.figure import Figure
from networks import Network
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm  # type: ignore[import-untyped] # it ships no types

from graph_kd import FeatureHooks, SVDFeature, align_singular_vectors

Decompose = Callable[[Tensor, int], Tensor]  # from ``b n c`` and k to vectors ``b k c``
KINDS = {"trained": "of trained networks", "small gaps": "with gaps of 1.5 %"}
CANDIDATES = 4
LONG, FEW = 2.0, 3  # seconds of a task, and the rounds that are enough for such tasks
GAP = 0.01  # relative gap from which a vector counts as isolated
RATIO = 1.015  # between neighbouring singular values of the synthetic maps


class Point(NamedTuple):
    """The matrices ``b n c`` of teacher and student at one sensing point."""

    name: str
    teacher: Tensor
    student: Tensor

    @property
    def candidates(self) -> int:
        """Vectors of the student that are looked at."""
        _, n, c = self.student.shape
        return min(CANDIDATES, n, c)


def paired_seconds(
    tasks: Mapping[Any, Callable[[], object]], repeats: int, device: str
) -> dict[Any, list[float]]:
    """Time each task ``repeats`` times, all of them in every round, after one that warms up.

    What slows the machine for a while slows all tasks, so that their ratios hold. A task that takes
    seconds leaves after a few rounds.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in tasks}
    for number in tqdm(range(repeats + 1), "rounds", leave=False):
        for name, task in tasks.items():
            if len(seconds[name]) >= FEW and min(seconds[name]) > LONG:
                continue
            started = now(device)
            task()
            if number:
                seconds[name].append(now(device) - started)
    return seconds


def now(device: str) -> float:
    """Return the time after all that the device has been given to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median of the ratios over the rounds that both took part in."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=False))


def peak_bytes(task: Callable[[], object], device: str) -> int:
    """Return the most bytes of tensors that a task holds at a time beside those there before."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        task()
        return int(torch.cuda.max_memory_allocated(device)) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        task()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@torch.no_grad()
def points_of(teacher: Network, student: Network, images: Tensor) -> list[Point]:
    """Return the maps of both networks at every sensing point."""
    maps = []
    for network in (teacher.eval(), student.train()):
        with FeatureHooks(network, network.sensing_points) as hooks:
            network(images)
            maps.append([rearrange(m, "b c h w -> b (h w) c") for m in hooks.features])
    return [Point(f"{t.shape[1]}×{t.shape[2]}", t, s) for t, s in zip(*maps, strict=True)]


def small_gaps(points: list[Point]) -> list[Point]:
    """Return matrices of the same shapes whose neighbouring singular values differ by 1.5 %."""
    draw = torch.Generator().manual_seed(0)

    def like(rows: Tensor) -> Tensor:
        b, n, c = rows.shape
        size = min(n, c)
        values = RATIO ** -torch.arange(size, dtype=torch.float64)
        left, right = (
            torch.linalg.qr(torch.randn(b, length, size, generator=draw).double())[0]
            for length in (n, c)
        )
        matrices: Tensor = (left * values) @ right.mT
        return matrices.to(rows)

    return [Point(p.name, like(p.teacher), like(p.student)) for p in points]


def gram(rows_bnc: Tensor) -> Tensor:
    """Return the Gram matrix of the shorter side, ``b s s``: the least that most ways need."""
    _, n, c = rows_bnc.shape
    return rows_bnc.mT @ rows_bnc if n >= c else rows_bnc @ rows_bnc.mT


def on_channels(rows_bnc: Tensor, columns_bsk: Tensor) -> Tensor:
    """Return right singular vectors from eigenvectors of the Gram matrix."""
    if rows_bnc.shape[1] < rows_bnc.shape[2]:
        columns_bsk = torch.nn.functional.normalize(rows_bnc.mT @ columns_bsk, dim=1)
    return rearrange(columns_bsk, "b c k -> b k c")


def gram_eigh(rows_bnc: Tensor, k: int) -> Tensor:
    """Eigenvectors of the Gram matrix."""
    _, basis = torch.linalg.eigh(gram(rows_bnc))
    return on_channels(rows_bnc, basis[..., -k:].flip(-1))


def svd_lowrank(rows_bnc: Tensor, k: int) -> Tensor:
    """Randomised subspace iteration, with torch's default of two rounds."""
    columns = min(k + 4, *rows_bnc.shape[1:])
    _, _, right = torch.svd_lowrank(rows_bnc, q=columns)
    return rearrange(right[..., :k], "b c k -> b k c")


def lobpcg(rows_bnc: Tensor, k: int) -> Tensor:
    """Conjugate gradients on the Gram matrix, where they are defined."""
    matrices = gram(rows_bnc)
    if matrices.shape[-1] < 3 * k:
        return gram_eigh(rows_bnc, k)
    _, columns = torch.lobpcg(matrices, k)
    return on_channels(rows_bnc, columns)


WAYS: dict[str, Decompose] = {
    "graph-kd": lambda rows, k: SVDFeature(k)(rows),
    "Gram + eigh": gram_eigh,
    "linalg.svd": lambda rows, k: torch.linalg.svd(rows, full_matrices=False)[2][:, :k],
    "svd_lowrank": svd_lowrank,
    "lobpcg": lobpcg,
}


def measure(points: list[Point], settings: Any) -> dict[str, list[dict[str, Any]]]:
    """Return, for each kind of maps, a row a way: seconds over all points, peak memory, errors."""
    kinds = zip(KINDS, (points, small_gaps(points)), strict=True)
    return {kind: rows_of(some, settings) for kind, some in kinds}


def rows_of(points: list[Point], settings: Any) -> list[dict[str, Any]]:
    """Return the rows of one kind of maps."""
    steps = {"bare Gram": [partial(bare, point) for point in points]}
    errors: dict[str, dict[str, Any]] = {"bare Gram": {}}
    failed = []
    for name, decompose in WAYS.items():
        try:
            pairs = [errors_at(decompose, point) for point in points]
        except RuntimeError as error:  # torch's decompositions raise it, or a class of it
            failed.append({"method": name, "fails": str(error).splitlines()[0]})
            continue
        vector, gradient = (max(values) for values in zip(*pairs, strict=True))
        errors[name] = {"vector": vector, "gradient": gradient}
        steps[name] = [partial(step, decompose, point) for point in points]
    tasks = {(name, i): step for name, part in steps.items() for i, step in enumerate(part)}
    seconds = paired_seconds(tasks, settings.repeats, settings.device)
    totals = {
        name: [sum(r) for r in zip(*(seconds[name, i] for i in range(len(points))), strict=False)]
        for name in steps
    }
    return [
        {
            "method": name,
            "seconds": statistics.median(totals[name]),
            "ours / this": median_ratio(totals["graph-kd"], totals[name]),
            "peak_bytes": max(peak_bytes(task, settings.device) for task in part),
            "seconds_of_points": {
                p.name: statistics.median(seconds[name, i]) for i, p in enumerate(points)
            },
            **errors[name],
        }
        for name, part in steps.items()
    ] + failed


def step(decompose: Decompose, point: Point) -> None:
    """Take the vectors of a point and the gradient of the aligned one."""
    student = point.student.detach().requires_grad_()
    with torch.no_grad():
        target = decompose(point.teacher, 1)
    vectors = align_singular_vectors(decompose(student, point.candidates), target)
    torch.autograd.grad(vectors, student, target)


def bare(point: Point) -> None:
    """Take the Gram matrices alone, with their backward."""
    student = point.student.detach().requires_grad_()
    gram(point.teacher)
    matrix = gram(student)
    torch.autograd.grad(matrix, student, matrix.detach())


def errors_at(decompose: Decompose, point: Point) -> tuple[float, float]:
    """Return the largest errors over isolated vectors, against float64.

    1 - |cos| of the vectors, and the relative error of their gradients for a random cotangent.
    """
    vector = gradient = 0.0
    for rows, k in (point.teacher, 1), (point.student, point.candidates):
        chosen = isolated(rows, k)
        truth, tested = rows.double().requires_grad_(), rows.detach().requires_grad_()
        wanted, got = SVDFeature(k)(truth), decompose(tested, k)
        cosine = (wanted * got).sum(dim=-1).detach()
        vector = max(vector, worst(1 - cosine.abs(), chosen))
        draw = torch.Generator().manual_seed(0)
        cotangent = torch.randn(wanted.shape, generator=draw).to(wanted)
        for i in range(k):
            # A vector of the other sign has the other gradient for the same cotangent.
            turned = cotangent[:, i] * cosine[:, i : i + 1].sign()
            (true,) = torch.autograd.grad(wanted[:, i], truth, cotangent[:, i], retain_graph=True)
            (own,) = torch.autograd.grad(got[:, i], tested, turned.to(got), retain_graph=True)
            error = (own - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)
            gradient = max(gradient, worst(error, chosen[:, i]))
    return vector, gradient


def worst(error: Tensor, chosen: Tensor) -> float:
    """Return the largest error of the chosen vectors; infinity for NaN."""
    some = error[chosen].nan_to_num(torch.inf)
    return float(some.max()) if len(some) else 0.0


def isolated(rows_bnc: Tensor, k: int) -> Tensor:
    """Tell which of the top k singular values are apart from both neighbours, ``b k``."""
    values = torch.nn.functional.pad(torch.linalg.svdvals(rows_bnc.double()), (0, 1))
    own, after = values[:, :k], values[:, 1 : k + 1]
    before = torch.cat([torch.full_like(own[:, :1], torch.inf), own[:, :-1]], dim=1)
    return (own - after >= GAP * own) & (before - own >= GAP * own)


def plot(rows_of_kind: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the time of a step by each way, on both kinds of maps."""
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (kind, rows) in zip(axes, rows_of_kind.items(), strict=True):
        measured = [row for row in rows if "seconds" in row][::-1]
        milliseconds = [1e3 * row["seconds"] for row in measured]
        colours = ["C0" if row["method"] == "graph-kd" else "0.7" for row in measured]
        bars = axis.barh([row["method"] for row in measured], milliseconds, color=colours)
        axis.bar_label(bars, [f"{value:.0f}" for value in milliseconds], padding=3)
        axis.set(xlabel="ms a step, all sensing points", title=f"Maps {KINDS[kind]}")
        axis.set_xlim(right=max(milliseconds) * 1.2)
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
