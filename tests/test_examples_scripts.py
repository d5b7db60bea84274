"""The four scripts in miniature, end to end; interrupted anywhere; and what they refuse."""

import contextlib
import errno
import io
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import cifar100_vgg
import cifar100_wrn
import pytest
import tinyimagenet_vgg
import tinyimagenet_wrn
import torch
from cifar_files import binary_files, python_files, write_archive, write_folder
from parts import files, runs
from parts.baselines.recipes import RECIPES
from parts.engine import nesterov, step_decay
from parts.methods import METHODS, MHGD
from parts.models import build
from parts.script import Method, main
from parts.settings import Settings
from tinyimagenet_files import tinyimagenet_files

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPT = EXAMPLES / "cifar100_vgg.py"
SCRIPTS = (cifar100_vgg, cifar100_wrn, tinyimagenet_vgg, tinyimagenet_wrn)
SMALL = [
    *("--width", "0.1", "--epochs", "2", "--first-epochs", "1", "--batch-size", "4"),
    *("--device", "cpu", "--num-heads", "2"),
]


# Of each way to train one, and all that have parameters of their own.
SCHEDULES = ["fitnet", "ft", "dml", "kd-svd", "mhgd-soft-logits"]


class Done(NamedTuple):
    returncode: object
    stdout: str
    last_error: str


def run(*flags, script=cifar100_vgg):
    """Run a script in this process, as the command line would."""
    words = [script.__file__, *map(str, flags)]
    returncode, out, err = 0, io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", words),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main(script.EXPERIMENT, script.__doc__)
        except SystemExit as end:
            returncode = end.code
    last = returncode if isinstance(returncode, str) else (err.getvalue().splitlines() or [""])[-1]
    return Done(returncode, out.getvalue(), last)


def networks(out):
    """Return what a finished run has trained, and its records, by folder."""
    found = {}
    for path in sorted(out.rglob("model.pt")):
        model = torch.load(path, weights_only=True)["model"]
        found[str(path.parent.relative_to(out))] = (
            (path.parent / "record.json").read_bytes(),
            {key: tensor.numpy().tobytes() for key, tensor in model.items()},
        )
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), python_files())


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    done = run("--data-dir", data, "--out", out, *SMALL)
    assert done.returncode == 0, done.last_error
    return out, done


def test_leaves_records_lines_curves_and_networks(finished):
    out, done = finished
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == sorted(
        [
            ".lock",
            "curves.png",
            *(
                f"{folder}/{file}"
                for folder in ("teacher", "estimators,num_heads=2", "VGG7/student",
                               "VGG7/mhgd,num_heads=2")
                for file in (".lock", "epochs.jsonl", "model.pt", "record.json", "seconds.json")
            ),
        ]
    )  # fmt: skip
    for folder, title, phase in (
        ("teacher", "VGG16", "teacher"),
        ("VGG7/student", "Student", "student"),
        ("VGG7/mhgd,num_heads=2", "MHGD", "student"),
    ):
        record = json.loads((out / folder / "record.json").read_text())
        lines = (out / folder / "epochs.jsonl").read_text().splitlines()
        epochs = record["phases"][phase]["epochs"]
        assert [json.loads(line) for line in lines] == [{"phase": phase, **e} for e in epochs]
        assert {"graph_kd", "torch", "python", "hardware", "commit"} == set(record["environment"])
        assert record["accuracy"] == epochs[-1]["test_accuracy"]
        assert record["best_accuracy"] == max(epoch["test_accuracy"] for epoch in epochs)
        assert f"{title:20} {record['accuracy']:6.2f} %" in done.stdout
        assert json.loads((out / folder / "seconds.json").read_text())[phase] > 0
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_teacher_is_measured_and_told_before_it_teaches(finished):
    out, done = finished
    teacher = json.loads((out / "teacher" / "record.json").read_text())
    taught = json.loads((out / "VGG7" / "mhgd,num_heads=2" / "record.json").read_text())
    assert taught["teacher_accuracy"] == teacher["accuracy"]
    assert f"mhgd,num_heads=2: the teacher has {teacher['accuracy']:.2f} %" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: Path(script.__file__).stem)
def test_every_script_runs_to_its_end(script, data, tmp_path, monkeypatch):
    folder = data
    if "tiny" in script.__file__:
        folder = write_folder(tmp_path / "tiny", tinyimagenet_files())
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = ["--data-dir", folder, "--out", tmp_path / "out", *SMALL, "--epochs", "1"]
    done = run(*small, script=script)
    assert done.returncode == 0, done.last_error
    assert len(networks(tmp_path / "out")) == 4


