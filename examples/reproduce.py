r"""The poster's tables: run their cells, and show what came out beside what was published.

    python examples/reproduce.py --table cifar100 --out runs/cifar100
    python examples/reproduce.py --table cifar100 --out runs/small --width 0.25 --classes 10 \
        --epochs 12 --first-epochs 5 --learning-rate 0.02 --seeds 0 1 2

A cell is a network trained by a method from a seed. What is done is not done again, what was
interrupted goes on, and several of these commands may run side by side in one ``--out``: each
takes cells that no other holds. ``--methods`` takes some of the table's columns, or others; by
default MHGD is there in each of its forms. After every cell the tables are written anew, of all
that is done in ``--out``: ``TABLE.md``, ``TABLE.json``, ``TABLE.png`` (bars beside the published
numbers) and ``TABLE_epochs.png``, with the settings that are not the default in their names.
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
from parts.config import flag, parse
from parts.models import build
from parts.poster import PUBLISHED, Row, Table
from parts.results import Cell, write_results
from parts.script import Method
from parts.settings import Settings
from parts.workshop import Workshop

ALL_FORMS = ("mhgd", "mhgd-tanh", "mhgd-scaled", "mhgd-soft-logits")
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
    rows: tuple[str, ...] | None = flag(None, "only these rows")
    methods: tuple[Method, ...] | None = flag(None, "instead of the table's methods")
    render_only: bool = flag(False, "write the tables of what is there, train nothing")


def methods_of(table: Table, row: Row, config: Config) -> list[str]:
    """Return the columns of a row that are trained: by default the table's, MHGD in every form."""
    if config.methods is not None:
        return list(dict.fromkeys(config.methods))
    own = [method for method in row.published if method != "teacher"]
    if table == "heads":
        return own
    return [*own, *(form for form in ALL_FORMS if form not in own)]


def cells_of(table: Table, config: Config) -> Iterator[Cell]:
    """Return the cells of a table, those of a seed together."""
    rows = [row for row in PUBLISHED[table] if config.rows is None or row.title in config.rows]
    if not rows:
        titles = ", ".join(repr(row.title) for row in PUBLISHED[table])
        raise ValueError(f"`--rows` must be some of {titles}; got {config.rows}.")
    for seed in config.seeds:
        for row in rows:
            experiment = EXPERIMENTS[row.experiment]
            data_name = config.data_name or experiment.data_name
            folder = f"{data_name}/{experiment.teacher_name}/seed-{seed}"
            settings = config.with_(num_heads=row.num_heads or config.num_heads)
            workshop = Workshop(experiment, settings, seed, config.out / folder)
            for method in ("teacher", *methods_of(table, row, config)):
                yield Cell(row, method, seed, workshop)


def run(config: Config) -> str:
    """Train every cell that is not done, write the tables after each, and return them."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.benchmark = True
    tables = {table: list(cells_of(table, config)) for table in dict.fromkeys(config.table)}
    waiting = [] if config.render_only else [c for cells in tables.values() for c in cells]
    while waiting:
        held = []
        for cell in waiting:
            if cell.record() is not None:
                continue
            if cell.workshop.train(cell.method) is None:
                held.append(cell)
                continue
            for table in (table for table, cells in tables.items() if cell in cells):
                write_results(config.out, table, tables[table])
        if len(held) == len(waiting):
            time.sleep(WAIT)
        waiting = held
    return "\n".join(write_results(config.out, table, cells) for table, cells in tables.items())


def main() -> None:
    """Run the command line; what the user can mend ends in one line."""
    try:
        config = parse(Config, __doc__)
        text = run(config)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    print(text)
    print(f"Tables, numbers and pictures: {config.out}")


if __name__ == "__main__":
    main()
