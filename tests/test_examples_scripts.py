"""The four scripts and `reproduce.py`: from images to records, killed, copied, among processes."""

import difflib
import os
import random
import shutil
import signal
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
from tables import TABLES, TITLES

EXAMPLES = Path(cifar100_vgg.__file__).parent
SCRIPTS = (cifar100_vgg, cifar100_wrn, tinyimagenet_vgg, tinyimagenet_wrn)
SMALL = {"classes": 3, "limit_per_class": 8, "width": 0.125, "epochs": 2, "first_epochs": 1}
SMALL |= {"batch_size": 8, "num_heads": 2, "learning_rate": 0.02, "device": "cpu"}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return cifar_files.write_folder(tmp_path_factory.mktemp("data"), cifar_files.files())


@pytest.fixture
def settings(data, tmp_path):
    return cifar100_vgg.Settings(**SMALL, data_dir=data, out=tmp_path)


def records(out):
    return {r["settings"]["method"]: r for r in common.read_records(out / "records.jsonl")}


def start(*command, cwd):
    source = str(EXAMPLES.parent / "src")
    environment = os.environ | {"PYTHONPATH": source, "PYTHONWARNINGS": "error"}
    command = [sys.executable, *map(str, command)]
    shown = {"capture_output": True, "text": True}
    done = subprocess.run(command, cwd=cwd, env=environment, timeout=120, check=False, **shown)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_script_trains_where_it_is_copied_with_two_neighbours(data, tmp_path):
    for name in ("cifar100_vgg.py", "common.py", "networks.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    shown = start("cifar100_vgg.py", *FLAGS, "--data-dir", data, "--out", "run", cwd=tmp_path)
    found = records(tmp_path / "run")
    assert found.keys() == {"teacher", "student", "heads", "mhgd"}
    assert f"{found['mhgd']['accuracy']:.2f} %" in shown
    assert (tmp_path / "run/curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_scripts_differ_in_data_networks_and_sensing_points_alone():
    def body(script):
        text = Path(script.__file__).read_text(encoding="utf-8")
        return text.split('"""\n', 1)[1].splitlines()

    for script in SCRIPTS[1:]:
        lines = difflib.ndiff(body(cifar100_vgg), body(script))
        changed = [line for line in lines if line[0] in "+-"]
        expected = ("SENSING_POINTS = ", "data_name: ", "common.read_", "= build(")
        assert changed
        assert all(any(part in line for part in expected) for line in changed), changed


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_shows_a_pair_of_the_tables_and_trains_it(script, data, tmp_path, monkeypatch):
    def read_large(path):
        parts = common.read_cifar100(path)
        return [
            common.ImageSet(p.images.repeat_interleave(2, 2).repeat_interleave(2, 3), p.labels)
            for p in parts
        ]

    monkeypatch.setattr(common, "read_tinyimagenet", read_large)
    shown = script.Settings(**SMALL | {"epochs": 1}, data_dir=data, out=tmp_path)
    script.main(replace(shown, method=("mhgd-scaled",)))
    of_tables = {(r.script, r.teacher, r.student) for rows in TABLES.values() for r in rows}
    settings = records(tmp_path)["mhgd-scaled"]["settings"]
    assert (script.__name__, settings["teacher"], settings["student"]) in of_tables
    assert settings["data"] == ("CIFAR-100" if "cifar" in script.__name__ else "Tiny ImageNet")
    for network in script.networks(script.load(shown), shown):
        assert network.sensing_points == script.SENSING_POINTS


def test_a_record_has_settings_versions_and_every_epoch(settings):
    methods = ("student", "mhgd", "mhgd-tanh", "mhgd-soft-logits", "mhgd-own-heads")
    half = replace(settings, student_width=0.5, method=("student", "mhgd-own-heads"))
    cifar100_vgg.main(half)
    cifar100_vgg.main(replace(settings, amp="bfloat16", method=methods[1:4]))
    found = records(settings.out)
    assert found.keys() == {"teacher", "heads", *methods}
    for method in methods:
        record = found[method]
        epochs = record["phases"]["student"]
        assert [(epoch["epoch"], epoch["learning_rate"]) for epoch in epochs] == [
            *((1, 0.02), (2, pytest.approx(2e-4)))
        ]
        assert record["accuracy"] == epochs[-1]["test_accuracy"]  # the last, not the best
        assert ("transfer_loss" in epochs[0]) == (method != "student")
    assert found["mhgd"]["settings"].items() >= {"bound": 1.0, "gate": "norm", "seed": 0}.items()


def test_a_closed_gate_trains_the_student_as_alone(settings):
    cifar100_vgg.main(replace(settings, bound=1e-12))
    alone, gated = (records(settings.out)[m]["phases"]["student"] for m in ("student", "mhgd"))
    for one, other in zip(alone, gated, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_no_share_of_soft_logits_leaves_the_method_as_it_is(settings):
    methods = ("mhgd", "mhgd-soft-logits")
    cifar100_vgg.main(replace(settings, method=methods, soft_share=0.0))
    plain, mixed = (records(settings.out)[m]["phases"]["student"] for m in methods)
    assert plain == mixed


def test_an_untrained_teacher_is_a_control_without_accuracy(settings):
    cifar100_vgg.main(replace(settings, teacher_epochs=0))
    found = records(settings.out)
    assert "accuracy" not in found["teacher"]
    assert "accuracy" in found["mhgd"]


def killed_until_done(main, settings, kills=5):
    """Run in forks, kill the first ones at random moments; return epochs kept after each.

    A random moment after one more epoch: a slow machine may not have begun before.
    """
    moment, kept = random.Random(0), [0]
    for attempt in range(kills + 1):
        if (process := os.fork()) == 0:
            try:
                main(settings)
                os._exit(0)
            finally:
                os._exit(1)
        if attempt < kills:
            ended, latest = os.WEXITED | os.WNOHANG | os.WNOWAIT, time.monotonic() + 60
            while epochs_in(settings.out) == kept[-1] and time.monotonic() < latest:
                if os.waitid(os.P_PID, process, ended):
                    break
                time.sleep(0.02)
            time.sleep(moment.uniform(0, 0.4))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            kept.append(epochs_in(settings.out))
        else:
            assert os.waitpid(process, 0)[1] == 0
    return kept


def epochs_in(out):
    files = [torch.load(file, weights_only=True) for file in out.rglob("networks/*.pt")]
    return sum(len(epochs) for file in files for epochs in file["record"]["phases"].values())


@pytest.mark.parametrize("what", ["script", "table"])
def test_killed_at_random_moments_it_goes_on_and_ends_the_same(settings, what):
    settings, main = replace(settings, epochs=6), cifar100_vgg.main
    if what == "table":
        main, few = reproduce.main, {"rows": ("VGG",), "seeds": (1,), "methods": ("fsp", "kd-svd")}
        small = SMALL | {"epochs": 6, "data_dir": settings.data_dir, "out": settings.out}
        settings = reproduce.Settings(**small, **few)
    outs = settings.out / "killed", settings.out / "whole"
    kept = killed_until_done(main, replace(settings, out=outs[0]))
    assert kept == sorted(kept)  # what was checkpointed is never lost
    assert kept[-1] > 0
    assert not list(outs[0].rglob("*.part"))
    main(replace(settings, out=outs[1]))
    killed, whole = (
        [{k: v for k, v in record.items() if k != "seconds"} for record in records(out).values()]
        for out in outs
    )
    assert killed == whole


def test_two_processes_share_each_batch_and_leave_one_record(data, settings, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    out = ["--data-dir", data, "--out", tmp_path / "two"]
    start(*command, EXAMPLES / "cifar100_vgg.py", *FLAGS, *out, cwd=tmp_path)
    lines = common.read_records(tmp_path / "two/records.jsonl")
    methods = [line["settings"]["method"] for line in lines]
    assert methods == ["teacher", "student", "heads", "mhgd"]
    assert all(line["versions"]["hardware"].startswith("2 × ") for line in lines)
    cifar100_vgg.main(settings)
    two, one = records(tmp_path / "two"), records(settings.out)
    for method in ("teacher", "student"):  # batch norm on a CPU sees one process's part
        losses = [r[method]["phases"][method][0]["loss"] for r in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.parametrize(
    ("script", "flag", "message"),
    [
        (cifar100_vgg, "--data-dir=none", "a.py: `--data-dir` must be or contain"),
        (cifar100_vgg, "--epochs=0", "must be ≥ 1; got 0"),
        (cifar100_vgg, "--epoch=1", "Unrecognized"),
        (cifar100_vgg, "--device=meta", "--device"),
        (reproduce, "--seed=1", "Unrecognized"),  # that is --seeds
    ],
)
def test_a_wrong_flag_ends_in_a_message(script, flag, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["a.py", flag, *(["--device=cpu"] * ("device" not in flag))])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        common.command(script.main, script.Settings, script.__doc__)
    own = "" if end.value.code == 2 else end.value.code
    assert "\n" not in own
    assert message in own + "".join(capsys.readouterr())
    assert not list(tmp_path.iterdir())


def test_every_baseline_trains_by_the_optimizer_of_the_script(data, tmp_path, capsys, monkeypatch):
    used, original = [], cifar100_wrn.gated_sgd
    monkeypatch.setattr(cifar100_wrn, "gated_sgd", lambda *a: used.append(a) or original(*a))
    settings = reproduce.Settings(
        **SMALL | {"epochs": 1}, data_dir=data, out=tmp_path, seeds=(0,), table=("sota",)
    )
    reproduce.main(replace(settings, methods=(*RECIPES, "student", "mhgd-scaled")))
    found = records(tmp_path)
    assert set(RECIPES) <= found.keys()
    assert found["fsp"]["phases"].keys() == {"initialise", "student"}
    assert found["ft"]["phases"].keys() == {"paraphraser", "student"}
    assert len(used) >= 3 + len(RECIPES) + 3  # three of them have two phases
    shown = capsys.readouterr().out
    assert all(f"| {recipe.title} " in shown for recipe in RECIPES.values())
    # The same command again trains nothing.
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.pt")}
    reproduce.main(replace(settings, methods=tuple(RECIPES)))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.pt")} == written


def test_a_cell_that_diverges_is_left_out_and_named(data, tmp_path):
    settings = reproduce.Settings(**SMALL | {"learning_rate": 1e12}, data_dir=data, out=tmp_path)
    few = replace(settings, rows=("VGG",), seeds=(0,), methods=("student", "mhgd"))
    with pytest.raises(FileNotFoundError, match="must be a file of records; there is none"):
        reproduce.main(few)
    good = replace(few, learning_rate=0.02, methods=("student",))
    reproduce.main(good)
    with pytest.raises(SystemExit, match=r"VGG, teacher, seed 0: .*must stay finite"):
        reproduce.main(few)


def test_students_of_several_seeds_can_share_a_teacher(data, tmp_path):
    settings = reproduce.Settings(
        **SMALL, data_dir=data, out=tmp_path, rows=("VGG",), methods=("student", "ab", "mhgd")
    )
    reproduce.main(replace(settings, seeds=(1,)))
    shared = replace(settings, seeds=(1, 2), teacher_seed=0)
    reproduce.main(shared)
    cells = [r["settings"] for r in common.read_records(tmp_path / "records.jsonl")]
    seeds = {method: [] for method in ("teacher", "heads", "student", "ab", "mhgd")}
    for cell in cells:
        seeds[cell["method"]].append((cell["seed"], cell.get("teacher_seed")))
    assert seeds["teacher"] == seeds["heads"] == [(1, None), (0, None)]
    assert seeds["student"] == [(1, None), (2, None)]  # it has no teacher
    assert seeds["ab"] == seeds["mhgd"] == [(1, None), (1, 0), (2, 0)]


def test_every_table_names_its_cells_and_what_was_published():
    for table, rows in TABLES.items():
        settings = reproduce.Settings(table=(table,), seeds=(0, 0, 1), device="cpu")
        cells = list(reproduce.cells(settings))
        assert {of.seed for _, _, of in cells} == {0, 1}
        assert {row.title for row, _, _ in cells} == {row.title for row in rows}
    heads = {row.num_heads: row.published for row in TABLES["heads"]}
    assert heads[4] == {"mhgd": 67.01}
    assert sum(sum(row.published.values()) for row in TABLES["sota"]) == pytest.approx(880.97)
    assert set(TITLES) >= set(RECIPES) | set(cifar100_vgg.Method.__args__)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": ("VGG16",)}, r"`--rows` must be some of \['VGG', 'WRN'\]; got 'VGG16'"),
        ({"table": ("heads",), "methods": ("ab",)}, "heads must be some of student, mhgd; got ab"),
        ({"seeds": (-1,)}, r"`--seeds` must be ≥ 0 and < 2\*\*63; got -1"),
        ({"teacher_seed": -1}, r"`--teacher-seed` must be ≥ 0 and < 2\*\*63; got -1"),
    ],
)
def test_cells_that_are_not_in_a_table_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        reproduce.Settings(device="cpu", **change)
