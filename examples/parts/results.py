"""The tables of `reproduce.py`: mean ± standard deviation beside what was published."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from parts.files import write_atomically, write_json
from parts.methods import METHODS, MHGD, title_of
from parts.plots import save
from parts.poster import Row
from parts.runs import hold
from parts.workshop import Workshop

__all__ = ["Cell", "shares_of_time", "write_results"]

OF_A_CELL = ("seed", "method", "teacher", "student", "images")  # told by the table itself


@dataclass(frozen=True)
class Cell:
    """A network of a table: a row's pair, trained by a method from a seed."""

    row: Row
    method: str
    seed: int
    workshop: Workshop

    def record(self) -> dict[str, Any] | None:
        """Return its record, if it is finished."""
        return self.workshop.record(self.method)


def shares_of_time(cells: Sequence[Cell]) -> str:
    """Say how long training took, without evaluation, and what share each method had in it."""
    title_at: dict[Path, str] = {}  # rows may share networks
    for cell in cells:
        title_at[cell.workshop.folder(cell.method)] = title_of(cell.method)
        if cell.method in MHGD:
            title_at[cell.workshop.folder("estimators")] = "estimators"
    seconds: dict[str, float] = {}
    for folder, title in title_at.items():
        if (path := folder / "seconds.json").exists():
            phases = json.loads(path.read_text(encoding="utf-8"))
            seconds[title] = seconds.get(title, 0.0) + sum(phases.values())
    total = sum(seconds.values())
    shares = ", ".join(f"{title} {part / total:.0%}" for title, part in seconds.items())
    return f"Training took {total / 60:.1f} minutes of one process. {shares}"


def write_results(out: Path, name: str, rows: Sequence[Row], cells: Sequence[Cell]) -> str:
    """Write Markdown, JSON and pictures of the finished cells of a table; return the Markdown.

    Args:
        out: Folder.
        name: Name of the files, and of the table.
        rows: The poster's rows, of which those without a finished cell are left out.
        cells: All cells that may be finished.
    """
    done: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        if (record := cell.record()) is not None:
            done.setdefault((cell.row.title, cell.method), []).append(record)
    shown = [row for row in rows if any(row.title == title for title, _ in done)] or list(rows)
    published = {(row.title, m): a for row in shown for m, a in row.published.items()}
    present = {method for row in shown for method in row.published} | {m for _, m in done}
    methods = [method for method in ("teacher", *METHODS) if method in present]
    alone = {
        row.experiment: done[row.title, "student"]
        for row in shown
        if (row.title, "student") in done
    }
    numbers = {
        (row.title, method): {
            **_summary(done[row.title, method]),
            "gain": _gain(done[row.title, method], alone.get(row.experiment, ()))
            if method not in ("teacher", "student")
            else None,
        }
        for row in shown
        for method in methods
        if (row.title, method) in done
    }
    titles_of_rows = [row.title for row in shown]
    text = _markdown(name, titles_of_rows, methods, numbers, published, done)
    content = {
        "table": name,
        "settings": _settings(done),
        "environments": _environments(done),
        "cells": [
            {"row": row, "method": method, **summary, "published": published.get((row, method))}
            for (row, method), summary in numbers.items()
        ],
    }
    with hold(out, wait=True):
        write_json(out / f"{name}.json", content)
        write_atomically(out / f"{name}.md", lambda file: file.write(text.encode()))
        save(_bars(titles_of_rows, methods, numbers, published), out / f"{name}.png")
        save(_epochs(titles_of_rows, methods, done), out / f"{name}_epochs.png")
    return text


