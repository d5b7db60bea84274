"""The command line of the four scripts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from parts.baselines.recipes import RECIPES
from parts.config import check_seeds, flag, parse
from parts.distributed import end_all, is_main, num_processes, processes
from parts.methods import title_of
from parts.plots import plot_curves
from parts.runs import hold
from parts.settings import Experiment, Settings
from parts.workshop import Workshop

__all__ = ["main"]

Method = Literal[
    "student",
    "soft-logits",
    "fitnet",
    "at",
    "fsp",
    "dml",
    "kd-svd",
    "kd-svdf",
    "ft",
    "ab",
    "rkd",
    "mhgd",
    "mhgd-tanh",
    "mhgd-scaled",
    "mhgd-soft-logits",
    "mhgd-own-heads",
]


@dataclass(frozen=True)
class Config(Settings):
    """Settings of a run; each is a flag."""

    out: Path = flag(Path("runs/one"), "folder of the run; the same command goes on with it")
    method: tuple[Method, ...] = flag(("student", "mhgd"), "students to train")
    seed: int = flag(0, "seed of weights, order and augmentation")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seeds("seed", self.seed)


def main(experiment: Experiment, description: str | None) -> None:
    """Run the command line; what the user can mend ends in one line."""
    with processes():
        try:
            config = parse(Config, description)
            accuracies = run(experiment, config)
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            end_all(f"{Path(sys.argv[0]).name}: {error}")
        for name, accuracy in accuracies.items():
            print(f"{name:20} {accuracy:6.2f} %")
        print(f"Records, curves and networks: {config.out}")


def run(experiment: Experiment, config: Config) -> dict[str, float]:
    """Train the teacher and every student, and return their last accuracies, per cent."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.benchmark = True
    alone = [method for method in config.method if method in RECIPES]
    if alone and num_processes() > 1:
        raise ValueError(
            f"`--method` must be student or a form of MHGD among {num_processes()} processes; got "
            f"{alone[0]}. Run it without torchrun."
        )
    workshop = Workshop(experiment, config.with_(), config.seed, config.out)
    records = {}
    for name in ("teacher", *dict.fromkeys(config.method)):  # each once
        record = workshop.train(name)
        if record is None:
            raise ValueError(f"`--out` must be a folder of one process; {config.out} is in use.")
        records[experiment.teacher_name if name == "teacher" else title_of(name)] = record
    if is_main():
        with hold(config.out, wait=True):
            plot_curves(config.out / "curves.png", records)
    return {name: record["accuracy"] for name, record in records.items()}
