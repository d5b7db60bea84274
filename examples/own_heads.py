"""Compare forms of a student's own attention heads with the paper's form, on 8×8 digits.

    python examples/own_heads.py --split dev --first-seed 100 --seeds 3

Data, networks, schedule and optimizer are those of `quickstart.py`: two labels a class, the other
images without. Each row changes one setting of the own heads (or of the paper's form). The control
is an untrained teacher with heads trained on it as usual: a gain there would not come from what the
teacher knows. Accuracy after the last step, per cent. One JSON line a student in `--out`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import common
import pandas as pd
import quickstart as digits
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm  # type: ignore[import-untyped] # it ships no types

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss

HALF = tuple(channels // 2 for channels in digits.CHANNELS)


@dataclass(frozen=True)
class Form:
    """A way to train a student; the defaults are what each row changes one of."""

    method: Literal["alone", "paper", "own heads"] = "own heads"
    channels: tuple[int, ...] = HALF
    squash: Literal["scaled", "tanh"] | None = "scaled"
    head_rate: float = 1.0  # learning rate of the own heads, in the student's
    copied: bool = False  # own heads start as the teacher's
    k: int = 1
    bound: float = 10.0
    teacher: Literal["trained", "untrained"] = "trained"


PLAIN = Form()
EQUAL = replace(PLAIN, channels=digits.CHANNELS)
ROWS = {
    "half: alone": replace(PLAIN, method="alone"),
    "half: own heads": PLAIN,
    "half: control, untrained teacher": replace(PLAIN, teacher="untrained"),
    "half: bound 1": replace(PLAIN, bound=1.0),
    "half: bound 3": replace(PLAIN, bound=3.0),
    "half: logits as they are": replace(PLAIN, squash=None),
    "half: k = 2": replace(PLAIN, k=2),
    "half: k = 4": replace(PLAIN, k=4),
    "half: heads' rate × 0.1": replace(PLAIN, head_rate=0.1),
    "half: heads' rate × 0.3": replace(PLAIN, head_rate=0.3),
    "half: heads' rate × 3": replace(PLAIN, head_rate=3.0),
    "equal: alone": replace(EQUAL, method="alone"),
    "equal: paper's form": replace(EQUAL, method="paper"),
    "equal: own heads": EQUAL,
    "equal: own heads, copied": replace(EQUAL, copied=True),
    "equal: own heads, copied, rate × 0.1": replace(EQUAL, copied=True, head_rate=0.1),
    "equal: control, untrained teacher": replace(EQUAL, teacher="untrained"),
}


@dataclass(frozen=True)
class Config:
    """Settings of a run; every field is a command-line flag."""

    out: Path = Path("runs/own_heads.jsonl")  # file of one JSON line a student
    split: Literal["test", "dev"] = "dev"  # images that measure
    seeds: int = 3  # runs of each row
    first_seed: int = 100  # seeds count up from here
    steps: int = 200  # steps of the teacher, and of each student
    head_steps: int = 150  # steps of the teacher's attention heads
    threads: int = 1  # CPU threads
    render: bool = False  # print the table of `--out`, and train nothing

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "head_steps", "threads"):
            if (got := getattr(self, name)) < 1:
                raise ValueError(f"`--{name.replace('_', '-')}` must be ≥ 1; got {got}.")


def train_student(
    form: Form,
    teacher: digits.VGG,
    trained: GraphTransferLoss,
    few: digits.Digits,
    train: digits.Digits,
    seed: int,
    settings: digits.Config,
) -> digits.VGG:
    """Train one student; ``trained`` holds the teacher's attention heads."""
    torch.manual_seed(seed)
    student = digits.VGG(1, form.channels)
    transfer = GraphTransferLoss(
        digits.CHANNELS,
        student_channels=form.channels if form.method == "own heads" else None,
        squash=form.squash,
        k=form.k,
    )
    transfer.estimators = trained.estimators
    if form.copied:
        for own, theirs in zip(transfer.student_heads, transfer.estimators, strict=True):
            own.load_state_dict(theirs.state_dict(), strict=False)  # θ and φ, not f1 and f2
    rate = settings.student_rate
    groups = [
        {"params": list(student.parameters())},
        {"params": list(transfer.student_heads.parameters()), "lr": form.head_rate * rate},
    ]
    inner, schedule = digits.sgd(groups, rate, settings.student_steps)
    optimizer = GatedGradClip(inner, bound=form.bound)
    of_student, of_teacher = (FeatureHooks(m, digits.SENSING_POINTS) for m in (student, teacher))
    batches = zip(digits.batches(few, seed), digits.batches(train, seed), strict=False)
    with of_student, of_teacher:
        for (labelled, labels), (unlabelled, _) in islice(batches, settings.student_steps):
            images = torch.cat([labelled, unlabelled])
            task = F.cross_entropy(student(images)[: len(labels)], labels)
            loss = None
            if form.method != "alone":
                with torch.no_grad():
                    teacher(images)
                loss = transfer(of_student.features, of_teacher.features)
            optimizer.zero_grad()
            optimizer.backward(task, loss)
            optimizer.step()
            schedule.step()
    return student.eval()


