"""Every block of the README is run; what its prose points at exists; its gains are measured."""

import re
import runpy
import shlex
import sys
from collections import OrderedDict
from functools import cache, partial
from pathlib import Path

import common
import pytest
import quickstart
import tables
import torch
import torch.nn.functional as F
from cifar_files import files, write_folder
from networks import build
from readme import README, blocks, setup_commands
from torch import nn
from torch.nn.utils import parameters_to_vector

from graph_kd import GraphTransferLoss

ROOT = README.parent
TEXT = README.read_text(encoding="utf-8")
MINIATURE = (
    "--width 0.05 --epochs 1 --first-epochs 1 --batch-size 3 --classes 3 --limit-per-class 2 "
    "--device cpu --num-heads 2"
)


def of(language):
    return [block.text for block in blocks() if block.language == language]


def test_every_block_is_of_a_kind_that_is_run_here():
    assert {block.language for block in blocks()} == {"bash", "diff", "python"}


def test_python_blocks_run_one_after_another():
    torch.manual_seed(0)
    names = {}
    for code in of("python"):
        exec(compile(code, str(README), "exec"), names)


def small_network(depth):
    stages = OrderedDict()
    for n, (incoming, channels) in enumerate(((3, 16), (16, 32), (32, 64)), start=1):
        convs = [nn.Conv2d(incoming, channels, 3, stride=2, padding=1)]
        convs += [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(depth)]
        stages[f"stage{n}"] = nn.Sequential(*convs, nn.ReLU())
    stages["head"] = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(stages)


@pytest.mark.parametrize("signs", [" -", " +"], ids=["before", "after"])
def test_diff_is_a_loop_that_runs_before_and_after(signs):
    (diff,) = of("diff")
    code = "\n".join(line[1:] for line in diff.splitlines() if line[:1] in signs or not line)
    torch.manual_seed(0)
    student, teacher = small_network(0), small_network(1)
    loader = [(torch.randn(8, 3, 8, 8), torch.randint(10, (8,))) for _ in range(2)]
    before = [p.detach().clone() for p in student.parameters()]
    names = {"torch": torch, "F": F, "student": student, "teacher": teacher, "loader": loader}
    exec(compile(code, str(README), "exec"), names)
    assert ("transfer" in names) == (signs == " +")
    changed = [not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True)]
    assert all(changed)


def test_scripts_of_the_shell_blocks_run_in_miniature(tmp_path, monkeypatch):
    write_folder(tmp_path / "data", files())
    commands = [line for text in of("bash") for line in text.splitlines() if "examples/" in line]
    training = [c for c in commands if re.match(r"python examples/(cifar100|reproduce)", c)]
    assert len(training) >= 2
    for n, command in enumerate(training):
        words = [*shlex.split(command)[1:], *MINIATURE.split()]
        words += ["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / f"run{n}")]
        if "reproduce" in command:
            words += ["--methods", "student", "--rows", "VGG", "--seeds", "0"]
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(words[0], run_name="__main__")
        assert list((tmp_path / f"run{n}").rglob("records.jsonl"))


@cache
def lines(table):
    path = ROOT / f"examples/results/tinyimagenet32_{table}.jsonl"
    return tables.frame(common.read_records(path))


def values(table, column, method, **settings):
    """Return a column over the networks of a table that have a method and settings."""
    asked = {"method": method, **settings}
    query = " and ".join(f"{name} == '{value}'" for name, value in asked.items())
    return lines(table).query(query)[column].dropna()


def by_seed(table, *asked, **settings):
    found = values(table, "accuracy", *asked, **settings)
    return found.set_axis(lines(table)["seed"][found.index])


def mean(*asked, **settings):
    return values(*asked, **settings).mean()


METHODS = {  # by the columns of the README
    "own heads": "mhgd-own-heads",
    "shared heads": "mhgd",
    "own heads + soft logits": "mhgd-own-heads-soft-logits",
    "soft logits": "soft-logits",
    "AB": "ab",
    "KD-SVDF": "kd-svdf",
}
VGG = {"network": "VGG7", "epochs": 60, "teacher_seed": 0, "teacher_epochs": 30}
WRN = {**VGG, "network": "WRN-10-4"}
TEACHERS = ("VGG16", "WRN-22-4")
PAIRS = {"VGG7": "VGG16, VGG7", "WRN-10-4": "WRN-22-4, WRN-10-4"}
ROWS = {  # of the README: table of records, settings of its networks, and those of single methods
    "100 classes, 50 each": ("100", {**VGG, "student_share": 0.1}, {}),
    "100 classes, 125 each": ("100", {**VGG, "student_share": 0.25}, {}),
    "100 classes, 50 each, WRN": (
        "100",
        {**WRN, "student_share": 0.1},
        {"soft-logits": {"soft_share": 0.3}},
    ),
    "100 classes, 50 each, WRN, longer": ("100", {**WRN, "student_share": 0.1, "epochs": 180}, {}),
    "10 classes, 50 each": (
        "vgg_tenth",
        {"network": "VGG7", "epochs": 150, "first_epochs": 400},
        {"mhgd": {"bound": 3.0}},
    ),
}


def row_of_gains(images):
    """Return a row of the README: brackets where the interval includes zero, the best in bold."""
    table, settings, of_method = ROWS[images]
    own = ("teacher_seed", "teacher_epochs", "first_epochs")  # no settings of the student alone
    alone = {name: value for name, value in settings.items() if name not in own}
    times = (alone["epochs"], 3 * alone["epochs"])  # a step of MHGD takes three times as long
    short, long = (by_seed(table, "student", **{**alone, "epochs": count}) for count in times)
    gains = {"alone, 3 × epochs": (long - short).dropna()}
    gains |= {
        column: values(table, "gain", method, **settings, **of_method.get(method, {}))
        for column, method in METHODS.items()
    }
    best = max(gain.mean() for gain in gains.values() if len(gain))
    row = {"student's images": ",".join(images.split(",")[:2])}
    row["teacher, student"] = PAIRS[settings["network"]]
    row["epochs"] = str(settings["epochs"])
    row["alone, %"] = f"{mean(table, 'accuracy', 'student', **alone):.1f}"
    for column, gain in gains.items():
        assert len(gain) in (0, 3)
        shown = f"{gain.mean():+.1f}" if len(gain) else tables.MISSING
        row[column] = f"**{shown}**" if gain.mean() == best else shown
        if len(gain) and re.match(r"-.* \+", tables.interval(gain)):
            row[column] = f"({row[column]})"
    return row


def test_the_readme_shows_the_measured_gains():
    (table,) = [t for t in re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE) if "alone, %" in t]
    head, _, *shown = [
        [c.strip() for c in line.strip("| ").split("|")] for line in table.split("\n")[:-1]
    ]
    assert [dict(zip(head, line, strict=True)) for line in shown] == [*map(row_of_gains, ROWS)]


