"""The poster's tables: published numbers, and measured records as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


# A line for each row of a table: which script and networks show it, and the printed accuracies, %.
PUBLISHED = pd.read_csv(Path(__file__).with_name("published.csv"), dtype=str)
ROWS = [{str(name): text for name, text in row.dropna().items()} for _, row in PUBLISHED.iterrows()]


def published() -> str:
    """Return the published accuracies as Markdown: a line a row, a column a method."""
    shown = PUBLISHED.drop(columns=["script", "of_teacher", "of_student", "num_heads"])
    shown = shown.rename(columns=TITLES).fillna(MISSING)
    return str(shown.to_markdown(index=False, disable_numparse=True))


def frame(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a line a measured network: settings as text, accuracy, gain over the student alone.

    The gain pairs a student with the student alone of the same seed: both have the same first
    weights, batches and test images. Lines are sorted by settings, those without one first.
    """
    measured = [record for record in records if "accuracy" in record]
    last = [list(record["phases"].values())[-1] for record in measured]
    by = [*VARIED, "method", "seed"]
    names = list(dict.fromkeys([*by, *PAIRED]))
    settings = [about(record["settings"]) for record in measured]
    lines = pd.DataFrame(settings, columns=names, dtype=object)
    lines["accuracy"] = [record["accuracy"] for record in measured]
    lines["loss"] = [epochs[-1].get("loss") for epochs in last]
    lines["curve"] = [[epoch["test_accuracy"] for epoch in epochs] for epochs in last]
    alone = lines["accuracy"].where(lines["method"] == "student")
    base = alone.groupby([lines[name] for name in PAIRED], dropna=False).transform("last")
    lines["gain"] = (lines["accuracy"] - base).where(lines["method"] != "student")
    order = {"network": list(NETWORKS), "method": list(TITLES)}  # a teacher before its students
    lines = lines.sort_values(
        by,
        key=lambda column: pd.Categorical(column, order.get(column.name), ordered=True),
        na_position="first",
    )
    lines[names] = lines[names].map(lambda value: MISSING if pd.isna(value) else str(value))
    return lines


def about(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a record; "network" is the trained one.

    The seed of a teacher is its "teacher_seed". The first records have no width of the student.
    """
    if settings["method"] == "teacher":
        return {**settings, "network": settings.get("teacher"), "teacher_seed": settings["seed"]}
    return {"student_width": 1.0, **settings, "network": settings.get("student")}


def groups(lines: pd.DataFrame) -> Iterator[tuple[str, dict[str, str], pd.DataFrame]]:
    """Yield method, the settings that vary among students or teachers, and the lines of all seeds.

    Lines of other images are another group. Where no student has a "teacher_seed", each teacher has
    that of its students.
    """
    is_teacher = lines["method"] == "teacher"
    counts = lines[VARIED].mask(lines[VARIED] == MISSING).groupby(is_teacher).nunique()
    several = (counts > 1).any()
    several["teacher_seed"] = counts["teacher_seed"].get(False, 0) > 1
    varied = several.index[several]
    for (method, _, *settings), group in lines.groupby(["method", "images", *varied], sort=False):
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
    for method, settings, group in groups(frame(records)):
        rows.append(
            {"method": TITLES[method], **settings}
            | {"accuracy, %": spread(group["accuracy"])}
            | {"gain, points": spread(group["gain"], "+"), "95 % interval": interval(group["gain"])}
            | {"training loss": spread(group["loss"])}
        )
    return str(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))


def picture(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the table: a row of panels for all students that learn from the same batches.

    Means with standard deviations after the last epoch, and means over epochs. Teachers are drawn
    if there is no student.
    """
    measured = frame(records)
    students = measured[measured["method"] != "teacher"]
    students = measured if students.empty else students
    told = [n for n in PAIRED if n not in ("seed", "images") and students[n].nunique() > 1]
    titles = students.apply(
        lambda line: ", ".join(f"{name.replace('_', ' ')} {line[name]}" for name in told), axis=1
    )
    shown = {title: list(groups(of_row)) for title, of_row in students.groupby(titles, sort=False)}
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
        bars.set_xlim(0, 1.05 * students["accuracy"].max())
        bars.set_title(title, fontsize="small", loc="left")
        curves.set_ylabel("accuracy, %", fontsize="small")
        curves.xaxis.get_major_locator().set_params(integer=True)
        curves.grid(alpha=0.3)
        for axes in (bars, curves):
            axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("accuracy after the last epoch, %")
    panels[-1, 1].set_xlabel("epoch")
    save_figure(figure, path)