def test_every_script_shows_the_networks_of_the_tables():
    for script in SCRIPTS:
        size = 64 if "tiny" in script.__file__ else 32
        experiment = script.EXPERIMENT
        for name, make in (
            (experiment.teacher_name, experiment.teacher),
            (experiment.student_name, experiment.student),
        ):
            own, of_table = make(4, 0.1), build(name, 4, 0.1, size)
            assert own.image_size == size
            assert repr(own) == repr(of_table)


def test_every_script_shows_the_same_sensing_points_in_both_networks():
    for script in SCRIPTS:
        experiment = script.EXPERIMENT
        teacher, student = experiment.teacher(4, 0.1), experiment.student(4, 0.1)
        assert teacher.sensing_points == student.sensing_points
        assert teacher.channels == student.channels
        settings = Settings(bound=3.0, gate="sigmoid", num_heads=3)
        loss = experiment.transfer_loss(student.channels, None, "tanh", settings)
        assert (loss.channels, loss.squash) == (student.channels, "tanh")
        assert {e.num_heads for e in loss.estimators} == {3}
        optimizer = experiment.gated_optimizer(list(student.parameters()), settings)
        assert (optimizer.gate, optimizer.bound) == ("sigmoid", 3.0)
        assert optimizer.param_groups[0]["weight_decay"] == 5e-4


@pytest.mark.parametrize(
    ("epochs", "exponents"),
    [(1, [0]), (2, [0, 2]), (3, [0, 1, 3]), (10, [0, 0, 0, 1, 1, 1, 2, 2, 3, 3])],
)
def test_rate_falls_at_30_60_and_80_per_cent_of_the_epochs(epochs, exponents):
    optimizer = nesterov([torch.nn.Parameter(torch.zeros(1))], 1.0)
    scheduler, rates = step_decay(optimizer, epochs), []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1**exponent for exponent in exponents])


def test_the_scripts_offer_every_method():
    assert Method.__args__ == METHODS
    assert {RECIPES[m].schedule for m in RECIPES} == {
        RECIPES[m].schedule for m in SCHEDULES if m in RECIPES
    }


def test_every_method_trains(data, tmp_path):
    flags = ["--data-dir", data, "--out", tmp_path / "out", *SMALL, "--epochs", "1"]
    done = run(*flags, "--method", *METHODS)
    assert done.returncode == 0, done.last_error
    assert len(networks(tmp_path / "out")) == 2 + len(METHODS)


class InterruptedRunError(RuntimeError):
    pass


@pytest.fixture(scope="module")
def at_once(data, tmp_path_factory):
    """A method of every schedule, trained without interruption."""
    out = tmp_path_factory.mktemp("at_once") / "out"
    done = run("--data-dir", data, "--out", out, *SMALL, "--method", *SCHEDULES)
    assert done.returncode == 0, done.last_error
    return networks(out)


def test_every_schedule_interrupted_after_every_checkpoint_ends_the_same(
    at_once, data, tmp_path, monkeypatch
):
    save, saved = runs.Run._save, []

    def save_and_stop(self, *arguments):
        save(self, *arguments)
        saved.append(arguments[0])
        raise InterruptedRunError("stop")

    monkeypatch.setattr(runs.Run, "_save", save_and_stop)
    again = ["--data-dir", data, "--out", tmp_path / "out", *SMALL, "--checkpoint-seconds", "0"]
    while (done := run(*again, "--method", *SCHEDULES)).returncode != 0:
        assert done.last_error == "cifar100_vgg.py: stop"
    # Two epochs each of the teacher and the students, one of estimators, paraphraser and FitNet's.
    assert len(saved) == 2 * (1 + len(SCHEDULES)) + 3
    assert networks(tmp_path / "out") == at_once


def progress(out):
    """Count the epochs that all runs in a folder have written down."""
    return sum(len(path.read_bytes().splitlines()) for path in out.rglob("epochs.jsonl"))


