r"""What the method costs: singular vectors, a whole step, growth with the batch.

    python examples/benchmark.py --out runs/benchmark
    python examples/benchmark.py --device cuda --part step --out runs/benchmark_cuda

Some 15 minutes on two CPU cores. Four networks (VGG16, VGG7, WRN-22-4, WRN-10-4) first learn
scikit-learn's digits at 32×32, so that their maps are those of trained networks. What is compared
is measured once in every round; the tables give medians over the rounds, of times and of ratios.
``OUT/benchmark.jsonl`` holds a record a part, ``OUT/benchmark.png`` shows the singular vectors.

Axis letters: ``b`` sample, ``n`` position, ``c`` channel, ``k`` singular vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import common
import pandas as pd
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from matplotlib.figure import Figure
from networks import Network, build
from sklearn.datasets import load_digits
from torch import Tensor
from torch.optim import SGD
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer
from tqdm import tqdm  # type: ignore[import-untyped] # it ships no types

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss, SVDFeature
from graph_kd import align_singular_vectors as align

PAIRS = (("VGG16", "VGG7"), ("WRN-22-4", "WRN-10-4"))  # teacher, student
KINDS = {"trained": "of trained networks", "small gaps": "with gaps of 1.5 %"}
CHANNELS = (64, 128)  # of the two sensing points whose loss grows with the batch
Part = Literal["vectors", "step", "growth"]
Point = tuple[Tensor, Tensor]  # the maps ``b n c`` of teacher and student at one sensing point
Way = Callable[[Tensor, int], Tensor]  # from ``b n c`` and k to right singular vectors ``b k c``


@dataclass(frozen=True)
class Settings:
    """Settings of a run; each is a flag."""

    out: Path = Path("runs/benchmark")  # folder of the results
    part: tuple[Part, ...] = ("vectors", "step", "growth")  # what to measure
    train_steps: int = 60  # steps that each network learns first
    batch_size: int = 128  # images a step
    width: float = 1.0  # factor on every channel count
    repeats: int = 7  # rounds
    samples: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)  # batch sizes of growth
    plain_up_to: int = 2048  # largest batch whose graphs are also held whole
    threads: int | None = None  # CPU threads of torch
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to run

    def __post_init__(self) -> None:
        common.check(self)


def digits(settings: Settings) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits as standardised images ``b 3 32 32``, and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    small = rearrange(torch.from_numpy(pixels).float(), "b (h w) -> b 1 h w", h=8)
    large = F.interpolate((small - small.mean()) / small.std(), size=(32, 32), mode="bilinear")
    images = repeat(large, "b 1 h w -> b c h w", c=3)
    return images.to(settings.device), torch.from_numpy(labels).to(settings.device)


@cache
def trained_pairs(settings: Settings) -> list[tuple[Network, Network]]:
    """Return each pair of networks after a few steps."""
    images, labels = digits(settings)
    pairs = []
    for pair in PAIRS:
        torch.manual_seed(0)
        teacher, student = (build(name, 10, settings.width).to(settings.device) for name in pair)
        for network in (teacher, student):
            sgd = SGD(network.parameters(), 0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
            for _ in tqdm(range(settings.train_steps), f"{network.name} learns", leave=False):
                chosen = torch.randint(len(images), (settings.batch_size,))
                sgd.zero_grad()
                F.cross_entropy(network(images[chosen]), labels[chosen]).backward()
                sgd.step()
        pairs.append((teacher, student))
    return pairs


def seconds_of(tasks: Mapping[str, Callable[[], object]], repeats: int) -> pd.DataFrame:
    """Time each task once in every round, a line a round, after a round that warms up.

    What slows the machine for a while slows all tasks, so that their ratios hold.
    """
    rounds: list[dict[str, float]] = []
    for _ in tqdm(range(repeats + 1), "rounds", leave=False):
        rounds.append({})
        for name, task in tasks.items():
            started = timer()  # it waits for what the device has been given to do
            task()
            rounds[-1][name] = timer() - started
    return pd.DataFrame(rounds[1:])


def peak_bytes(task: Callable[[], object], device: str) -> int:
    """Return the most bytes of tensors that a task holds at a time beside those there before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        task()
        return int(torch.cuda.max_memory_allocated()) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        task()
    events = profiler.profiler.kineto_results.events()
    changes: list[int] = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(accumulate(changes, initial=0))


