r"""The poster's five tables: train their cells, and draw tables and pictures of them.

    python examples/reproduce.py --table cifar100 --out runs/cifar100
    python examples/reproduce.py --table cifar100 --out runs/small --width 0.25 --classes 10 \
        --epochs 12 --first-epochs 5 --learning-rate 0.02 --seeds 0 1 2
    python examples/reproduce.py --render examples/results/tinyimagenet32_vgg.jsonl

A cell is a network trained by a method from a seed, by the functions of the script that shows its
data and networks; the ten other methods train in `train_baseline.py`. A cell is one line of
``OUT/records.jsonl``. A finished cell is not run again, and a killed run loses at most one epoch.
At the end the table is printed, and drawn as ``OUT/records.png``. ``--render OUT/records.jsonl``
does so at any time. A cell whose loss diverges is left out and named.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Literal

import cifar100_vgg
import common
import torch
from baselines import RECIPES
from common import Data, DivergedError
from tables import ROWS, TITLES, Table, markdown, picture
from train_baseline import Distillation
from tyro.conf import Fixed, Suppress

Method = Literal[
    "student", "soft-logits", "fitnet", "at", "fsp", "dml", "kd-svd", "kd-svdf", "ft", "ab", "rkd",
    "mhgd", "mhgd-tanh", "mhgd-scaled", "mhgd-own-heads", "mhgd-soft-logits",
    "mhgd-own-heads-soft-logits",
]  # fmt: skip
FORMS = ("mhgd-tanh", "mhgd-scaled", "mhgd-soft-logits")  # trained beside a table's methods


@dataclass(frozen=True)
class Settings(cifar100_vgg.Settings):
    """Settings of the cells; each is a flag."""

    out: Path = Path("runs/reproduce")  # folder of records, networks and picture
    data_name: str | None = None  # what records call the data, if it is not the table's
    table: tuple[Table, ...] = ("cifar100",)  # tables to run
    rows: tuple[str, ...] = ()  # only these rows, by their titles; else all
    methods: tuple[Method, ...] = ()  # only these; else the table's and forms with shared heads
    seeds: tuple[int, ...] = (0, 1, 2)  # a cell each
    teacher_seed: int | None = None  # one teacher, with its heads, for all seeds; None: one each
    render: tuple[Path, ...] = ()  # print and draw these files of records, and train nothing
    # Set for each cell, so no flags here.
    seed: Fixed[Suppress[int]] = 0
    method: Fixed[Suppress[tuple[cifar100_vgg.Method, ...]]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds:
            raise ValueError("`--seeds` must be at least one; got none.")
        titles = [row["row"] for row in ROWS if row["table"] in self.table]
        for title in self.rows:
            if title not in titles:
                raise ValueError(f"`--rows` must be some of {titles}; got {title!r}.")


def cells(settings: Settings) -> Iterator[tuple[dict[str, str], str, Settings]]:
    """Yield row, method and settings of each cell, those of a seed together."""
    for seed, table, row in product(settings.seeds, settings.table, ROWS):
        if row["table"] != table or (settings.rows and row["row"] not in settings.rows):
            continue
        published = [method for method in TITLES if method in row and method != "teacher"]
        methods = settings.methods or [*published, *(FORMS if table != "heads" else ())]
        heads = int(row.get("num_heads", settings.num_heads))
        data_name = settings.data_name or import_module(row["script"]).Settings.data_name
        of_cell = replace(settings, seed=seed, num_heads=heads, data_name=data_name)
        for method in ("teacher", *methods):
            # With the method, so that the settings are checked against it.
            yield row, method, replace(of_cell, method=(method,))


@lru_cache(maxsize=1)
def loaded(script: str, settings: Settings) -> Data:
    """Return the data of a script."""
    data: Data = import_module(script).load(settings)
    return data


def train_cell(row: dict[str, str], method: str, settings: Settings) -> None:
    """Train a cell, and before it what it needs, where that is not done."""
    script = import_module(row["script"])
    data = loaded(row["script"], replace(settings, seed=0, method=(), num_heads=1, data_name=None))
    alone = replace(settings, teacher_seed=None)
    seed = settings.seed if settings.teacher_seed is None else settings.teacher_seed
    of_teacher = replace(alone, seed=seed)
    teacher = script.new_network(row["of_teacher"], settings.width, data, of_teacher)
    if method not in ("student", "dml"):  # DML trains a teacher of its own
        script.train_alone("teacher", teacher, data, of_teacher)
    if method == "teacher":
        return
    width = settings.width * settings.student_width
    student = script.new_network(row["of_student"], width, data, settings)
    student_data = data.share(settings.student_share)
    if method == "student":
        script.train_alone("student", student, student_data, alone)
    elif method in RECIPES:
        Distillation(method, student, teacher, student_data, settings, script).train()
    else:
        heads = script.train_heads(teacher, student_data, of_teacher)
        script.train_student(method, student, teacher, heads, student_data, settings)


def main(settings: Settings) -> None:
    """Train every cell that is not done, and show the table."""
    for path in settings.render:
        show(path)
    if settings.render:
        return
    torch.backends.cudnn.benchmark = True
    file, diverged = settings.out / "records.jsonl", list[str]()
    for row, method, of_cell in [*cells(settings)]:  # an error comes before the training
        try:
            train_cell(row, method, of_cell)
        except DivergedError as error:  # noqa: PERF203 # the other cells go on
            name = f"{row['script']}, {row['row']}, {method}, seed {of_cell.seed}"
            diverged.append(f"{name}: {error}")
    if any("accuracy" in record for record in common.read_records(file)):
        show(file)
    if diverged:
        sys.exit("\n".join(["reproduce.py: cells without a result:", *diverged]))


def show(path: Path) -> None:
    """Print and draw a file of records."""
    records = common.read_records(path)
    if not any("accuracy" in record for record in records):
        raise ValueError(f"`{path}` must hold a measured network; it has none.")
    if common.RANK == 0:
        picture(records, path.with_suffix(".png"))
        print(f"{path}: accuracy after the last epoch, mean ± standard deviation (seeds)\n")
        print(markdown(records))


if __name__ == "__main__":
    common.command(main, Settings, __doc__)