def records_of(method, **asked):
    """Return the records of a method on 100 classes with 50 images each."""
    asked |= {"method": method, "student_share": 0.1}
    records = common.read_records(ROOT / "examples/results/tinyimagenet32_100.jsonl")
    return [record for record in records if asked.items() <= record["settings"].items()]


def test_the_readme_states_what_else_was_measured():
    tenth = {"student_share": 0.1, "epochs": 60}
    both = [{**pair, **tenth, "teacher_seed": 1} for pair in (VGG, WRN)]
    second = [mean("100", "gain", "mhgd-own-heads", **settings) for settings in both]
    (untrained,) = {
        round(mean("100", "gain", "mhgd-own-heads", **{**pair, "teacher_epochs": 0}))
        for pair in (VGG, WRN)
    }
    own_dev = partial(mean, "100_vgg_tenth_dev", "gain", "mhgd-own-heads", bound=3.0)
    one, eight, many = (own_dev(num_heads=n, batch_size=128) for n in (1, 8, 32))
    large = own_dev(batch_size=256)
    assert abs(many - eight) < 0.1
    ten = partial(mean, "own_heads_dev", "accuracy", student_width=1.0)  # classes
    assert ten("mhgd") > max(ten("mhgd-own-heads", bound=bound) for bound in (3.0, 10.0))
    phase_1 = [
        record
        for teacher in TEACHERS
        for record in records_of("heads", teacher=teacher, teacher_epochs=30, seed=0)
    ]
    losses = [record["phases"]["heads"][-1]["loss"] for record in phase_1]
    (steps,) = {len(record["phases"]["heads"]) * (5000 // 128) for record in phase_1}
    alone = [records_of("student", student=name, epochs=60) for name in ("VGG7", "WRN-10-4")]
    ratios = [
        3 * heads["seconds"]["heads"] / sum(record["seconds"]["student"] for record in seeds)
        for heads, seeds in zip(phase_1, alone, strict=True)
    ]
    ab = partial(values, "100", "first_epochs", "ab")
    (tenth_of_ab,), (quarter_of_ab,) = (ab(student_share=share).unique() for share in (0.1, 0.25))
    student = build("VGG7", 100, 1.0, image_size=32)
    heads = GraphTransferLoss(student.channels, student_channels=student.channels).student_heads
    sizes = [len(parameters_to_vector(net.parameters())) for net in (heads, student)]
    assert sizes[0] > sizes[1]
    digits = re.findall(r"(?:teacher|alone|soft logits|own heads) (\d+\.\d)", quickstart.__doc__)
    for told in (
        f"pre-trains the student for {tenth_of_ab} epochs (125 images: {quarter_of_ab}; ten "
        f"classes: {ROWS['10 classes, 50 each'][1]['first_epochs']}).",
        "kept the gain: {:+.1f} (VGG), {:+.1f} (WRN, 60 epochs).".format(*second),
        "100 classes are right on only {:.0f} % (VGG) and {:.0f} % (WRN) of the test images".format(
            *(mean("100", "accuracy", "teacher", network=name, teacher_seed=0) for name in TEACHERS)
        ),
        f"teachers, students with own heads ended {-untrained} points below the student alone",
        "a class it fell to {:.2f} (VGG) and {:.2f} (WRN) in".format(*losses) + f" {steps:,} steps",
        "took {:.1f} × (VGG) and {:.1f} × (WRN) as long as 60 epochs of the".format(*ratios),
        "Teacher {} %, student alone {} %, with soft logits {} %, with own heads {} %.".format(
            *digits
        ),
        f"one was {eight - one:.1f} points worse, 32 were no better",
        f"with 256, so half the steps, the gain was {eight - large:.1f} points smaller",
    ):
        assert told in " ".join(TEXT.split())


def test_the_readme_stays_short():
    assert len(TEXT.splitlines()) <= 200


def test_two_commands_do_the_set_up():
    extras = [re.search(r'"\.\[(\w+)\]"', command).group(1) for command in setup_commands()]
    assert extras == ["examples", "dev"]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f"\n{extra} = [" in project for extra in extras)


def test_continuous_integration_runs_the_commands_of_the_readme():
    assert "tests/readme.py" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "examples/README.md", "tests/golden/README.md"])
def test_paths_named_in_a_page_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    links += re.findall(r'src="([^"]+)"', text)
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    named = re.findall(r"`((?:examples|tests|src)/[\w./-]*)`", text)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_changelog_names_the_version():
    import graph_kd

    assert f"## [{graph_kd.__version__}]" in Path(ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