# Singular vectors


@torch.no_grad()
def points_of(teacher: Network, student: Network, images: Tensor) -> list[Point]:
    """Return the maps of both networks at every sensing point."""
    maps = []
    for network in (teacher.eval(), student.train()):
        with FeatureHooks(network, network.sensing_points) as hooks:
            network(images)
            maps.append([rearrange(m, "b c h w -> b (h w) c") for m in hooks.features])
    return list(zip(*maps, strict=True))


def small_gaps(like: Tensor) -> Tensor:
    """Return matrices of the same shape whose neighbouring singular values differ by 1.5 %."""
    b, n, c = like.shape
    values = 1.015 ** -torch.arange(min(n, c), dtype=torch.float64)
    random = (torch.randn(b, length, len(values), dtype=torch.float64) for length in (n, c))
    left, right = (torch.linalg.qr(matrix)[0] for matrix in random)
    matrices: Tensor = (left * values) @ right.mT
    return matrices.to(like)


def gram(maps: Tensor) -> Tensor:
    """Return the Gram matrix of the shorter side: the least that most ways need."""
    return maps.mT @ maps if maps.shape[1] >= maps.shape[2] else maps @ maps.mT


def gram_eigh(maps: Tensor, k: int) -> Tensor:
    """Return right singular vectors from eigenvectors of the Gram matrix."""
    _, basis = torch.linalg.eigh(gram(maps))
    columns: Tensor = basis[..., -k:].flip(-1)
    if maps.shape[1] < maps.shape[2]:
        columns = F.normalize(maps.mT @ columns, dim=1)
    return rearrange(columns, "b c k -> b k c")


WAYS: dict[str, Way] = {
    "graph-kd": lambda maps, k: SVDFeature(k)(maps),
    "Gram + eigh": gram_eigh,
    "linalg.svd": lambda maps, k: torch.linalg.svd(maps, full_matrices=False)[2][:, :k],
}


def vectors(way: Way, teacher: Tensor, student: Tensor) -> Point:
    """Return the student's aligned vector and its gradient.

    This is what training needs at a sensing point: one vector of the teacher without gradient, four
    candidates of the student's, and the gradient of the one that is aligned with the teacher's.
    """
    student = student.detach().requires_grad_()
    with torch.no_grad():
        target = way(teacher, 1)
    aligned = align(way(student, min(4, *student.shape[1:])), target)
    (gradient,) = torch.autograd.grad(aligned, student, target)
    return aligned.detach(), gradient


def bare_gram(teacher: Tensor, student: Tensor) -> None:
    """Take the Gram matrices alone, with backward."""
    student = student.detach().requires_grad_()
    gram(teacher)
    matrix = gram(student)
    torch.autograd.grad(matrix, student, matrix.detach())


def errors(way: Way, points: list[Point]) -> dict[str, float]:
    """Return the largest errors over all samples, against float64.

    1 - |cos| of the vectors, and the relative error of their gradients.
    """
    worst = {"vector": 0.0, "gradient": 0.0}
    for teacher, student in points:
        vector, gradient = vectors(way, teacher, student)
        true, true_gradient = vectors(WAYS["graph-kd"], teacher.double(), student.double())
        difference = (gradient - true_gradient).flatten(1).norm(dim=1)
        found = {
            "vector": 1 - (vector * true).sum(dim=-1).abs(),
            "gradient": difference / true_gradient.flatten(1).norm(dim=1),
        }
        for name, values in found.items():
            worst[name] = max(worst[name], float(values.nan_to_num(math.inf).max()))
    return worst


