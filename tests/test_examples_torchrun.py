"""The CIFAR-100 script in two processes gives the record of one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from cifar_files import COUNTS, python_files, write_folder
from test_examples_cifar100 import SCRIPT, SMALL, run

PHASES = ["teacher", "student", "mhgd"]


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


def test_two_processes_give_the_record_of_one(runs):
    one, two = (json.loads((runs[0] / n / "record.json").read_text()) for n in ("one", "two"))
    assert one["config"] | {"out": None} == two["config"] | {"out": None}
    assert two["environment"]["hardware"].startswith("2 × ")
    assert list(two["phases"]) == list(one["phases"])
    one_image = 100 / COUNTS["test"]
    for expected, got in zip(one["phases"].values(), two["phases"].values(), strict=True):
        assert list(got) == list(expected)
        for first, second in zip(expected["epochs"], got["epochs"], strict=True):
            del first["seconds"], second["seconds"]
            assert second.pop("loss") == pytest.approx(first.pop("loss"), rel=1e-4)
            accuracies = first.pop("test_accuracy", 0), second.pop("test_accuracy", 0)
            assert accuracies[1] == pytest.approx(accuracies[0], abs=one_image + 0.01)
            assert second == first
        assert got.get("skipped_transfer_gradients") == expected.get("skipped_transfer_gradients")


@pytest.mark.parametrize("name", PHASES)
def test_two_processes_give_the_weights_of_one(runs, name):
    one, two = (torch.load(runs[0] / n / f"{name}.pt", weights_only=True) for n in ("one", "two"))
    assert two["about"] == one["about"]
    assert list(two["model"]) == list(one["model"])
    # Sums in another order differ in the last digit; a step at rate 0.1 through batch norms over a
    # few values makes up to ten times as much of that, and there are four.
    for key, weight in one["model"].items():
        difference = torch.dist(two["model"][key].double(), weight.double())
        assert difference <= 1e-4 * torch.linalg.vector_norm(weight.double()), key


def test_one_process_speaks_and_writes(runs):
    folder, out_of_one, out, err = runs
    one, two = (sorted(path.name for path in (folder / n).iterdir()) for n in ("one", "two"))
    assert two == one
    lines = [(folder / n / "epochs.jsonl").read_text().splitlines() for n in ("one", "two")]
    assert len(lines[0]) == len(lines[1])
    assert len(out.splitlines()) == len(out_of_one.splitlines())
    assert err.count("mhgd:   0%|") == 1


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ([], "`--out` must be a folder without a run; "),  # in the main process
        (["--batch-size", "5"], "`--batch-size` must be a multiple of 2, the number "),  # in both
    ],
)
def test_an_error_ends_all_processes_with_one_message(runs, data, flags, error):
    before = (runs[0] / "one" / "record.json").read_bytes()
    code, out, err = torchrun("--data-dir", data, "--out", runs[0] / "one", *SMALL, *flags)
    assert code != 0
    assert err.count("cifar100_vgg.py: ") == err.count(error) == 1
    assert out == ""
    assert (runs[0] / "one" / "record.json").read_bytes() == before
