r"""The poster's tables: run their cells, and show what came out beside what was published.

    python examples/reproduce.py --table cifar100 --out runs/cifar100
    python examples/reproduce.py --table cifar100 --out runs/small --width 0.25 --classes 10 \
        --epochs 12 --first-epochs 5 --learning-rate 0.02 --seeds 0 1 2

A cell is a network trained by a method from a seed. What is done is not done again, what was
interrupted goes on, and several of these commands may run side by side in one ``--out``: each
takes cells that no other holds. ``--methods`` takes some of the table's methods, or others; by
default MHGD is there in each of its forms. After every cell its tables are written anew, of all
that is done in ``--out`` by this or another command of the same settings: ``TABLE.md``,
``TABLE.json``, ``TABLE.png`` (bars beside the published numbers) and ``TABLE_epochs.png``, with a
bound, gate, split, share or number of heads that is not the default in their names. A cell whose
loss diverges is left out, with those that its teacher would have taught, and told at the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cifar100_vgg
import cifar100_wrn
import tinyimagenet_vgg
import tinyimagenet_wrn
import torch
from parts.config import check_seeds, flag, parse
from parts.engine import DivergedError
from parts.methods import METHODS, MHGD
from parts.models import build
from parts.poster import PUBLISHED, Row, Table
from parts.results import Cell, shares_of_time, write_results
from parts.script import Method
from parts.settings import Settings
from parts.workshop import Workshop

WAIT = 5.0  # seconds until cells that others hold are looked at again

EXPERIMENTS = {
    "cifar100_vgg": cifar100_vgg.EXPERIMENT,
    "cifar100_wrn": cifar100_wrn.EXPERIMENT,
    "tinyimagenet_vgg": tinyimagenet_vgg.EXPERIMENT,
    "tinyimagenet_wrn": tinyimagenet_wrn.EXPERIMENT,
    **{
        name: cifar100_wrn.EXPERIMENT.with_student(name, partial(build, name))
        for name in ("VGG-modified", "MobileNet", "ResNet-small")
    },
    "ResNet8": replace(
        cifar100_wrn.EXPERIMENT.with_student("ResNet8", partial(build, "ResNet8")),
        teacher_name="ResNet32",
        teacher=partial(build, "ResNet32"),
    ),
}


@dataclass(frozen=True)
class Config(Settings):
    """Settings of the cells; each is a flag."""

    table: tuple[Table, ...] = flag(("cifar100",), "tables to run")
    out: Path = flag(Path("runs/reproduce"), "folder of cells and tables")
    seeds: tuple[int, ...] = flag((0, 1, 2), "one cell each")
    rows: tuple[str, ...] | None = flag(None, "train only these rows")
    methods: tuple[Method, ...] | None = flag(None, "train these instead of the table's")
    render_only: bool = flag(False, "write the tables of what is there, train nothing")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seeds("seeds", *self.seeds)


def methods_of(table: Table, row: Row, config: Config) -> list[str]:
    """Return the methods of a row to train: by default the table's, and MHGD in every form."""
    own = [method for method in row.published if method != "teacher"]
    if table == "heads":
        if not set(config.methods or own) <= {"student", "mhgd"}:
            raise ValueError(
                f"`--methods` of the table 'heads' must be some of student, mhgd; got "
                f"{' '.join(config.methods or own)}."
            )
        return [m for m in own if config.methods is None or m in config.methods]
    return list(dict.fromkeys([*own, *MHGD] if config.methods is None else config.methods))


def check_rows(tables: tuple[Table, ...], config: Config) -> None:
    """Refuse a row that none of the tables has."""
    titles = dict.fromkeys(row.title for table in tables for row in PUBLISHED[table])
    if unknown := [row for row in config.rows or () if row not in titles]:
        raise ValueError(
            f"`--rows` must be some of {', '.join(map(repr, titles))}; got {unknown[0]!r}."
        )


def cells_to_train(table: Table, config: Config) -> Iterator[Cell]:
    """Return the cells that were asked for, those of a seed together."""
    rows = [row for row in PUBLISHED[table] if config.rows is None or row.title in config.rows]
    for seed in dict.fromkeys(config.seeds):
        for row in rows:
            for method in ("teacher", *methods_of(table, row, config)):
                yield Cell(row, method, seed, workshop_of(row, seed, config))


def cells_there(table: Table, config: Config) -> Iterator[Cell]:
    """Return every cell of a table that ``--out`` may hold, whoever has trained it."""
    for row in PUBLISHED[table]:
        folder = workshop_of(row, 0, config).root.parent
        names = (path.name.removeprefix("seed-") for path in folder.glob("seed-*"))
        seeds = sorted(int(name) for name in names if name.isdecimal())
        methods = row.published if table == "heads" else ("teacher", *METHODS)
        for seed in seeds:
            for method in methods:
                yield Cell(row, method, seed, workshop_of(row, seed, config))


def workshop_of(row: Row, seed: int, config: Config) -> Workshop:
    """Return where the networks of a row and a seed are trained."""
    experiment = EXPERIMENTS[row.experiment]
    data_name = config.data_name or experiment.data_name
    folder = f"{data_name}/{experiment.teacher_name}/seed-{seed}"
    settings = config.with_(num_heads=row.num_heads or config.num_heads)
    return Workshop(experiment, settings, seed, config.out / folder)


def run(config: Config) -> tuple[str, list[str]]:
    """Train every cell that is not done and write the tables after each.

    Returns:
        The tables, and what is to be said of cells that diverged.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.benchmark = True
    tables = tuple(dict.fromkeys(config.table))
    check_rows(tables, config)
    of_table = {table: list(cells_to_train(table, config)) for table in tables}
    waiting = [] if config.render_only else [c for cells in of_table.values() for c in cells]
    diverged: dict[str, None] = {}  # in order, each once
    without_teacher: set[Path] = set()
    while waiting:
        held = []
        for cell in waiting:
            teacher = cell.workshop.folder("teacher")
            needed = (cell.method, *cell.workshop.needs(cell.method))
            if teacher in without_teacher and "teacher" in needed:
                continue
            was_done = cell.record() is not None
            try:
                record = cell.workshop.train(cell.method)
            except DivergedError as error:
                diverged[f"{cell.row.title}, {cell.method}, seed {cell.seed}: {error}"] = None
                if cell.method == "teacher":
                    without_teacher.add(teacher)
                continue
            if record is None:
                held.append(cell)
            elif not was_done:
                for table in (t for t in tables if cell in of_table[t]):
                    write_table(table, config)
        if len(held) == len(waiting):
            time.sleep(WAIT)
        waiting = held
    return "\n".join(write_table(table, config) for table in tables), list(diverged)


def write_table(table: Table, config: Config) -> str:
    """Write the results of a table, and return them as Markdown, with the shares of the time."""
    cells = list(cells_there(table, config))
    marks = workshop_of(PUBLISHED[table][0], 0, config).marks("mhgd")
    if table == "heads":
        marks = [mark for mark in marks if not mark.startswith("num_heads=")]
    name = ",".join([table, *marks])
    text = write_results(config.out, name, PUBLISHED[table], cells)
    return f"{text}\n{shares_of_time(cells)}\n"


def main() -> None:
    """Run the command line; what the user can mend ends in one line."""
    try:
        config = parse(Config, __doc__)
        text, diverged = run(config)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    print(text)
    print(f"Tables, numbers and pictures: {config.out}")
    if diverged:
        sys.exit("\n".join([f"{Path(sys.argv[0]).name}: cells without a result:", *diverged]))


if __name__ == "__main__":
    main()