def measure_vectors(points: list[Point], kind: str, settings: Settings) -> list[dict[str, Any]]:
    """Return a row a way: seconds over all sensing points, peak memory, and errors.

    Errors only for maps with known gaps: others have vectors that rounding alone decides.
    """
    steps: dict[str, Any] = {"bare Gram": bare_gram}
    steps |= {name: partial(vectors, way) for name, way in WAYS.items()}
    tasks = {
        name: partial(lambda step: [step(*point) for point in points], step)
        for name, step in steps.items()
    }
    seconds = seconds_of(tasks, settings.repeats)
    rows = []
    for name, task in tasks.items():
        row = {"method": name, "seconds": seconds[name].median()}
        row["ours / this"] = (seconds["graph-kd"] / seconds[name]).median()
        row["peak_bytes"] = peak_bytes(task, settings.device)
        known = name in WAYS and kind == "small gaps"
        rows.append(row | (errors(WAYS[name], points) if known else {}))
    return rows


def plot(rows_of_kind: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the time of a step by each way, on both kinds of maps."""
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (kind, rows) in zip(axes, rows_of_kind.items(), strict=True):
        milliseconds = {row["method"]: 1e3 * row["seconds"] for row in rows[::-1]}
        colours = ["C0" if name == "graph-kd" else "0.7" for name in milliseconds]
        bars = axis.barh([*milliseconds], [*milliseconds.values()], color=colours)
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.set(xlabel="ms a step, all sensing points", title=f"Maps {KINDS[kind]}")
        axis.spines[["top", "right"]].set_visible(False)
    common.save_figure(figure, path)


# A whole step, and growth with the batch


def measure_step(
    teacher: Network, student: Network, images: Tensor, labels: Tensor, settings: Settings
) -> dict[str, Any]:
    """Return seconds of a step and of its parts.

    The floor is the teacher's forward pass, the student's, and two backward passes. "Complete" is
    the paper's form, with shared heads.
    """
    teacher.eval().requires_grad_(False)
    params, channels = list(student.train().parameters()), student.channels
    teacher_hooks = FeatureHooks(teacher, teacher.sensing_points)
    student_hooks = FeatureHooks(student, student.sensing_points)

    def student_alone() -> None:
        torch.autograd.grad(F.cross_entropy(student(images), labels), params)

    def floor() -> None:
        teacher(images)
        task = F.cross_entropy(student(images), labels)
        torch.autograd.grad(task, params, retain_graph=True)
        torch.autograd.grad(task, params)

    def complete(transfer: GraphTransferLoss) -> Callable[[], None]:
        learning = [*params, *transfer.to(settings.device).student_heads.parameters()]
        sgd = SGD(learning, 1e-6, momentum=0.9, nesterov=True, weight_decay=5e-4)
        optimizer = GatedGradClip(sgd)

        def step() -> None:
            teacher(images)
            task = F.cross_entropy(student(images), labels)
            graphs = transfer(student_hooks.features, teacher_hooks.features)
            optimizer.zero_grad()
            optimizer.backward(task, graphs)
            optimizer.step()

        return step

    tasks = {
        "student alone": student_alone,
        "floor": floor,
        "complete": complete(GraphTransferLoss(channels)),
        "own heads": complete(GraphTransferLoss(channels, student_channels=channels)),
    }
    seconds = seconds_of({"teacher forward": lambda: teacher(images), **tasks}, settings.repeats)
    peaks = {name: peak_bytes(task, settings.device) for name, task in tasks.items()}
    student_hooks.remove()
    teacher_hooks.remove()
    return {
        "seconds": seconds.median().to_dict(),
        **{
            f"{step} / {other}": (seconds[step] / seconds[other]).median()
            for step in ("complete", "own heads")
            for other in ("floor", "student alone")
        },
        "peak_bytes": peaks,
    }


def measure_growth(samples: int, settings: Settings) -> dict[str, Any]:
    """Return seconds and bytes of the loss and its gradient: by default, and with whole graphs."""
    torch.manual_seed(0)
    student, teacher = (
        [torch.randn(samples, c, device=settings.device) for c in CHANNELS] for _ in range(2)
    )
    inputs = [features.requires_grad_() for features in student]

    def loss_gradient(loss: GraphTransferLoss) -> None:
        torch.autograd.grad(loss(inputs, teacher), inputs)

    forms = {"default": None} | ({"plain": samples} if samples <= settings.plain_up_to else {})
    tasks = {
        name: partial(loss_gradient, GraphTransferLoss(CHANNELS, block_rows=rows).to(student[0]))
        for name, rows in forms.items()
    }
    row: dict[str, Any] = {"samples": samples}
    for name, seconds in seconds_of(tasks, settings.repeats).median().items():
        row[f"{name}_seconds"] = seconds
        row[f"{name}_bytes"] = peak_bytes(tasks[name], settings.device)
    return row


# Tables


def tables(record: Mapping[str, Any]) -> str:
    """Return the part of a record as Markdown; seconds as milliseconds, bytes as MiB."""
    made, rounds = record["versions"], record["settings"]["repeats"]
    where = f"{made['hardware']}, torch {made['torch']}, commit {made['commit']}"
    found = {}
    for maps, rows in record.get("vectors", {}).items():
        found[f"Singular vectors, maps {KINDS[maps]}"] = pd.DataFrame(rows).set_index("method")
    if "step" in record:
        steps = pd.json_normalize([*record["step"].values()])
        found["A step"] = steps.set_axis([*record["step"]])
    if "growth" in record:
        found["Growth"] = pd.DataFrame(record["growth"]).set_index("samples")
    text = [f"{where}, medians of {rounds} rounds."]
    for title, lines in found.items():
        shown = lines.apply(cells).rename(columns=renamed)
        shown = shown.T if title == "A step" else shown
        text += [f"{title}:", shown.to_markdown(disable_numparse=True)]
    return "\n\n".join(text) + "\n"


def cells(column: pd.Series[float]) -> pd.Series[str]:
    """Return a column as text: three digits of each number, a dash where none was measured."""
    scale = 1e3 if "seconds" in column.name else 2**-20 if "bytes" in column.name else 1
    digits = (scale * column).map(lambda x: f"{x:.0f}" if 1000 <= x < math.inf else f"{x:.3g}")
    return digits.where(column.notna(), "–")


def renamed(name: str) -> str:
    """Return the name of a column as tables show it; those of nested numbers have a point."""
    name = ", ".join(name.split(".")[::-1])
    named = {"ours / this": "graph-kd / this", "vector": "1 - cos", "gradient": "gradient error"}
    return named.get(name, name.replace("seconds", "ms").replace("_", " ").replace("bytes", "MiB"))


def measure(part: Part, settings: Settings) -> Any:
    """Return the measurements of a part."""
    if part == "growth":
        return [measure_growth(samples, settings) for samples in settings.samples]
    pairs = trained_pairs(settings)
    images, labels = (part[: settings.batch_size] for part in digits(settings))
    if part == "step":
        return {
            f"{pair[0].name} → {pair[1].name}": measure_step(*pair, images, labels, settings)
            for pair in pairs
        }
    points = [point for pair in pairs for point in points_of(*pair, images)]
    kinds = {"trained": points, "small gaps": [(small_gaps(t), small_gaps(s)) for t, s in points]}
    return {kind: measure_vectors(maps, kind, settings) for kind, maps in kinds.items()}


def main(settings: Settings) -> None:
    """Measure every part, and write and print its record."""
    torch.backends.cudnn.benchmark = True
    file = settings.out / "benchmark.jsonl"
    about = {name: value for name, value in asdict(settings).items() if name != "out"}
    for part in dict.fromkeys(settings.part):
        record: dict[str, Any] = {part: measure(part, settings), "settings": about}
        record["versions"] = common.versions(settings.device)
        kept = [other for other in common.read_records(file, []) if part not in other]
        common.write_records(file, [*kept, record])
        if part == "vectors":
            plot(record[part], file.with_suffix(".png"))
        print(tables(record))
    print(f"Numbers: {file}")


if __name__ == "__main__":
    common.command(main, Settings, __doc__)