def _summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return accuracies after the last epoch, their mean and standard deviation (of a sample)."""
    accuracies = [record["accuracy"] for record in records]
    return {
        **_spread(accuracies),
        "seeds": [record["about"]["seed"] for record in records],
        "accuracies": accuracies,
    }


def _gain(
    records: Sequence[dict[str, Any]], alone: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """Return how much better a method is than the student alone, seed by seed.

    A seed gives both the same first weights, batches and test images, so that the difference tells
    more than the two accuracies.
    """
    of_seed = {record["about"]["seed"]: record["accuracy"] for record in alone}
    gains = [
        record["accuracy"] - of_seed[record["about"]["seed"]]
        for record in records
        if record["about"]["seed"] in of_seed
    ]
    return _spread(gains) if gains else None


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": round(statistics.mean(values), 2),
        "sd": round(statistics.stdev(values), 2) if len(values) > 1 else None,
        "n": len(values),
    }


def _settings(done: dict[Any, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the settings that all cells have which have them at all."""
    found: dict[str, list[Any]] = {}
    for records in done.values():
        for record in records:
            for key, value in record["about"].items():
                found.setdefault(key, []).append(value)
    return {
        key: values[0]
        for key, values in found.items()
        if key not in OF_A_CELL and all(value == values[0] for value in values)
    }


def _environments(done: dict[Any, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for records in done.values():
        for record in records:
            for environment in (record["environment"], *record.get("went_on_with", ())):
                if environment not in found:
                    found.append(environment)
    return found


def _markdown(
    name: str,
    rows: list[str],
    methods: list[str],
    numbers: dict[tuple[str, str], dict[str, Any]],
    published: dict[tuple[str, str], float],
    done: dict[tuple[str, str], list[dict[str, Any]]],
) -> str:
    """A line a method; of each row of the poster what was measured, and what was published."""
    columns = (", measured", ", over the student", ", published")
    head = ["method", *(f"{row}{column}" for row in rows for column in columns)]
    lines = [head, ["---"] * len(head)]
    for method in methods:
        line = [title_of(method)]
        for row in rows:
            summary = numbers.get((row, method))
            line.append(_shown(summary))
            line.append(_shown(summary["gain"], sign="+") if summary else "–")
            printed = published.get((row, method))
            line.append("–" if printed is None else f"{printed:.2f}")
        lines.append(line)
    said = ", ".join(f"{k} {v}" for k, v in _settings(done).items() if v is not None)
    where = "; ".join(
        f"{e['hardware']}, torch {e['torch']}, commit {e['commit']}" for e in _environments(done)
    )
    body = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return (
        f"Table `{name}`: accuracy after the last epoch, %, mean ± standard deviation (n); how "
        "much that is over the student alone, seed by seed. Published are the poster's numbers, on "
        "all of its data set at full width.\n\n"
        f"{body}\nSettings: {said}. Measured with {where}.\n"
    )


def _shown(summary: dict[str, Any] | None, sign: str = "") -> str:
    if summary is None:
        return "–"
    spread = "" if summary["sd"] is None else f" ± {summary['sd']:.2f}"
    return f"{summary['mean']:{sign}.2f}{spread} ({summary['n']})"


def _bars(
    rows: list[str],
    methods: list[str],
    numbers: dict[tuple[str, str], dict[str, Any]],
    published: dict[tuple[str, str], float],
) -> Figure:
    """Draw measured means with error bars, and the published numbers beside them."""
    figure, all_axes = _panels(len(rows), height=0.42 * len(methods) + 1.4)
    for axes, row in zip(all_axes, rows, strict=True):
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
    for axes in all_axes:
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _epochs(
    rows: list[str], methods: list[str], done: dict[tuple[str, str], list[dict[str, Any]]]
) -> Figure:
    """Draw the accuracy over epochs of each method, the mean of its seeds."""
    figure, all_axes = _panels(len(rows), height=4.6)
    for axes, row in zip(all_axes, rows, strict=True):
        for number, method in enumerate(m for m in methods if (row, m) in done):
            curves = [
                [
                    epoch["test_accuracy"]
                    for phase in record["phases"].values()
                    for epoch in phase["epochs"]
                    if "test_accuracy" in epoch
                ]
                for record in done[row, method]
            ]
            means = [statistics.mean(values) for values in zip(*curves, strict=True)]
            style = "--" if method == "teacher" else "-" if number < 10 else ":"
            axes.plot(range(1, len(means) + 1), means, style, label=title_of(method))
        axes.set(xlabel="epoch", ylabel="accuracy, %", title=row)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small", frameon=False)
    return figure


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with a panel for each row of a table, up to three side by side."""
    columns = min(count, 3)
    lines = -(-count // columns)
    figure = Figure(figsize=(5.2 * columns, height * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    for empty in panels[count:]:
        empty.set_axis_off()
    return figure, panels[:count]
