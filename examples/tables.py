"""The poster's tables: published numbers, and measured records as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from baselines import RECIPES
from common import save_figure
from matplotlib import colormaps
from matplotlib.figure import Figure
from networks import NETWORKS
from scipy.stats import t as student_t  # type: ignore[import-untyped] # it ships no types

Table = Literal["cifar100", "tinyimagenet", "students", "heads", "sota"]
TITLES = {"teacher": "Teacher", "student": "Student"}
TITLES |= {name: recipe.title for name, recipe in RECIPES.items()}
TITLES |= {
    "mhgd": "MHGD",
    "mhgd-tanh": "MHGD, tanh",
    "mhgd-scaled": "MHGD, scaled",
    "mhgd-soft-logits": "MHGD + Soft-logits",
    "mhgd-own-heads": "MHGD, own heads",
    "mhgd-own-heads-soft-logits": "MHGD, own heads + Soft-logits",
}
PAIRED = ["data", "classes", "images", "seed", "student", "split", "student_share", "epochs"]
PAIRED += ["student_width", "width", "learning_rate", "batch_size", "amp"]
VARIED = ["data", "network", "split", "student_share", "student_width", "epochs", "first_epochs"]
VARIED += ["teacher_epochs", "teacher_seed", "num_heads", "gate", "bound", "soft_share", "width"]
VARIED += ["learning_rate", "amp", "batch_size", "classes"]
MISSING = "–"


@dataclass(frozen=True)
class Row:
    """A pair of networks, or a number of attention heads, of a table."""

    title: str
    script: str  # shows its data and networks
    teacher: str
    student: str
    published: Mapping[str, float]  # accuracy of each method as printed, per cent
    num_heads: int | None = None  # if the table varies them


COMPARED = ("teacher", "student", "soft-logits", "fsp", "ab", "kd-svd", "kd-svdf", "mhgd")
STUDENTS = ("student", "soft-logits", "fsp", "ab", "kd-svd", "mhgd")
SOTA = ["student", "teacher", "soft-logits", "fitnet", "at", "fsp", "dml", "kd-svd", "ft", "ab"]
SOTA += ["rkd", "mhgd"]
VGG, WRN = ("VGG16", "VGG7"), ("WRN-22-4", "WRN-10-4")


def row(
    title: str, script: str, pair: tuple[str, str], methods: Sequence[str], *accuracies: float
) -> Row:
    """Return a row from its accuracies in the order of the methods."""
    return Row(title, script, *pair, dict(zip(methods, accuracies, strict=True)))


TABLES: dict[Table, list[Row]] = {
    "cifar100": [
        row("VGG", "cifar100_vgg", VGG, COMPARED,
            67.99, 59.97, 60.95, 61.87, 64.56, 64.25, 64.38, 67.02),
        row("WRN", "cifar100_wrn", WRN, COMPARED,
            77.22, 71.62, 71.88, 71.57, 72.23, 71.83, 71.82, 72.79),
    ],
    "tinyimagenet": [
        row("VGG", "tinyimagenet_vgg", VGG, COMPARED,
            56.30, 52.40, 53.78, 54.85, 54.99, 55.33, 55.35, 56.35),
        row("WRN", "tinyimagenet_wrn", WRN, COMPARED,
            61.31, 55.91, 56.00, 56.04, 56.53, 55.72, 55.95, 56.90),
    ],
    "students": [
        row("VGG (modified)", "cifar100_wrn", ("WRN-22-4", "VGG-modified"), STUDENTS,
            69.76, 70.51, 69.44, 71.24, 70.31, 71.52),
        row("MobileNet", "cifar100_wrn", ("WRN-22-4", "MobileNet"), STUDENTS,
            66.18, 67.35, 60.35, 67.84, 67.03, 68.32),
        row("ResNet", "cifar100_wrn", ("WRN-22-4", "ResNet-small"), STUDENTS,
            71.57, 71.81, 70.40, 71.55, 71.55, 72.74),
    ],
    "heads": [row("0 heads", "cifar100_vgg", VGG, ("student",), 59.97)] + [
        Row(f"{heads} heads", "cifar100_vgg", *VGG, {"mhgd": accuracy}, heads)
        for heads, accuracy in ((1, 65.71), (2, 66.41), (4, 67.01), (8, 67.02), (16, 66.70))
    ],
    "sota": [
        row("ResNet32 → ResNet8", "cifar100_wrn", ("ResNet32", "ResNet8"), SOTA,
            71.76, 78.96, 71.79, 72.74, 72.31, 72.65, 73.27, 73.68, 73.35, 73.08, 73.40, 73.98),
    ],
}  # fmt: skip


def published() -> str:
    """Return the published accuracies as Markdown: a line a row, a column a method."""
    rows = [
        {"table": table, "row": row.title}
        | {TITLES[method]: f"{accuracy:.2f}" for method, accuracy in row.published.items()}
        for table, rows in TABLES.items()
        for row in rows
    ]
    shown = pd.DataFrame(rows).fillna(MISSING)
    text: str = shown.to_markdown(index=False, disable_numparse=True)
    return text


def frame(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a line a measured network: settings as text, accuracy, gain over the student alone.

    The gain pairs a student with the student alone of the same seed: both have the same first
    weights, batches and test images.
    """
    measured = [record for record in records if "accuracy" in record]
    alone = {
        pair_of(record["settings"]): record["accuracy"]
        for record in measured
        if record["settings"]["method"] == "student"
    }
    lines = []
    for record in sorted(measured, key=lambda record: place_of(record["settings"])):
        settings, accuracy = record["settings"], record["accuracy"]
        gained = settings["method"] not in ("teacher", "student")
        base = alone.get(pair_of(settings)) if gained else None
        *_, epochs = record["phases"].values()
        lines.append(
            {name: str(value_of(settings, name)) for name in VARIED}
            | {"method": settings["method"], "seed": settings["seed"], "accuracy": accuracy}
            | {"gain": None if base is None else accuracy - base}
            | {"loss": epochs[-1].get("loss")}
            | {"curve": [epoch["test_accuracy"] for epoch in epochs]}
        )
    return pd.DataFrame(lines)


