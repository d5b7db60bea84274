"""Tables and picture of the benchmark, from its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from parts.files import write_atomically

__all__ = ["plot_vectors", "tables"]

MEBI = 2**20
KINDS = {"trained": "of trained networks", "small gaps": "with gaps of 1.5 %"}


def tables(result: dict[str, Any]) -> str:
    """Return every part that was measured as Markdown."""
    environment, config = result["environment"], result["config"]
    parts = [
        f"{environment['hardware']}, torch {environment['torch']}, commit {environment['commit']}, "
        f"medians of {config['repeats']} rounds.\n"
    ]
    for maps, rows in result.get("vectors", {}).items():
        parts.append(f"Singular vectors, maps {KINDS[maps]}:\n\n" + _vectors(rows))
    if "step" in result:
        parts.append("A step, milliseconds:\n\n" + _step(result["step"]))
    if "growth" in result:
        parts.append("Growth:\n\n" + _growth(result["growth"]))
    return "\n".join(parts)


def plot_vectors(path: Path, result: dict[str, Any]) -> None:
    """Draw the time of a step by each method, on both kinds of maps."""
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")  # needs no display
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (maps, rows) in zip(axes, result["vectors"].items(), strict=True):
        measured = [row for row in rows if "seconds" in row][::-1]
        milliseconds = [1e3 * row["seconds"] for row in measured]
        colours = ["C0" if row["method"] == "graph-kd" else "0.7" for row in measured]
        bars = axis.barh([row["method"] for row in measured], milliseconds, color=colours)
        axis.bar_label(bars, [f"{value:.0f}" for value in milliseconds], padding=3)
        axis.set(xlabel="ms a step, all sensing points", title=f"Maps {KINDS[maps]}")
        axis.set_xlim(right=max(milliseconds) * 1.2)
        axis.spines[["top", "right"]].set_visible(False)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_atomically(path, lambda file: file.write(picture.getvalue()))


def _vectors(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        if "fails" in row:
            reason = row["fails"].split(":")[0]
            cells.append([row["method"], f"fails in {reason}", "–", "–", "–", "–"])
            continue
        cells.append(
            [
                row["method"],
                f"{1e3 * row['seconds']:.1f}",
                f"{row['ours / this']:.3f}",
                f"{row['peak_bytes'] / MEBI:.0f}",
                f"{row['vector']:.0e}" if "vector" in row else "–",
                f"{row['gradient']:.0e}" if "gradient" in row else "–",
            ]
        )
    head = ["method", "ms a step", "graph-kd / this", "peak MiB", "1 - \\|cos\\|", "gradient error"]
    return _table(head, cells)


def _step(pairs: dict[str, dict[str, Any]]) -> str:
    names = list(next(iter(pairs.values()))["seconds"])
    cells = [
        [name, *(f"{1e3 * pair['seconds'][name]:.1f}" for pair in pairs.values())] for name in names
    ]
    cells += [
        [f"**{ratio}**", *(f"**{pair[ratio]:.3f}**" for pair in pairs.values())]
        for ratio in ("complete / floor", "merge / complete", "input pipeline / student alone")
    ]
    cells += [
        [f"peak MiB, {name}", *(f"{p['peak_bytes'][name] / MEBI:.0f}" for p in pairs.values())]
        for name in ("floor", "complete")
    ]
    return _table(["", *pairs], cells)


def _growth(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        plain = "plain_bytes" in row
        cells.append(
            [
                str(row["samples"]),
                f"{row['default_bytes'] / MEBI:.1f}",
                f"{row['default_bytes'] / row['samples'] / 1024:.1f}",
                f"{row['plain_bytes'] / MEBI:.1f}" if plain else "–",
                f"{row['default_seconds']:.3f}",
                f"{row['plain_seconds']:.3f}" if plain else "–",
                f"{row['blocks / plain']:.2f} ({row['block_rows']})" if plain else "–",
            ]
        )
    head = ["samples", "MiB", "KiB a sample", "MiB, whole graphs", "s", "s, whole graphs"]
    return _table([*head, "time, blocks / whole (rows)"], cells)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
