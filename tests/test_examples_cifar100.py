"""The CIFAR-100 script in miniature, end to end, and what it refuses."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import cifar100_vgg
import pytest
import torch
from cifar_files import binary_files, python_files, write_archive, write_folder
from parts.engine import nesterov, step_decay

SCRIPT = Path(__file__).parent.parent / "examples" / "cifar100_vgg.py"
SMALL = [
    *("--width", "0.05", "--epochs", "2", "--estimator-epochs", "1", "--batch-size", "4"),
    *("--device", "cpu", "--num-heads", "2"),
]


class Done(NamedTuple):
    returncode: object
    stdout: str
    last_error: str


def run(*flags):
    """Run the script in this process, as the command line would."""
    words = [str(SCRIPT), *map(str, flags)]
    returncode, out, err = 0, io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", words),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cifar100_vgg.main()
        except SystemExit as end:
            returncode = end.code
    last = returncode if isinstance(returncode, str) else (err.getvalue().splitlines() or [""])[-1]
    return Done(returncode, out.getvalue(), last)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), python_files())


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    done = run("--data-dir", data, "--out", out, *SMALL)
    assert done.returncode == 0, done.last_error
    return out, done


def test_leaves_record_lines_curves_and_checkpoints(finished):
    out, done = finished
    record = json.loads((out / "record.json").read_text())
    lines = [json.loads(line) for line in (out / "epochs.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == [
        *["teacher"] * 2, *["student"] * 2, "estimator", *["mhgd"] * 2,
    ]  # fmt: skip
    assert record["config"]["epochs"] == 2
    assert {"graph_kd", "torch", "python", "hardware", "commit"} == set(record["environment"])
    for phase in ("teacher", "student", "mhgd"):
        summary = record["phases"][phase]
        accuracies = [epoch["test_accuracy"] for epoch in summary["epochs"]]
        assert summary["last_accuracy"] == accuracies[-1]
        assert summary["best_accuracy"] == max(accuracies)
        assert summary["seconds_per_step"] > 0
        assert f"{phase:8} {accuracies[-1]:6.2f} %" in done.stdout
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == [
        "curves.png", "epochs.jsonl", "mhgd.pt", "record.json", "student.pt", "teacher.pt",
    ]  # fmt: skip


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


def test_checkpoints_hold_tensors_and_plain_types(finished):
    checkpoint = torch.load(finished[0] / "mhgd.pt", weights_only=True)
    assert checkpoint["about"] == {"network": "VGG7", "width": 0.05, "classes": 4}


def test_same_seed_gives_the_same_run(finished, data, tmp_path):
    done = run("--data-dir", data, "--out", tmp_path / "again", *SMALL)
    assert done.returncode == 0, done.last_error
    for name in ("teacher", "student", "mhgd"):
        first = torch.load(finished[0] / f"{name}.pt", weights_only=True)["model"]
        again = torch.load(tmp_path / "again" / f"{name}.pt", weights_only=True)["model"]
        assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "mhgd", "--squash", "tanh", "--gate", "sigmoid"],
        ["--method", "mhgd", "--amp", "bfloat16", "--squash", "scaled", "--bound", "3"],
    ],
)
def test_teacher_of_an_earlier_run_teaches_again(finished, tmp_path, flags):
    data = write_folder(tmp_path / "binary", binary_files())
    teacher = finished[0] / "teacher.pt"
    out = tmp_path / "out"
    done = run("--data-dir", data, "--out", out, "--teacher-checkpoint", teacher, *SMALL, *flags)
    assert done.returncode == 0, done.last_error
    record = json.loads((out / "record.json").read_text())
    earlier = json.loads((finished[0] / "record.json").read_text())
    assert not record["phases"]["teacher"]["epochs"]
    assert record["phases"]["teacher"]["last_accuracy"] == pytest.approx(
        earlier["phases"]["teacher"]["last_accuracy"], abs=0.01
    )
    assert "student" not in record["phases"]


def truncated_archive(folder):
    path = write_archive(folder / "cifar-100-python.tar.gz", python_files())
    path.write_bytes(path.read_bytes()[:-200])
    return path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-dir", "nowhere"], r"`data_dir` must exist; got nowhere"),
        (["--bogus", "1"], r"unrecognized arguments: --bogus 1"),
        (["--method", "fsp"], r"--method: invalid choice: 'fsp'"),
        (["--epochs", "0"], r"`--epochs` must be ≥ 1; got 0"),
        (["--batch-size", "512"], r"`batch_size` must be ≤ 9"),
        (["--width", "0"], r"`--width` must be > 0; got 0"),
        (["--num-heads", "0"], r"`--num-heads` must be ≥ 1; got 0"),
        (["--limit-per-class", "0"], r"`--limit-per-class` must be ≥ 1; got 0"),
        (["--bound", "-1"], r"`--bound` must be > 0; got -1"),
        (["--teacher-checkpoint", "none.pt"], r"`--teacher-checkpoint` must be a checkpoint file"),
        (["--device", "cuda:99"], r"`--device` must be"),
    ],
)
def test_a_wrong_flag_ends_in_one_line_and_writes_nothing(data, tmp_path, flags, message):
    done = run("--data-dir", data, "--out", tmp_path / "out", *SMALL, *flags)
    assert done.returncode != 0
    assert message in done.last_error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["archive", "checkpoint", "other network"])
def test_a_damaged_or_foreign_file_is_named_and_nothing_is_written(data, finished, tmp_path, kind):
    flags, damaged = ["--data-dir", data], tmp_path / "teacher.pt"
    if kind == "archive":
        damaged = truncated_archive(tmp_path)
        flags = ["--data-dir", damaged]
    elif kind == "checkpoint":
        damaged.write_bytes((finished[0] / "teacher.pt").read_bytes()[:-1000])
        flags += ["--teacher-checkpoint", damaged]
    else:
        damaged = finished[0] / "student.pt"
        flags += ["--teacher-checkpoint", damaged]
    done = run("--out", tmp_path / "out", *SMALL, *flags)
    assert done.returncode != 0
    assert str(damaged) in done.last_error
    assert not (tmp_path / "out").exists()


def test_an_error_on_the_command_line_shows_no_traceback():
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), "--data-dir", "nowhere"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["cifar100_vgg.py: `data_dir` must exist; got nowhere."]


def test_an_earlier_run_is_not_overwritten(finished, data):
    before = (finished[0] / "record.json").read_bytes()
    done = run("--data-dir", data, "--out", finished[0], *SMALL)
    assert "`--out` must be a folder without a run" in done.last_error
    assert (finished[0] / "record.json").read_bytes() == before