def pair_of(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a student has in common with the student alone that it is compared with."""
    return tuple(value_of(settings, name) for name in PAIRED)


def place_of(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return where a record stands in a table: by settings, those without one first; by method."""
    values = {name: value_of(settings, name) for name in VARIED}
    if values["network"] != MISSING:
        values["network"] = list(NETWORKS).index(values["network"])  # a teacher before its students
    first = [(value != MISSING, 0 if value == MISSING else value) for value in values.values()]
    return (*first, list(TITLES).index(settings["method"]), settings["seed"])


def value_of(settings: Mapping[str, Any], name: str) -> Any:
    """Return a setting of a record; "network" is the trained one.

    The seed of a teacher is its "teacher_seed". The first records have no width of the student.
    """
    own = {"network": "teacher", "teacher_seed": "seed"} if settings["method"] == "teacher" else {}
    name = own.get(name, "student" if name == "network" else name)
    given = settings["method"] != "teacher" and name == "student_width"
    return settings.get(name, 1.0 if given else MISSING)


def groups(
    records: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, dict[str, str], pd.DataFrame]]:
    """Yield method, the settings that vary in the table, and the lines of all seeds."""
    lines = frame(records)
    students = lines[lines["method"] != "teacher"]
    found = {name: set(students[name]) - {MISSING} for name in VARIED}
    varied = [name for name, values in found.items() if len(values) > 1]
    for (method, *settings), group in lines.groupby(["method", *varied], sort=False):
        yield method, dict(zip(varied, settings, strict=True)), group


def spread(values: pd.Series[float], sign: str = "") -> str:
    """Return mean ± standard deviation of a sample, and how many there are."""
    values = values.dropna()
    if values.empty:
        return "–"
    sd = f" ± {values.std():.2f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.2f}{sd} ({len(values)})"


def interval(gains: pd.Series[float]) -> str:
    """Return the 95 % interval of the mean gain, by Student's t over seeds."""
    gains = gains.dropna()
    if len(gains) < 2:
        return MISSING
    half = student_t.ppf(0.975, len(gains) - 1) * gains.sem()
    return f"{gains.mean() - half:+.1f} to {gains.mean() + half:+.1f}"


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a line for each method and each setting that varies."""
    rows = []
    for method, settings, group in groups(records):
        rows.append(
            {"method": TITLES[method], **settings}
            | {"accuracy, %": spread(group["accuracy"])}
            | {"gain, points": spread(group["gain"], "+"), "95 % interval": interval(group["gain"])}
            | {"training loss": spread(group["loss"])}
        )
    text: str = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    return text


def picture(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the table: a row of panels for all students that learn from the same batches.

    Means with standard deviations after the last epoch, and means over epochs. Teachers are drawn
    if there is no student.
    """
    measured = [record for record in records if "accuracy" in record]
    if not measured:  # of an untrained teacher and its heads
        return
    students = [r for r in measured if r["settings"]["method"] != "teacher"] or measured
    rows: dict[str, list[Mapping[str, Any]]] = {}
    found = {name: {value_of(r["settings"], name) for r in students} for name in PAIRED}
    told = [name for name in PAIRED if name not in ("seed", "images") and len(found[name]) > 1]
    for record in sorted(students, key=lambda record: place_of(record["settings"])):
        values = {name.replace("_", " "): value_of(record["settings"], name) for name in told}
        title = ", ".join(f"{name} {value}" for name, value in values.items())
        rows.setdefault(title, []).append(record)
    shown = {title: list(groups(of_row)) for title, of_row in rows.items()}
    heights = [2 + len(lines) for lines in shown.values()]
    figure = Figure(figsize=(12.0, 0.27 * sum(heights) + 0.5), layout="constrained")
    panels = figure.subplots(len(shown), 2, squeeze=False, height_ratios=heights)
    for (title, lines), (bars, curves) in zip(shown.items(), panels, strict=True):
        names = []
        for place, (method, settings, group) in enumerate(lines):
            given = [f"{n.replace('_', ' ')} {v}" for n, v in settings.items() if v != MISSING]
            names.append(", ".join([TITLES[method], *given]))
            colour = "0.6" if method == "student" else colormaps["tab20"](place % 20)
            mean, sd = group["accuracy"].mean(), group["accuracy"].std()
            bars.barh(place, mean, xerr=None if pd.isna(sd) else sd, color=colour)
            means = pd.DataFrame(group["curve"].to_list()).mean()
            style = "--" if method == "student" else "-" if place < 20 else ":"
            curves.plot(range(1, len(means) + 1), means, style, color=colour)
        bars.set_yticks(range(len(names)), names, fontsize="small")
        bars.set_ylim(len(lines) - 0.5, -0.5)
        bars.set_xlim(0, 1.05 * max(record["accuracy"] for record in students))
        bars.set_title(title, fontsize="small", loc="left")
        curves.set_ylabel("accuracy, %", fontsize="small")
        curves.xaxis.get_major_locator().set_params(integer=True)
        curves.grid(alpha=0.3)
        for axes in (bars, curves):
            axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("accuracy after the last epoch, %")
    panels[-1, 1].set_xlabel("epoch")
    save_figure(figure, path)
