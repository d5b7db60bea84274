"""The tables of `reproduce.py`: mean ± standard deviation beside what was published."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from parts.files import write_atomically, write_json
from parts.methods import title_of
from parts.plots import save
from parts.poster import Row
from parts.workshop import Workshop

__all__ = ["Cell", "write_results"]

NOT_TOLD = ("seed", "method", "teacher", "student", "gate", "images")  # by the line of settings


@dataclass(frozen=True)
class Cell:
    """A network of a table: a row's pair, trained by a method from a seed."""

    row: Row
    method: str
    seed: int
    workshop: Workshop

    def record(self) -> dict[str, Any] | None:
        """Return its record, if it is finished and of these settings."""
        path = self.workshop.folder(self.method) / "record.json"
        if not path.exists():
            return None
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not record["finished"] or record["about"] != self.workshop.about(self.method):
            return None  # `Workshop.train` says why
        return record


def write_results(out: Path, table: str, cells: Sequence[Cell]) -> str:
    """Write Markdown, JSON and pictures of all finished cells of a table; return the Markdown."""
    done: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        if (record := cell.record()) is not None:
            done.setdefault((cell.row.title, cell.method), []).append(record)
    rows = list(dict.fromkeys(cell.row.title for cell in cells))
    methods = list(dict.fromkeys(cell.method for cell in cells))
    published = {(c.row.title, m): a for c in cells for m, a in c.row.published.items()}
    numbers = {key: _summary(records) for key, records in done.items()}
    name = ",".join([table, *_changed(cells)])
    text = _markdown(table, rows, methods, numbers, published, done)
    write_json(
        out / f"{name}.json",
        {
            "table": table,
            "settings": _settings(done),
            "environments": _environments(done),
            "cells": [
                {"row": row, "method": method, **summary, "published": published.get((row, method))}
                for (row, method), summary in numbers.items()
            ],
        },
    )
    write_atomically(out / f"{name}.md", lambda file: file.write(text.encode()))
    if numbers:
        save(_bars(rows, methods, numbers, published), out / f"{name}.png")
        save(_epochs(rows, done), out / f"{name}_epochs.png")
    return text


def _changed(cells: Sequence[Cell]) -> list[str]:
    """Return what tells this table from another one in the same folder."""
    marks = cells[0].workshop.folder("mhgd").name.split(",")[1:]
    return [mark for mark in marks if not mark.startswith("num_heads")]


def _summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return accuracies after the last epoch, their mean and standard deviation (of a sample)."""
    accuracies = [record["accuracy"] for record in records]
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    return {
        "mean": round(statistics.mean(accuracies), 2),
        "sd": None if spread is None else round(spread, 2),
        "n": len(accuracies),
        "seeds": [record["about"]["seed"] for record in records],
        "accuracies": accuracies,
    }


def _settings(done: dict[Any, list[dict[str, Any]]]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for records in done.values():
        for record in records:
            settings |= record["about"]
    return {key: value for key, value in settings.items() if key not in NOT_TOLD}


def _environments(done: dict[Any, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for records in done.values():
        for record in records:
            for environment in (record["environment"], *record.get("went_on_with", ())):
                if environment not in found:
                    found.append(environment)
    return found


def _markdown(
    table: str,
    rows: list[str],
    methods: list[str],
    numbers: dict[tuple[str, str], dict[str, Any]],
    published: dict[tuple[str, str], float],
    done: dict[tuple[str, str], list[dict[str, Any]]],
) -> str:
    """A line a method; of each row of the poster what was measured, and what was published."""
    head = ["method", *(f"{row}{part}" for row in rows for part in (", measured", ", published"))]
    lines = [head, ["---"] * len(head)]
    for method in methods:
        line = [title_of(method)]
        for row in rows:
            line.append(_shown(numbers.get((row, method))))
            printed = published.get((row, method))
            line.append("–" if printed is None else f"{printed:.2f}")
        lines.append(line)
    said = ", ".join(f"{k} {v}" for k, v in _settings(done).items() if v is not None)
    where = "; ".join(
        f"{e['hardware']}, torch {e['torch']}, commit {e['commit']}" for e in _environments(done)
    )
    body = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return (
        f"Table `{table}`: accuracy after the last epoch, %, mean ± standard deviation (n).\n\n"
        f"{body}\nSettings: {said}. Measured with {where}.\n"
    )


def _shown(summary: dict[str, Any] | None) -> str:
    if summary is None:
        return "–"
    spread = "" if summary["sd"] is None else f" ± {summary['sd']:.2f}"
    return f"{summary['mean']:.2f}{spread} ({summary['n']})"


def _bars(
    rows: list[str],
    methods: list[str],
    numbers: dict[tuple[str, str], dict[str, Any]],
    published: dict[tuple[str, str], float],
) -> Figure:
    """Draw measured means with error bars, and the published numbers beside them."""
    figure = Figure(figsize=(5.2 * len(rows), 0.42 * len(methods) + 1.4), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        for place, method in enumerate(methods):
            if summary := numbers.get((row, method)):
                axes.barh(
                    place - 0.2,
                    summary["mean"],
                    0.4,
                    xerr=summary["sd"],
                    color="C0",
                    label="measured",
                )
            if (row, method) in published:
                axes.barh(place + 0.2, published[row, method], 0.4, color="0.75", label="published")
        axes.set(xlabel="accuracy, %", title=row)
        axes.set_yticks(range(len(methods)), [title_of(method) for method in methods])
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    entries: dict[str, Any] = {}  # each once
    for axes in figure.axes:
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _epochs(rows: list[str], done: dict[tuple[str, str], list[dict[str, Any]]]) -> Figure:
    """Draw the accuracy over epochs of each method, the mean of its seeds."""
    figure = Figure(figsize=(5.2 * len(rows), 4.6), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        for number, (method, records) in enumerate(
            (m, r) for (t, m), r in done.items() if t == row
        ):
            curves = [
                [e["test_accuracy"] for p in r["phases"].values() for e in p["epochs"]
                 if "test_accuracy" in e]
                for r in records
            ]  # fmt: skip
            means = [statistics.mean(values) for values in zip(*curves, strict=True)]
            style = "--" if method == "teacher" else "-" if number <= 10 else ":"
            axes.plot(range(1, len(means) + 1), means, style, label=title_of(method))
        axes.set(xlabel="epoch", ylabel="accuracy, %", title=row)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small", frameon=False)
    return figure
