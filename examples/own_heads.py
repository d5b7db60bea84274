"""Compare forms of MHGD, and uses of it, on 8×8 digits: own heads, gates, graphs, teachers, labels.

    python examples/own_heads.py --split dev --first-seed 100 --seeds 3

Data, networks and training are those of `quickstart.py`: two labels a class, the other images
without labels. Each row changes a setting or two of the own heads, or takes the paper's form. The
control is an untrained teacher with attention heads trained on it as usual: a gain there would not
come from what the teacher knows. A teacher of rotations has learned, without any label, by how many
quarter turns an image was rotated. Accuracy after the last step, per cent. ``--out`` gets one JSON
line a student.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import common
import pandas as pd
import quickstart
import tables
import torch
from common import ImageSet
from matplotlib.figure import Figure
from quickstart import CHANNELS, VGG
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped] # it ships no types

from graph_kd import GraphTransferLoss


@dataclass(frozen=True)
class Form:
    """A way to train a student; the defaults are what each row changes one of."""

    method: Literal["alone", "soft logits", "paper", "own heads"] = "own heads"
    channels: tuple[int, ...] = tuple(channels // 2 for channels in CHANNELS)
    squash: Literal["scaled", "tanh"] | float | None = "scaled"  # a number divides the logits
    head_rate: float = 1.0  # learning rate of the own heads, in the student's
    copied: bool = False  # own heads start as the teacher's
    k: int = 1
    num_heads: int = 8
    bound: float = 10.0
    # Of each parameter, of all, or of all as the largest or the mean of the steps so far.
    task_norm: Literal["parameter", "global", "largest", "mean"] = "parameter"
    teacher: Literal["trained", "untrained", "rotations"] = "trained"
    wrong: int = 0  # of each ten labels of the student


EQUAL = Form(channels=CHANNELS)
WRONG = Form(wrong=4)
EIGHTH = Form(channels=tuple(channels // 8 for channels in CHANNELS))
ROWS = {
    "half: alone": Form(method="alone"),
    "half: soft logits": Form(method="soft logits"),
    "half: own heads": Form(),
    "half: control, untrained teacher": Form(teacher="untrained"),
    "half: bound 1": Form(bound=1.0),
    "half: bound 3": Form(bound=3.0),
    "half: logits as they are": Form(squash=None),
    "half: k = 2": Form(k=2),
    "half: k = 4": Form(k=4),
    "half: heads' rate × 0.1": Form(head_rate=0.1),
    "half: heads' rate × 0.3": Form(head_rate=0.3),
    "half: heads' rate × 3": Form(head_rate=3.0),
    "half: bound 30": Form(bound=30.0),
    "half: one task norm": Form(task_norm="global"),
    "half: one task norm, bound 1": Form(task_norm="global", bound=1.0),
    "half: largest task norm so far": Form(task_norm="largest"),
    "half: largest task norm so far, bound 1": Form(task_norm="largest", bound=1.0),
    "half: mean task norm so far": Form(task_norm="mean"),
    "half: mean task norm so far, bound 1": Form(task_norm="mean", bound=1.0),
    "half: 1 head": Form(num_heads=1),
    "half: 32 heads": Form(num_heads=32),
    "half: logits / 1.5": Form(squash=1.5),
    "half: logits / 24": Form(squash=24.0),
    "equal: paper's form, bound 1": replace(EQUAL, method="paper", bound=1.0),
    "equal: paper's form, bound 3": replace(EQUAL, method="paper", bound=3.0),
    "equal: paper's form, bound 30": replace(EQUAL, method="paper", bound=30.0),
    "equal: alone": replace(EQUAL, method="alone"),
    "equal: paper's form": replace(EQUAL, method="paper"),
    "equal: own heads": EQUAL,
    "equal: own heads, copied": replace(EQUAL, copied=True),
    "equal: own heads, copied, rate × 0.1": replace(EQUAL, copied=True, head_rate=0.1),
    "equal: control, untrained teacher": replace(EQUAL, teacher="untrained"),
    "half, teacher of rotations: soft logits": Form(method="soft logits", teacher="rotations"),
    "half, teacher of rotations: own heads": Form(teacher="rotations"),
    "half, 4 of 10 labels wrong: alone": replace(WRONG, method="alone"),
    "half, 4 of 10 labels wrong: soft logits": replace(WRONG, method="soft logits"),
    "half, 4 of 10 labels wrong: own heads": WRONG,
    "eighth: alone": replace(EIGHTH, method="alone"),
    "eighth: soft logits": replace(EIGHTH, method="soft logits"),
    "eighth: own heads": EIGHTH,
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
        common.check(self)


def train_student(form: Form, seed: int, settings: quickstart.Config) -> float:
    """Train one student with the teacher's attention heads; return its accuracy."""
    train, measured = quickstart.load(settings.split)
    teacher = teacher_of(form.teacher, seed, settings)
    heads = heads_of(form.teacher, form.k, form.num_heads, seed, settings)
    few = mislabelled(quickstart.take_per_class(train, settings.labels, seed), form.wrong, seed)
    torch.manual_seed(seed)
    student = VGG(1, form.channels)
    own = form.channels if form.method == "own heads" else None
    squash: Any = form.squash
    if isinstance(form.squash, float):
        squash = partial(torch.mul, other=1 / form.squash)
    transfer = GraphTransferLoss(
        CHANNELS, form.num_heads, student_channels=own, squash=squash, k=form.k
    )
    transfer.estimators = heads.estimators
    if form.copied:
        for own_head, head in zip(transfer.student_heads, transfer.estimators, strict=True):
            own_head.load_state_dict(head.state_dict(), strict=False)  # θ and φ, not f1 and f2
    own_rate = form.head_rate * settings.student_rate
    own_heads = {"params": transfer.student_heads.parameters(), "lr": own_rate}
    learning = {"params": [{"params": student.parameters()}, own_heads], **gate_of(form)}
    method = form.method if form.method in ("alone", "soft logits") else "MHGD"
    settings = replace(settings, bound=form.bound)
    quickstart.train_student(
        method, student, teacher, transfer, few, train, seed, settings, **learning
    )
    return quickstart.accuracy(student, measured)


