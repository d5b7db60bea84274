"""Every block of the README is run; what its prose points at exists; its gains are measured."""

import re
import shlex
import subprocess
import sys
from collections import OrderedDict
from functools import cache, partial
from pathlib import Path

import common
import pytest
import tables
import torch
import torch.nn.functional as F
from cifar_files import files, write_folder
from readme import README, blocks, setup_commands
from torch import nn

ROOT = README.parent
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
    for name, value in list(names.items()):
        if name.startswith("test_"):
            value()


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


def test_scripts_of_the_shell_blocks_run_in_miniature(tmp_path):
    write_folder(tmp_path / "data", files())
    commands = [line for text in of("bash") for line in text.splitlines() if "examples/" in line]
    training = [c for c in commands if re.match(r"python examples/(cifar100|reproduce)", c)]
    assert len(training) >= 2
    for n, command in enumerate(training):
        words = [*shlex.split(command)[1:], *MINIATURE.split()]
        words += ["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / f"run{n}")]
        if "reproduce" in command:
            words += ["--methods", "student", "--rows", "VGG", "--seeds", "0"]
        subprocess.run([sys.executable, "-W", "error", *words], cwd=ROOT, check=True)
        assert list((tmp_path / f"run{n}").rglob("records.jsonl"))


@cache
def lines(table):
    path = ROOT / f"examples/results/tinyimagenet32_{table}.jsonl"
    return tables.frame(common.read_records(path))


def mean(table, column, method, **settings):
    """Return the mean of a column over the networks of a table that have a method and settings."""
    values = {"method": method, **settings}
    asked = " and ".join(f"{name} == '{value}'" for name, value in values.items())
    return lines(table).query(asked)[column].mean()


def test_the_readme_states_the_gains_measured_on_100_classes():
    vgg, wrn = (partial(mean, "100", network=name) for name in ("VGG7", "WRN-10-4"))
    methods = ("mhgd-own-heads", "soft-logits", "ab")
    own, soft, fewer = (vgg("gain", method, student_share=0.25) for method in methods)
    (untrained,) = {round(of("gain", "mhgd-own-heads", teacher_epochs=0)) for of in (vgg, wrn)}
    second = [vgg("gain", method, teacher_seed=1) for method in methods]
    second_wrn = wrn("gain", "mhgd-own-heads", teacher_epochs=30, teacher_seed=1)
    alone, longer_alone = (wrn("accuracy", "student", epochs=epochs) for epochs in (60, 180))
    own_wrn, longer = (
        wrn("accuracy", "mhgd-own-heads", epochs=epochs, teacher_epochs=30, teacher_seed=0)
        for epochs in (60, 180)
    )
    ab, longer_ab = (wrn("accuracy", "ab", epochs=epochs) for epochs in (60, 180))
    less, more = (wrn("accuracy", "soft-logits", soft_share=share) for share in (0.3, 0.8))
    own_dev = partial(mean, "100_vgg_tenth_dev", "gain", "mhgd-own-heads", bound=3.0)
    one, eight, many = (own_dev(num_heads=n, batch_size=128) for n in (1, 8, 32))
    large = own_dev(batch_size=256)
    assert abs(many - eight) < 0.1
    assert f"{own:.1f}" == f"{soft:.1f}"
    assert all(vgg("gain", method, student_share=0.25) < 0 for method in ("kd-svdf", "mhgd"))
    check_told(
        f"no better than soft logits (both {own:+.1f}; AB {fewer:+.1f}; "
        "KD-SVDF, shared heads: none).",
        "VGG own heads {:+.1f}, soft logits {:+.1f}, AB {:+.1f}; ".format(*second)
        + f"WRN own heads {second_wrn:+.1f}. With an untrained teacher own heads "
        f"end {-untrained} points below the student alone (VGG, WRN).",
        f"after 60 epochs: student alone {alone:.1f} %, own heads {own_wrn:.1f}, AB {ab:.1f}, soft "
        f"logits {less:.1f} with a weight of 0.3 and {more:.1f} with 0.8; after 180 epochs: "
        f"student alone {longer_alone:.1f} %, own heads {longer:.1f}, AB {longer_ab:.1f}.",
        f"one was {eight - one:.1f} points worse, 32 were no better",
        f"with 256, half the steps, the gain was {eight - large:.1f} points less",
    )


def test_the_readme_states_the_gains_measured_on_ten_classes():
    vgg, wrn = (partial(mean, f"{name}_tenth", "gain", first_epochs=400) for name in ("vgg", "wrn"))
    gains = [vgg("mhgd", bound=bound) for bound in (1.0, 3.0)]
    (others,) = {round(vgg(method)) for method in ("ab", "kd-svdf")}
    assert all(abs(wrn("mhgd", bound=bound)) < 1 for bound in (1.0, 3.0))
    accuracies = partial(mean, "own_heads_dev", "accuracy", student_width=1.0)
    shared = accuracies("mhgd")
    ahead = sorted(shared - accuracies("mhgd-own-heads", bound=bound) for bound in (3.0, 10.0))
    check_told(
        f"VGG: AB, KD-SVDF {others:+}, "
        + "shared heads {:+.0f} to {:+.0f}, ".format(*gains)
        + "own heads {:.0f} to {:.0f} below shared ones. WRN: shared heads 0.".format(*ahead),
    )


def check_told(*told):
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert [one for one in told if one not in text] == []


def test_the_readme_stays_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


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
