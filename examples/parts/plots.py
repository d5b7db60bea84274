"""Pictures of runs, from their records."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from parts.files import write_atomically

__all__ = ["plot_curves", "save"]


def plot_curves(path: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the accuracy over epochs of each run, by the name it has in ``records``."""
    figure = Figure(figsize=(6.5, 4.0), layout="constrained")  # needs no display
    axes = figure.subplots()
    for name, record in records.items():
        epochs = [e for p in record["phases"].values() for e in p["epochs"] if "test_accuracy" in e]
        axes.plot(
            [epoch["epoch"] for epoch in epochs],
            [epoch["test_accuracy"] for epoch in epochs],
            label=f"{name}: {record['accuracy']:.1f} %",
        )
    axes.set(xlabel="epoch", ylabel="accuracy, %", title="Accuracy (last epoch named)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a picture, whole or not at all."""
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_atomically(path, lambda file: file.write(picture.getvalue()))
