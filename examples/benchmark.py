r"""What the method costs: singular vectors, a whole step, growth over the batch.

    python examples/benchmark.py --out runs/benchmark
    python examples/benchmark.py --device cuda --out runs/benchmark_cuda

On two CPU cores the first takes some 15 minutes (``--part`` takes one or two of the three). Four
networks at full width (VGG16, VGG7, WRN-22-4, WRN-10-4) are first trained for ``--train-steps`` on
scikit-learn's digits at 32×32, or on CIFAR-100 with ``--data-dir``, so that the maps are those of
networks that have learnt; they are kept in ``--out``. All that is compared takes its turn in every
round, and the table gives medians and the median of the rounds' ratios. Left in ``--out``: a JSON
file a part (every number, versions, hardware), ``benchmark.md`` (the tables) and ``vectors.png``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from parts.augment import Normalize, batches
from parts.bench_growth import measure_growth
from parts.bench_step import measure_step
from parts.bench_tables import plot_vectors, tables
from parts.bench_vectors import Point, measure_vectors, small_gaps
from parts.config import check_above_zero, check_at_least, check_device, flag, parse, plain
from parts.data import ImageSet, load_cifar100
from parts.engine import nesterov
from parts.environment import environment
from parts.files import load_model, save_model, write_atomically, write_json
from parts.models import Network, build
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped] # it ships no types

from graph_kd import FeatureHooks

PAIRS = (("VGG16", "VGG7"), ("WRN-22-4", "WRN-10-4"))  # teacher, student
Part = Literal["vectors", "step", "growth"]


@dataclass(frozen=True)
class Config:
    """Settings of a run; each is a flag."""

    out: Path = flag(Path("runs/benchmark"), "folder of the results and of the networks")
    part: tuple[Part, ...] = flag(("vectors", "step", "growth"), "what to measure")
    data_dir: Path | None = flag(None, "CIFAR-100 to train on instead of digits")
    train_steps: int = flag(60, "steps that each network learns first")
    batch_size: int = flag(128, "images a step")
    width: float = flag(1.0, "factor on every channel count")
    repeats: int = flag(7, "rounds")
    samples: tuple[int, ...] = flag((256, 512, 1024, 2048, 4096, 8192), "batch sizes of growth")
    plain_up_to: int = flag(2048, "largest batch whose graphs are also held whole")
    threads: int | None = flag(None, "CPU threads of torch")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to run")

    def __post_init__(self) -> None:
        check_at_least(self, train_steps=1, batch_size=2, repeats=1, threads=1)
        check_above_zero(self, "width")
        check_device(self)


def digits() -> ImageSet:
    """Return scikit-learn's digits as 32×32 images of three channels."""
    pixels, labels = load_digits(return_X_y=True)
    images = rearrange(torch.from_numpy(pixels).float(), "n (h w) -> n 1 h w", h=8)
    images = F.interpolate(images * 15, size=(32, 32), mode="bilinear")
    images = repeat(images.to(torch.uint8), "n 1 h w -> n c h w", c=3)
    return ImageSet(images, torch.from_numpy(labels), tuple("0123456789"))


def trained(name: str, images: ImageSet, config: Config) -> Network:
    """Return a network after a few steps, from the run's folder if it is there."""
    torch.manual_seed(0)
    network = build(name, images.num_classes, config.width).to(config.device)
    about = {"network": name, "width": config.width, "classes": images.num_classes}
    about |= {
        "steps": config.train_steps,
        "batch": config.batch_size,
        "torch": str(torch.__version__),
    }
    path = config.out / f"{name}.pt"
    if path.exists():
        load_model(path, network, about, name=f"{name}.pt in --out")
        return network
    normalize, optimizer = Normalize(images), nesterov(list(network.parameters()), 0.02)
    generator, steps = torch.Generator().manual_seed(0), 0
    with tqdm(total=config.train_steps, desc=f"{name} learns", leave=False) as bar:
        while steps < config.train_steps:
            for batch, labels in batches(images, config.batch_size, generator):
                optimizer.zero_grad()
                F.cross_entropy(network(normalize(batch)), labels).backward()  # type: ignore[no-untyped-call] # torch's own has no types
                optimizer.step()
                bar.update()
                steps += 1
                if steps == config.train_steps:
                    break
    save_model(path, network, about)
    return network


def points_of(teacher: Network, student: Network, images: Tensor) -> list[Point]:
    """Return the maps of both networks at every sensing point."""
    maps = []
    for network in (teacher.eval(), student.train()):
        hooks = FeatureHooks(network, network.sensing_points)
        with torch.no_grad():
            network(images)
            maps.append(hooks.features)
        hooks.remove()
    return [
        Point(f"{t.shape[2] * t.shape[3]}×{t.shape[1]}", t, s) for t, s in zip(*maps, strict=True)
    ]


def run(config: Config) -> str:
    """Measure all parts, write the results after each, and return the tables."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.benchmark = True
    device = torch.device(config.device)
    image_set = digits() if config.data_dir is None else load_cifar100(config.data_dir)[0]
    image_set = image_set.to(device)
    images = Normalize(image_set)(image_set.images[: config.batch_size])
    networks = {
        name: trained(name, image_set, config)
        for pair in PAIRS
        for name in pair
        if {"vectors", "step"} & set(config.part)
    }
    texts = []
    for part in dict.fromkeys(config.part):
        result: dict[str, Any] = {"config": plain(config), "environment": environment(device)}
        if part == "vectors":
            points = [p for t, s in PAIRS for p in points_of(networks[t], networks[s], images)]
            result[part] = {
                "trained": measure_vectors(points, config.repeats, device),
                "small gaps": measure_vectors(small_gaps(points), config.repeats, device),
            }
            plot_vectors(config.out / "vectors.png", result)
        elif part == "step":
            result[part] = {
                f"{t} → {s}": measure_step(
                    networks[t], networks[s], image_set, config.batch_size, config.repeats
                )
                for t, s in PAIRS
            }
        else:
            result[part] = measure_growth(
                config.samples, config.plain_up_to, config.repeats, device
            )
        write_json(config.out / f"{part}.json", result)
        texts.append(tables(result))
        content = "\n".join(texts).encode()
        write_atomically(config.out / "benchmark.md", partial(_write, content))
    return "\n".join(texts)


def _write(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


def main() -> None:
    """Run the command line; what the user can mend ends in one line."""
    try:
        config = parse(Config, __doc__)
        text = run(config)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    print(text)
    print(f"Numbers and picture: {config.out}")


if __name__ == "__main__":
    main()
