"""The four scripts and `reproduce.py`: from images to records, killed, copied, among processes."""

import difflib
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cifar100_vgg
import cifar100_wrn
import cifar_files
import common
import pytest
import reproduce
import tinyimagenet_vgg
import tinyimagenet_wrn
import torch
from baselines import RECIPES
from tables import ROWS, TITLES, Table
from torch.nn.functional import interpolate

EXAMPLES = Path(cifar100_vgg.__file__).parent
SCRIPTS = (cifar100_vgg, cifar100_wrn, tinyimagenet_vgg, tinyimagenet_wrn)
SMALL = {"classes": 3, "limit_per_class": 8, "width": 0.125, "epochs": 2, "first_epochs": 1}
SMALL |= {"batch_size": 8, "num_heads": 2, "learning_rate": 0.02, "device": "cpu"}


@pytest.fixture
def small(tmp_path):
    """Return settings of a script, of a small run."""
    paths = {"data_dir": tmp_path / "data", "out": tmp_path}
    cifar_files.write_folder(paths["data_dir"], cifar_files.files())
    return lambda script=cifar100_vgg, **changes: script.Settings(**SMALL | paths | changes)


def records(out):
    return {r["settings"]["method"]: r for r in common.read_records(out / "records.jsonl")}


def test_the_scripts_differ_in_data_networks_and_sensing_points_alone():
    texts = [Path(script.__file__).read_text(encoding="utf-8") for script in SCRIPTS]
    first, *others = (text.split('"""\n', 1)[1].splitlines() for text in texts)
    for other in others:
        lines = difflib.ndiff(first, other)
        changed = [line for line in lines if line[0] in "+-"]
        expected = ("TEACHER, ", "SENSING_POINTS = ", "data_name: ", "common.read_", "place(build(")
        assert changed
        assert all(any(part in line for part in expected) for line in changed), changed


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_shows_a_pair_of_the_tables_and_trains_it(script, small, monkeypatch):
    def read_large(path):
        parts = common.read_cifar100(path)
        return [replace(part, images=interpolate(part.images, scale_factor=2)) for part in parts]

    monkeypatch.setattr(common, "read_tinyimagenet", read_large)
    shown = small(script, epochs=1, method=("mhgd-scaled",))
    script.main(shown)
    of_tables = {(row["script"], row["of_teacher"], row["of_student"]) for row in ROWS}
    settings = records(shown.out)["mhgd-scaled"]["settings"]
    assert (script.__name__, settings["teacher"], settings["student"]) in of_tables
    assert settings["data"] == ("CIFAR-100" if "cifar" in script.__name__ else "Tiny ImageNet")
    for name in (script.TEACHER, script.STUDENT):
        network = script.new_network(name, shown.width, script.load(shown), shown)
        assert network.sensing_points == script.SENSING_POINTS


def test_a_record_has_settings_versions_and_every_epoch(small, tmp_path):
    methods = ("student", "mhgd", "mhgd-tanh", "mhgd-soft-logits", "mhgd-own-heads")
    half = small(student_width=0.5, method=("student", "mhgd-own-heads"))
    cifar100_vgg.main(replace(half, teacher_epochs=0))
    assert "accuracy" not in records(tmp_path)["teacher"]  # an untrained one is a control
    cifar100_vgg.main(small(amp="bfloat16", method=methods[1:4]))
    found = records(tmp_path)
    assert found.keys() == {"teacher", "heads", *methods}
    for method in methods:
        record = found[method]
        epochs = record["phases"]["student"]
        assert [epoch["epoch"] for epoch in epochs] == [1, 2]
        assert [epoch["learning_rate"] for epoch in epochs] == pytest.approx([0.02, 2e-4])
        assert record["accuracy"] == epochs[-1]["test_accuracy"]  # the last, not the best
        assert ("transfer_loss" in epochs[0]) == (method != "student")
    assert found["mhgd"]["settings"].items() >= {"bound": 1.0, "gate": "norm", "seed": 0}.items()
    assert found["mhgd-own-heads"]["settings"]["bound"] == 3.0