def mislabelled(digits: ImageSet, wrong: int, seed: int) -> ImageSet:
    """Return the digits with ``wrong`` of each ten labels changed to another class."""
    generator, count = torch.Generator().manual_seed(seed), len(digits.labels)
    chosen = torch.randperm(count, generator=generator) % 10 < wrong
    other = torch.randint(1, 10, (count,), generator=generator)
    return replace(digits, labels=(digits.labels + chosen * other) % 10)


def rotated(digits: ImageSet) -> ImageSet:
    """Return each image by 0 to 3 quarter turns, labelled by their number."""
    turns = [torch.rot90(digits.images, turn, (2, 3)) for turn in range(4)]
    labels = torch.arange(4).repeat_interleave(len(digits.labels))
    return ImageSet(torch.cat(turns), labels)


def gate_of(form: Form) -> dict[str, Any]:
    """Return the settings of the gate; "norm" with its bound is the default."""
    if form.task_norm == "parameter":
        return {}
    if form.task_norm == "global":
        return {"scope": "global"}
    norms: list[Tensor] = []

    def gate(task: Tensor, transfer: Tensor) -> Tensor:
        norms.append(task)
        so_far = torch.stack(norms)
        norm = so_far.max() if form.task_norm == "largest" else so_far.mean()
        return (form.bound * norm / transfer).clamp_max(1)

    return {"scope": "global", "gate": gate}


@cache
def teacher_of(kind: str, seed: int, settings: quickstart.Config) -> VGG:
    """Return a frozen teacher, the same one for all forms."""
    if kind == "untrained":
        torch.manual_seed(seed)
        return VGG(convs_per_stage=2).eval().requires_grad_(requires_grad=False)
    train, _ = quickstart.load(settings.split)
    return quickstart.train_teacher(
        rotated(train) if kind == "rotations" else train, seed, settings
    )


@cache
def heads_of(
    kind: str, k: int, num_heads: int, seed: int, settings: quickstart.Config
) -> GraphTransferLoss:
    """Return attention heads trained on a teacher, the same ones for all forms that can share."""
    train, _ = quickstart.load(settings.split)
    teacher = teacher_of(kind, seed, settings)
    return quickstart.train_heads(teacher, train, seed, replace(settings, num_heads=num_heads), k=k)


def run(config: Config) -> None:
    """Train every row for every seed that has no record yet, and print the table."""
    records = common.read_records(config.out, ["row", "seed", "accuracy"])
    settings = quickstart.Config(
        split=config.split,
        teacher_steps=config.steps,
        student_steps=config.steps,
        head_steps=config.head_steps,
    )
    about = {"split": config.split, "steps": config.steps, "head_steps": config.head_steps}
    if not (config.render or all(about.items() <= record.items() for record in records)):
        raise ValueError(
            f"`--out` must hold records of the same split, steps and head steps; {config.out} has "
            "others. Take another file."
        )
    done = {(record["seed"], record["row"]) for record in records}
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    left = [] if config.render else [cell for cell in product(seeds, ROWS) if cell not in done]
    for seed, name in tqdm(left, "students", disable=not left):
        accuracy = train_student(ROWS[name], seed, settings)
        record = {"row": name, "seed": seed, "accuracy": accuracy, **asdict(ROWS[name]), **about}
        records.append(record | {"versions": common.versions("cpu")})
        records.sort(key=lambda record: list(ROWS).index(record["row"]))
        common.write_records(config.out, records)
    if not records:
        raise ValueError(f"`--out` must hold records to print; {config.out} has none.")
    draw(records, config.out.with_suffix(".png"))
    print(table(records))


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Draw the mean of each row, with the standard deviation over seeds."""
    lines = pd.DataFrame(records).groupby("row", sort=False)["accuracy"].agg(["mean", "std"])
    figure = Figure(figsize=(7.0, 0.5 + 0.24 * len(lines)), layout="constrained")
    axes = figure.subplots()
    axes.barh(lines.index, lines["mean"], xerr=lines["std"].fillna(0))
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set(xlabel="accuracy after the last step, %")
    axes.spines[["top", "right"]].set_visible(False)
    common.save_figure(figure, path)


def table(records: list[dict[str, Any]]) -> str:
    """Return Markdown with a line a row: accuracy, and the difference to own heads by seed."""
    frame = pd.DataFrame(records)
    group = frame["row"].str.split(":").str[0]
    is_usual = frame["row"] == group + ": own heads"
    usual = frame["accuracy"].where(is_usual).groupby([group, frame["seed"]]).transform("last")
    frame["difference"] = (frame["accuracy"] - usual).mask(is_usual)
    rows = frame.rename(columns={"row": "form"}).groupby("form", sort=False)
    columns = {
        "accuracy, %": rows["accuracy"].agg(tables.spread),
        "against own heads, 95 % interval": rows["difference"].agg(tables.interval),
    }
    return str(pd.DataFrame(columns).to_markdown(disable_numparse=True))


if __name__ == "__main__":
    common.command(run, Config, __doc__)
