r"""What the method costs: singular vectors, a whole step, growth over the batch.

    python examples/benchmark.py --out runs/benchmark
    python examples/benchmark.py --device cuda --part step --out runs/benchmark_cuda

Some 15 minutes on two CPU cores. Four networks (VGG16, VGG7, WRN-22-4, WRN-10-4) first learn
scikit-learn's digits at 32×32, so that the maps are those of trained networks. All that is compared
takes its turn in every round; the tables give medians, and the median of the rounds' ratios.
``OUT/benchmark.jsonl`` holds a record a part, ``OUT/benchmark.png`` the singular vectors.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import bench_vectors
import common
import pandas as pd
import torch
import torch.nn.functional as F
from bench_vectors import KINDS, median_ratio, paired_seconds, peak_bytes
from common import Data, ImageSet
from einops import rearrange, repeat
from networks import Network, build
from sklearn.datasets import load_digits
from torch import Tensor
from torch.optim import SGD
from tqdm import tqdm  # type: ignore[import-untyped] # it ships no types

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss

PAIRS = (("VGG16", "VGG7"), ("WRN-22-4", "WRN-10-4"))  # teacher, student
CHANNELS = (64, 128)  # of the pair whose loss grows with the batch
Part = Literal["vectors", "step", "growth"]
Tasks = Mapping[str, Callable[[], object]]


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
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to run

    def __post_init__(self) -> None:
        for name, least in {"train_steps": 1, "batch_size": 2, "repeats": 1, "threads": 1}.items():
            if (got := getattr(self, name)) is not None and got < least:
                raise ValueError(f"`--{name.replace('_', '-')}` must be ≥ {least}; got {got}.")


def digits(settings: Settings) -> Data:
    """Return scikit-learn's digits as 32×32 images of three channels, on the device."""
    pixels, labels = load_digits(return_X_y=True)
    images = rearrange(torch.from_numpy(pixels).float(), "n (h w) -> n 1 h w", h=8)
    images = F.interpolate(images * 15, size=(32, 32), mode="bilinear")
    images = repeat(images.to(torch.uint8), "n 1 h w -> n c h w", c=3)
    mean, std = (part.to(settings.device) for part in common.moments(images))
    train = ImageSet(images.to(settings.device), torch.from_numpy(labels).to(settings.device))
    return Data(train, train, 10, settings.batch_size, 0, mean, std)


def trained(name: str, data: Data, settings: Settings) -> Network:
    """Return a network after a few steps."""
    torch.manual_seed(0)
    network = build(name, data.classes, settings.width).to(settings.device)
    optimizer = SGD(network.parameters(), 0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    stream = endless(data)
    for _ in tqdm(range(settings.train_steps), f"{name} learns", leave=False):
        images, labels = next(stream)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(network(images), labels))
        optimizer.step()
    return network


