"""The CIFAR-100 script in two processes gives the record of one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from cifar_files import COUNTS, python_files, write_folder
from parts.runs import hold
from test_examples_scripts import SCRIPT, SMALL, run

NETWORKS = ["teacher", "estimators,num_heads=2", "VGG7/student", "VGG7/mhgd,num_heads=2"]


def torchrun(*flags):
    """Run the script in two processes to its end, which has to come soon."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [sys.executable, *launcher, str(SCRIPT), *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        out, err = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its processes
        process.communicate()
        raise
    return process.returncode, out, err


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), python_files())


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Run the script in one process and in two; return where, and what they said."""
    folder = tmp_path_factory.mktemp("runs")
    one = run("--data-dir", data, "--out", folder / "one", *SMALL)
    code, out, err = torchrun("--data-dir", data, "--out", folder / "two", *SMALL)
    assert one.returncode == code == 0, err
    return folder, one.stdout, out, err


@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_give_the_record_of_one(runs, name):
    one, two = (
        json.loads((runs[0] / n / name / "record.json").read_text()) for n in ("one", "two")
    )
    assert one["about"] == two["about"]
    assert two["environment"]["hardware"].startswith("2 × ")
    assert list(two["phases"]) == list(one["phases"])
    one_image = 100 / COUNTS["test"]
    for expected, got in zip(one["phases"].values(), two["phases"].values(), strict=True):
        for first, second in zip(expected["epochs"], got["epochs"], strict=True):
            for name in first.keys() & {"loss", "transfer_loss"}:
                assert second.pop(name) == pytest.approx(first.pop(name), rel=1e-4)
            accuracies = first.pop("test_accuracy", 0), second.pop("test_accuracy", 0)
            assert accuracies[1] == pytest.approx(accuracies[0], abs=one_image + 0.01)
            assert second == first
    assert two.get("skipped_transfer_gradients") == one.get("skipped_transfer_gradients")


@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_give_the_weights_of_one(runs, name):
    one, two = (
        torch.load(runs[0] / n / name / "model.pt", weights_only=True) for n in ("one", "two")
    )
    assert two["about"] == one["about"]
    assert list(two["model"]) == list(one["model"])
    # Sums in another order differ in the last digit; a step at rate 0.1 through batch norms over a
    # few values makes up to ten times as much of that, and there are four; through the estimators'
    # softmax, more.
    tolerance = 1e-3 if "estimators" in name else 1e-4
    for key, weight in one["model"].items():
        difference = torch.dist(two["model"][key].double(), weight.double())
        size = torch.linalg.vector_norm(weight.double())
        assert difference <= tolerance * size + 1e-7 * weight.numel() ** 0.5, key


def test_one_process_speaks_and_writes(runs):
    folder, out_of_one, out, err = runs
    one, two = (
        sorted(str(path.relative_to(folder / n)) for path in (folder / n).rglob("*"))
        for n in ("one", "two")
    )
    assert two == one
    assert len(out.splitlines()) == len(out_of_one.splitlines())
    assert err.count("estimators:   0%|") == 1


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--epochs", "3"], "`--out` must be new or hold runs of the same settings; "),  # in both
        (["--batch-size", "5"], "`--batch-size` must be a multiple of 2, the number "),
        (["--method", "rkd"], "`--method` must be student or a form of MHGD among 2 processes; "),
    ],
)
def test_an_error_ends_all_processes_with_one_message(runs, data, flags, error):
    record = runs[0] / "one" / "teacher" / "record.json"
    before = record.read_bytes()
    code, out, err = torchrun("--data-dir", data, "--out", runs[0] / "one", *SMALL, *flags)
    assert code != 0
    assert err.count("cifar100_vgg.py: ") == err.count(error) == 1
    assert out == ""
    assert record.read_bytes() == before


def test_processes_wait_for_each_other_between_networks(data, tmp_path):
    # The estimators follow the teacher at once: a process ahead must not find it unfinished.
    code, out, err = torchrun("--data-dir", data, "--out", tmp_path, *SMALL, "--method", "mhgd")
    assert code == 0, err
    teacher = json.loads((tmp_path / "teacher" / "record.json").read_text())
    assert out.count(f"the teacher has {teacher['accuracy']:.2f} %") == 2


def test_an_error_of_the_main_process_ends_all(runs, data):
    with hold(runs[0] / "one" / "teacher"):
        code, _, err = torchrun("--data-dir", data, "--out", runs[0] / "one", *SMALL)
    assert code != 0
    assert err.count("is in use") == 1