@pytest.mark.parametrize(
    ("closed", "methods"),
    [({"bound": 1e-12}, ("student", "mhgd")), ({"soft_share": 0.0}, ("mhgd", "mhgd-soft-logits"))],
)
def test_a_term_that_is_shut_off_leaves_the_method_as_without(small, tmp_path, closed, methods):
    cifar100_vgg.main(small(method=methods, **closed))
    phases = (records(tmp_path)[method]["phases"]["student"] for method in methods)
    for plain, other in zip(*phases, strict=True):
        assert {name: other[name] for name in plain} == pytest.approx(plain, rel=1e-4)


def epochs_in(out):
    files = [torch.load(file, weights_only=True) for file in out.rglob("networks/*.pt")]
    return sum(len(epochs) for file in files for epochs in file["record"]["phases"].values())


def epochs_kept(main, settings, kills=5):
    """Kill forks at random moments after one more epoch, then run on; return epochs kept."""
    moment, kept = random.Random(0), [0]
    for _ in range(kills):
        process = multiprocessing.get_context("fork").Process(target=main, args=(settings,))
        process.start()
        latest = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < latest:
            if epochs_in(settings.out) > kept[-1]:
                break
            time.sleep(0.1)
        time.sleep(moment.uniform(0, 0.4))
        process.kill()
        process.join()
        kept.append(epochs_in(settings.out))
    main(settings)
    return kept


def test_killed_at_random_moments_it_goes_on_and_ends_the_same(small, tmp_path):
    outs = tmp_path / "killed", tmp_path / "whole"
    # The script's own training, and a baseline with two phases.
    cells = {"rows": ("VGG",), "seeds": (1,), "methods": ("mhgd-own-heads", "fsp")}
    changes = {"epochs": 6, "teacher_epochs": 1, "first_epochs": 4, **cells}
    killed, whole = (small(reproduce, out=out, **changes) for out in outs)
    kept = epochs_kept(reproduce.main, killed)
    assert kept == sorted(kept)  # what was checkpointed is never lost
    assert kept[-1] > 0
    assert not list(killed.out.rglob("*.part"))
    reproduce.main(whole)
    one, other = ([r | {"seconds": None} for r in records(out).values()] for out in outs)
    assert one == other