def run(config: Config) -> None:
    """Train every row for every seed that has no record yet, and print the table."""
    records = common.read_records(config.out)
    done = {(record["row"], record["seed"]) for record in records}
    train, measured = digits.load(config.split)
    settings = digits.Config(
        teacher_steps=config.steps, student_steps=config.steps, head_steps=config.head_steps
    )
    about = {"split": config.split, "steps": config.steps, "head_steps": config.head_steps}
    for seed in range(config.first_seed, config.first_seed + config.seeds):
        if config.render or all((name, seed) in done for name in ROWS):
            continue
        few = digits.take_per_class(train, settings.labels, torch.Generator().manual_seed(seed))
        teachers = teachers_of(train, seed, settings)
        for name, form in tqdm(ROWS.items(), desc=f"seed {seed}"):
            if (name, seed) in done:
                continue
            teacher, heads = teachers[form.teacher, form.k]
            student = train_student(form, teacher, heads, few, train, seed, settings)
            accuracy = digits.accuracy(student, measured)
            record = {"row": name, "seed": seed, "accuracy": accuracy, **asdict(form), **about}
            records.append(record | {"versions": common.versions("cpu")})
            common.write_records(config.out, records)
    draw(records, config.out.with_suffix(".png"))
    print(table(records))


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Draw the mean of each row, with the standard deviation over seeds."""
    lines = pd.DataFrame(records).groupby("row", sort=False)["accuracy"].agg(["mean", "std"])
    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.barh(lines.index, lines["mean"], xerr=lines["std"].fillna(0))
    axes.invert_yaxis()
    axes.set(xlabel="accuracy after the last step, %")
    axes.spines[["top", "right"]].set_visible(False)
    common.save_figure(figure, path)


def table(records: list[dict[str, Any]]) -> str:
    """Return Markdown with a line a row: mean ± standard deviation over seeds."""
    frame = pd.DataFrame(records)
    shown = frame.groupby("row", sort=False)["accuracy"].agg(spread).rename("accuracy, %")
    text: str = shown.rename_axis("form").to_frame().to_markdown(disable_numparse=True)
    return text


def spread(values: pd.Series[float]) -> str:
    """Return mean ± standard deviation, and how many there are."""
    sd = f" ± {values.std():.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{sd} ({len(values)})"


def teachers_of(
    train: digits.Digits, seed: int, settings: digits.Config
) -> dict[tuple[str, int], tuple[digits.VGG, GraphTransferLoss]]:
    """Return teacher and heads by "trained" or "untrained", and by k."""
    bar = tqdm(disable=True)
    torch.manual_seed(seed)
    untrained = digits.VGG(convs_per_stage=2).eval().requires_grad_(requires_grad=False)
    trained = digits.train_teacher(train, seed, settings, bar)
    wanted = {(form.teacher, form.k) for form in ROWS.values()}
    teachers: dict[tuple[str, int], tuple[digits.VGG, GraphTransferLoss]] = {}
    for kind, k in wanted:
        teacher = trained if kind == "trained" else untrained
        heads = digits.train_heads(teacher, train, seed, settings, bar, k=k)
        teachers[kind, k] = teacher, heads
    return teachers


if __name__ == "__main__":
    common.command(run, Config, __doc__)