def test_killed_at_random_moments_it_ends_the_same(data, tmp_path):
    flags = ["--data-dir", data, *SMALL, "--epochs", "4", "--threads", "1"]
    flags += ["--method", "mhgd", "--checkpoint-seconds", "0"]

    def start(out):
        command = [sys.executable, str(SCRIPT), *map(str, flags), "--out", str(out)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait(timeout=120) == 0
    generator, kills, ended = random.Random(0), 0, False
    while not ended:
        before, process = progress(tmp_path / "killed"), start(tmp_path / "killed")
        while process.poll() is None and progress(tmp_path / "killed") <= before:
            time.sleep(0.005)  # imports take most of the time
        time.sleep(generator.uniform(0, 0.1))
        process.kill()
        ended = process.wait() == 0
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 5
    assert networks(tmp_path / "killed") == networks(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("*.part"))


def test_the_same_command_again_trains_nothing(finished, data):
    before = networks(finished[0])
    times = {p: p.stat().st_mtime_ns for p in finished[0].rglob("model.pt")}
    done = run("--data-dir", data, "--out", finished[0], *SMALL)
    assert done.returncode == 0
    assert networks(finished[0]) == before
    assert {p: p.stat().st_mtime_ns for p in finished[0].rglob("model.pt")} == times


def test_another_bound_shares_the_teacher_and_the_estimators(finished, data):
    flags = ["--data-dir", data, "--out", finished[0], *SMALL, "--method", "mhgd", "--bound", "3"]
    teacher = finished[0] / "teacher" / "model.pt"
    before = teacher.stat().st_mtime_ns
    assert run(*flags).returncode == 0
    assert teacher.stat().st_mtime_ns == before
    assert (finished[0] / "VGG7" / "mhgd,num_heads=2,bound=3.0" / "record.json").exists()


def test_a_share_leaves_the_teacher_all_images_and_a_dev_split_the_test_images(data, tmp_path):
    out = tmp_path / "out"
    flags = ["--data-dir", data, "--out", out, *SMALL, "--method", "student"]
    done = run(*flags, "--student-share", "0.5", "--batch-size", "2")
    assert done.returncode == 0, done.last_error
    record = json.loads((out / "VGG7" / "student,student_share=0.5" / "record.json").read_text())
    assert record["about"]["student_share"] == 0.5
    train, test = cifar100_vgg.load_cifar100(data)
    assert len(train.take_share(0.5).images) == sum(
        -(-count // 2) for count in torch.bincount(train.labels).tolist()
    )
    rest, held = train.hold_out(2)
    assert len(rest.images) + len(held.images) == len(train.images)
    for label in range(train.num_classes):
        own = train.images[train.labels == label]
        assert torch.equal(rest.images[rest.labels == label], own[::2])
        assert torch.equal(held.images[held.labels == label], own[1::2])
    assert len(test.take_classes(2).images) == int((test.labels < 2).sum())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_trains(data, tmp_path, precision):
    flags = ["--data-dir", data, "--out", tmp_path / "out", *SMALL, "--amp", precision]
    assert run(*flags, "--method", "mhgd", "fsp").returncode == 0


def test_the_binary_layout_gives_the_same_networks(finished, tmp_path):
    data = write_folder(tmp_path / "binary", binary_files())
    assert run("--data-dir", data, "--out", tmp_path / "out", *SMALL).returncode == 0
    assert networks(tmp_path / "out")["teacher"] == networks(finished[0])["teacher"]


def test_checkpoints_hold_tensors_and_plain_types(data, tmp_path, monkeypatch):
    monkeypatch.setattr(runs.Run, "finish", mock.Mock(side_effect=InterruptedRunError("stop")))
    run("--data-dir", data, "--out", tmp_path / "out", *SMALL)
    checkpoint = torch.load(tmp_path / "out" / "teacher" / "checkpoint.pt", weights_only=True)
    assert {"optimizer", "model", "scheduler", "scaler"} == set(checkpoint["state"])


def truncated_archive(folder):
    path = write_archive(folder / "cifar-100-python.tar.gz", python_files())
    path.write_bytes(path.read_bytes()[:-200])
    return path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-dir", "nowhere"], r"`data_dir` must exist; got nowhere"),
        (["--bogus", "1"], r"unrecognized arguments: --bogus 1"),
        (["--method", "kdd"], r"--method: invalid choice: 'kdd'"),
        (["--epochs", "0"], r"`--epochs` must be ≥ 1; got 0"),
        (["--batch-size", "512"], r"`batch_size` must be ≤ 9"),
        (["--width", "0"], r"`--width` must be > 0; got 0"),
        (["--num-heads", "0"], r"`--num-heads` must be ≥ 1; got 0"),
        (["--limit-per-class", "0"], r"`--limit-per-class` must be ≥ 1; got 0"),
        (["--classes", "1"], r"`--classes` must be ≥ 2; got 1"),
        (["--classes", "9"], r"`--classes` must be at most 4; got 9"),
        (["--student-share", "2"], r"`--student-share` must be ≤ 1; got 2"),
        (["--bound", "-1"], r"`--bound` must be > 0; got -1"),
        (["--device", "cuda:99"], r"`--device` must be"),
    ],
)
def test_a_wrong_flag_ends_in_one_line_and_trains_nothing(data, tmp_path, flags, message):
    done = run("--data-dir", data, "--out", tmp_path / "out", *SMALL, *flags)
    assert done.returncode != 0
    assert message in done.last_error
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_a_damaged_archive_is_named(tmp_path):
    damaged = truncated_archive(tmp_path)
    done = run("--data-dir", damaged, "--out", tmp_path / "out", *SMALL)
    assert str(damaged) in done.last_error
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_a_checkpoint_of_a_cpu_goes_on_elsewhere(data, tmp_path, monkeypatch):
    flags = ["--data-dir", data, "--out", tmp_path / "out", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "finish", mock.Mock(side_effect=InterruptedRunError("stop")))
        run(*flags)
    record = json.loads((tmp_path / "out" / "teacher" / "record.json").read_text())
    went_on = runs.Run(tmp_path / "out" / "teacher", record["about"], torch.device("cpu"), 0)
    went_on.device = torch.device("cuda")
    assert went_on.restore("teacher", {}, torch.Generator()) == 2