def endless(data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches as training takes them."""
    order = torch.Generator().manual_seed(0)
    while True:
        yield from data.batches(order)


def measure_step(teacher: Network, student: Network, data: Data, settings: Settings) -> Any:
    """Return seconds of a step and of its parts.

    The floor is the teacher's forward pass, the student's, and two backward passes.
    """
    stream = endless(data)
    images, labels = next(stream)
    teacher.eval().requires_grad_(False)
    params = list(student.train().parameters())
    of_teacher = FeatureHooks(teacher, teacher.sensing_points)
    of_student = FeatureHooks(student, student.sensing_points)
    transfer = GraphTransferLoss(student.channels).to(settings.device)
    optimizer = GatedGradClip(SGD(params, 1e-6, momentum=0.9, nesterov=True, weight_decay=5e-4))

    def task_loss() -> Tensor:
        return F.cross_entropy(student(images), labels)

    def student_alone() -> None:
        torch.autograd.grad(task_loss(), params)

    def floor() -> None:
        teacher(images)
        task = task_loss()
        torch.autograd.grad(task, params, retain_graph=True)
        torch.autograd.grad(task, params)

    def complete() -> None:
        teacher(images)
        task = task_loss()
        graphs = transfer(of_student.features, of_teacher.features)
        optimizer.zero_grad()
        optimizer.backward(task, graphs)
        optimizer.step()

    tasks: Tasks = {
        "input pipeline": lambda: next(stream),
        "student alone": student_alone,
        "teacher forward": lambda: teacher(images),
        "floor": floor,
        "complete": complete,
        "optimizer step": optimizer.step,
    }
    seconds = paired_seconds(tasks, settings.repeats, settings.device)
    ratios = [("complete", "floor"), ("complete", "student alone")]
    ratios += [("input pipeline", "student alone")]
    peaks = {name: peak_bytes(tasks[name], settings.device) for name in ("floor", "complete")}
    of_student.remove()
    of_teacher.remove()
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        **{f"{a} / {b}": median_ratio(seconds[a], seconds[b]) for a, b in ratios},
        "peak_bytes": peaks,
    }


def measure_growth(settings: Settings) -> list[dict[str, Any]]:
    """Return a row a batch size: the default (blocks of rows) and whole graphs, with backward."""
    rows = []
    for size in settings.samples:
        forms = {"blocks": max(1, min(size // 4, 1024**2 // size)), "default": None}
        forms |= {"plain": size} if size <= settings.plain_up_to else {}
        draw = torch.Generator().manual_seed(0)
        student, teacher = (
            [torch.randn(size, c, generator=draw).to(settings.device) for c in CHANNELS]
            for _ in range(2)
        )
        tasks = {}
        for name, block_rows in forms.items():
            loss = GraphTransferLoss(CHANNELS, block_rows=block_rows).to(settings.device)
            tasks[name] = partial(loss_gradient, loss, student, teacher)
        seconds = paired_seconds(tasks, settings.repeats, settings.device)
        row: dict[str, Any] = {"samples": size, "block_rows": forms["blocks"]}
        for name, task in tasks.items():
            row[f"{name}_seconds"] = statistics.median(seconds[name])
            row[f"{name}_bytes"] = peak_bytes(task, settings.device)
        if "plain" in seconds:
            row["blocks / plain"] = median_ratio(seconds["blocks"], seconds["plain"])
        rows.append(row)
    return rows


def loss_gradient(loss: GraphTransferLoss, student: list[Tensor], teacher: list[Tensor]) -> None:
    """Compute a loss and its gradient."""
    inputs = [features.detach().requires_grad_() for features in student]
    torch.autograd.grad(loss(inputs, teacher), inputs)


def tables(record: Mapping[str, Any]) -> str:
    """Return the part of a record as Markdown; seconds as milliseconds, bytes as MiB."""
    made, rounds = record["versions"], record["settings"]["repeats"]
    where = f"{made['hardware']}, torch {made['torch']}, commit {made['commit']}"
    found = {}
    for maps, rows in record.get("vectors", {}).items():
        found[f"Singular vectors, maps {KINDS[maps]}"] = pd.DataFrame(rows).set_index("method")
    if "step" in record:
        pairs = pd.DataFrame({pair: flat(values) for pair, values in record["step"].items()}).T
        found["A step"] = pairs
    if "growth" in record:
        found["Growth"] = pd.DataFrame(record["growth"]).set_index("samples")
    text = [f"{where}, medians of {rounds} rounds."]
    for title, lines in found.items():
        shown = lines.drop(columns="seconds_of_points", errors="ignore")
        for name in shown:
            if "seconds" in name:
                shown[name] *= 1e3
            elif "bytes" in name:
                shown[name] /= 2**20
        shown = shown.map(text_of).rename(columns=lambda name: renamed(str(name)))
        shown = shown.T if title == "A step" else shown
        text += [f"{title}:", shown.to_markdown(disable_numparse=True)]
    return "\n\n".join(text) + "\n"


def text_of(value: Any) -> str:
    """Return a cell: three digits of a number, the first words of an error."""
    if isinstance(value, str):
        return value.split(":")[0]
    if value != value:  # NaN: not measured
        return "–"
    return f"{value:.0f}" if 1000 <= value < math.inf else f"{value:.3g}"


def renamed(name: str) -> str:
    """Return the name of a column as tables show it."""
    named = {"ours / this": "graph-kd / this", "vector": "1 - cos", "gradient": "gradient error"}
    return named.get(name, name.replace("seconds", "ms").replace("_", " ").replace("bytes", "MiB"))


def flat(values: Mapping[str, Any]) -> dict[str, float]:
    """Return nested numbers under joined names."""
    parts: dict[str, float] = {}
    for name, value in values.items():
        nested = value.items() if isinstance(value, dict) else [("", value)]
        parts |= {f"{inner}, {name}" if inner else name: number for inner, number in nested}
    return parts


def main(settings: Settings) -> None:
    """Measure every part, and write and print its record."""
    torch.backends.cudnn.benchmark = True
    file = settings.out / "benchmark.jsonl"
    data = digits(settings)
    pairs = {}
    if {"vectors", "step"} & set(settings.part):
        pairs = {(t, s): (trained(t, data, settings), trained(s, data, settings)) for t, s in PAIRS}
    for part in dict.fromkeys(settings.part):
        about = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()}
        record: dict[str, Any] = {"settings": about, "versions": common.versions(settings.device)}
        if part == "vectors":
            images = data.normalize(data.train.images[: settings.batch_size])
            points = [p for pair in pairs.values() for p in bench_vectors.points_of(*pair, images)]
            record[part] = bench_vectors.measure(points, settings)
        elif part == "step":
            record[part] = {
                " → ".join(names): measure_step(*pair, data, settings)
                for names, pair in pairs.items()
            }
        else:
            record[part] = measure_growth(settings)
        kept = [other for other in common.read_records(file) if part not in other]
        common.write_records(file, [*kept, record])
        if part == "vectors":
            bench_vectors.plot(record[part], file.with_suffix(".png"))
        print(tables(record))
    print(f"Numbers: {file}")


if __name__ == "__main__":
    common.command(main, Settings, __doc__)