def test_a_script_copied_with_two_neighbours_trains_in_one_process_and_in_two(small, tmp_path):
    for name in ("cifar100_vgg.py", "common.py", "networks.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    environment = os.environ | {"PYTHONPATH": f"{EXAMPLES.parent}/src", "PYTHONWARNINGS": "error"}
    options = {"cwd": tmp_path, "env": environment, "timeout": 120, "check": False, "text": True}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    flags.append(f"--data-dir={small().data_dir}")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = []
    for name, launcher in (("one", []), ("two", torchrun)):
        command = [sys.executable, *launcher, "cifar100_vgg.py", *flags]
        done = subprocess.run([*command, f"--out={name}"], capture_output=True, **options)
        assert done.returncode == 0, done.stderr
        lines = common.read_records(tmp_path / name / "records.jsonl")
        methods = [line["settings"]["method"] for line in lines]
        assert methods == ["teacher", "student", "heads", "mhgd", "mhgd-own-heads"]  # one of each
        assert f"{lines[-1]['accuracy']:.2f} %" in done.stdout
        assert (tmp_path / name / "curves.png").read_bytes().startswith(b"\x89PNG")
        found.append(lines)
    assert all(line["versions"]["hardware"].startswith("2 × ") for line in found[1])
    for one, two in list(zip(*found, strict=True))[:2]:  # the teacher and the student alone
        losses = [r["phases"][r["settings"]["method"]][0]["loss"] for r in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=0.1)  # batch norm sees one process's part


def test_every_table_names_its_cells():
    for table in Table.__args__:
        settings = reproduce.Settings(table=(table,), seeds=(0, 0, 1), device="cpu")
        cells = list(reproduce.cells(settings))
        assert {of.seed for _, _, of in cells} == {0, 1}
        rows = {row["row"] for row in ROWS if row["table"] == table}
        assert {row["row"] for row, _, _ in cells} == rows != set()
    assert set(TITLES) >= set(RECIPES) | set(cifar100_vgg.Method.__args__)


def test_every_baseline_trains_by_the_optimizer_of_the_script(small, tmp_path, capsys, monkeypatch):
    used, original = [], cifar100_wrn.gated_sgd
    monkeypatch.setattr(cifar100_wrn, "gated_sgd", lambda *a: used.append(a) or original(*a))
    settings = small(reproduce, epochs=1, seeds=(0,), table=("sota",))
    reproduce.main(replace(settings, methods=(*RECIPES, "student", "mhgd-scaled")))
    found = records(tmp_path)
    assert found["fsp"]["phases"].keys() == {"initialise", "student"}
    assert found["ft"]["phases"].keys() == {"paraphraser", "student"}
    assert len(used) >= 3 + len(RECIPES) + 3  # three of them have two phases
    shown = capsys.readouterr().out
    assert all(f"| {recipe.title} " in shown for recipe in RECIPES.values())
    assert (tmp_path / "records.png").read_bytes().startswith(b"\x89PNG")
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.pt")}
    reproduce.main(replace(settings, methods=tuple(RECIPES)))  # again: it trains nothing
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.pt")} == written


def test_students_of_several_seeds_can_share_a_teacher(small, tmp_path):
    settings = small(reproduce, rows=("VGG",), methods=("student", "ab", "mhgd"), seeds=(1,))
    reproduce.main(settings)
    reproduce.main(replace(settings, seeds=(1, 2), teacher_seed=0))
    seeds = {method: [] for method in ("teacher", "heads", "student", "ab", "mhgd")}
    for record in common.read_records(tmp_path / "records.jsonl"):
        cell = record["settings"]
        seeds[cell["method"]].append((cell["seed"], cell.get("teacher_seed")))
    assert seeds["teacher"] == seeds["heads"] == [(1, None), (0, None)]
    assert seeds["student"] == [(1, None), (2, None)]  # it has no teacher
    assert seeds["ab"] == seeds["mhgd"] == [(1, None), (1, 0), (2, 0)]


def test_a_cell_that_diverges_is_left_out_and_named(small):
    good = small(reproduce, rows=("VGG",), seeds=(0,), methods=("student",))
    wild = replace(good, learning_rate=1e12, methods=("student", "mhgd"))
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            reproduce.main(wild)
        for method in ("teacher", "mhgd"):
            assert f"\ncifar100_vgg, VGG, {method}, seed 0: The loss must stay" in end.value.code
        reproduce.main(good)
    untrained = replace(wild, out=good.out / "untrained", teacher_epochs=0, methods=("mhgd",))
    with pytest.raises(SystemExit, match=r"VGG, mhgd, seed 0: .*must stay finite"):
        reproduce.main(untrained)  # its records have no accuracy to show
    with pytest.raises(ValueError, match=r"none\.jsonl` must hold a measured network"):
        reproduce.main(replace(good, render=(good.out / "none.jsonl",)))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "a measured network"), ("5", "a JSON record"), ("{}", "a JSON record"), ("{", "a JSON")],
)
def test_a_file_of_other_records_is_refused_before_a_network_trains(small, text, message):
    settings = small(reproduce, rows=("VGG",), methods=("student",))
    file = settings.out / "records.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"records.jsonl` must hold {message}"):
        reproduce.main(replace(settings, render=(file,)))
    if text:
        with pytest.raises(ValueError, match=f"records.jsonl` must hold {message}"):
            cifar100_vgg.main(small(cifar100_vgg))
        assert not (settings.out / "networks").exists()


@pytest.mark.parametrize(
    ("script", "flag", "message"),
    [
        (cifar100_vgg, "--data-dir=none", "a.py: `--data-dir` must be or contain"),
        (cifar100_vgg, "--epochs=0", "must be > 0 and finite; got 0"),
        (cifar100_vgg, "--student-width=0.5", "must be 1 for the method mhgd,"),
        (reproduce, "--student-width=0.5", "must be 1 for the method mhgd,"),
        (cifar100_vgg, "--epoch=1", "Unrecognized"),
        (cifar100_vgg, "--device=meta", "--device"),
        (reproduce, "--seed=1", "Unrecognized"),  # that is --seeds
        (reproduce, "--seeds", "must be at least one; got none"),
    ],
)
def test_a_wrong_flag_ends_in_a_message(script, flag, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["a.py", "--device=cpu", flag])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        common.command(script.main, script.Settings, script.__doc__)
    assert "\n" not in str(end.value.code)
    assert message in str(end.value.code) + "".join(capsys.readouterr())
    assert not list(tmp_path.iterdir())