def test_students_with_a_share_see_images_normalised_as_their_teacher(data, tmp_path):
    out = tmp_path / "out"
    flags = ["--data-dir", data, "--out", out, *SMALL, "--student-share", "0.4", "--batch-size"]
    assert run(*flags, "2", "--method", "fitnet").returncode == 0
    teacher = json.loads((out / "teacher" / "record.json").read_text())
    taught = json.loads((out / "VGG7" / "fitnet,student_share=0.4" / "record.json").read_text())
    assert taught["teacher_accuracy"] == teacher["accuracy"]


@pytest.mark.parametrize("file", ["record.json", "model.pt", "checkpoint.pt"])
def test_a_damaged_file_of_a_run_is_named_and_kept(data, tmp_path, monkeypatch, file):
    flags = ["--data-dir", data, "--out", tmp_path / "out", *SMALL]
    with monkeypatch.context() as patch:
        if file == "checkpoint.pt":
            patch.setattr(runs.Run, "finish", mock.Mock(side_effect=InterruptedRunError("stop")))
        run(*flags, "--method", "student")
    damaged = tmp_path / "out" / "teacher" / file
    damaged.write_bytes(content := damaged.read_bytes()[:-20])
    done = run(*flags, "--method", "mhgd")
    assert done.returncode != 0
    assert str(damaged) in done.last_error
    assert damaged.read_bytes() == content


def test_a_run_of_other_settings_is_refused_and_kept(finished, data):
    before = networks(finished[0])
    done = run("--data-dir", data, "--out", finished[0], *SMALL, "--epochs", "3")
    assert "holds one with teacher_epochs = 2, where 3 is wanted" in done.last_error
    assert networks(finished[0]) == before


def test_a_folder_in_use_is_refused(data, tmp_path):
    with runs.hold(tmp_path / "out" / "teacher") as mine:
        assert mine
        done = run("--data-dir", data, "--out", tmp_path / "out", *SMALL)
    assert "is in use" in done.last_error


def test_a_full_disk_ends_in_one_line_and_loses_nothing(at_once, data, tmp_path, monkeypatch):
    flags = ["--data-dir", data, "--out", tmp_path / "out", *SMALL, "--checkpoint-seconds", "0"]
    write, checkpoints = files.write_atomically, []

    def full(path, fill):
        """Leave room for one checkpoint and a half."""
        checkpoints.extend([path] * (path.name == "checkpoint.pt"))
        if len(checkpoints) < 2:
            return write(path, fill)

        def limited(file):
            fill(buffer := io.BytesIO())
            file.write(buffer.getvalue()[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")

        return write(path, limited)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomically", full)
        done = run(*flags)
    assert "checkpoint.pt could not be written (No space left on device)" in done.last_error
    assert "run the same command again" in done.last_error
    assert not list(tmp_path.rglob("*.part"))
    assert torch.load(tmp_path / "out" / "teacher" / "checkpoint.pt", weights_only=True)
    assert run(*flags).returncode == 0
    assert networks(tmp_path / "out")["teacher"] == at_once["teacher"]


def test_an_error_on_the_command_line_shows_no_traceback():
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), "--data-dir", "nowhere"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["cifar100_vgg.py: `data_dir` must exist; got nowhere."]


def test_forms_of_mhgd_are_those_of_the_loss():
    assert {form.squash for form in MHGD.values()} == {None, "tanh", "scaled"}
