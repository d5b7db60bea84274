"""Pictures of a run, from its record."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from parts.files import write_atomically

__all__ = ["plot_curves"]


def plot_curves(path: Path, record: dict[str, Any]) -> None:
    """Draw test accuracy over epochs, a line a model, and the estimators' loss."""
    phases = record["phases"]
    measured = {p: v for p, v in phases.items() if "last_accuracy" in v and v["epochs"]}
    trained = {p: v for p, v in phases.items() if p == "estimator" and v["epochs"]}
    columns = 1 + bool(trained)
    figure = Figure(figsize=(5.5 * columns, 3.6), layout="constrained")  # needs no display
    axes = figure.subplots(1, columns, squeeze=False)
    for phase, values in measured.items():
        epochs = values["epochs"]
        axes[0, 0].plot(
            [e["epoch"] for e in epochs],
            [e["test_accuracy"] for e in epochs],
            label=f"{phase}: {values['last_accuracy']:.1f} %",
        )
    axes[0, 0].set(xlabel="epoch", ylabel="test accuracy, %", title="Accuracy (last epoch named)")
    axes[0, 0].grid(alpha=0.3)
    if measured:
        axes[0, 0].legend(loc="lower right", frameon=False)
    for values in trained.values():
        epochs = values["epochs"]
        axes[0, 1].plot([e["epoch"] for e in epochs], [e["loss"] for e in epochs])
        axes[0, 1].set(
            xlabel="epoch", ylabel="1 - cosine, summed over pairs", title="Estimator loss"
        )
        axes[0, 1].grid(alpha=0.3)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_atomically(path, lambda file: file.write(picture.getvalue()))
