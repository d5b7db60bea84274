"""The benchmark measures what it says, and ends with its tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parts.bench_tables import tables
from parts.bench_vectors import Point, measure_vectors, small_gaps
from parts.decompositions import DECOMPOSITIONS, svd_lowrank
from parts.timing import median_ratio, paired_seconds, peak_memory

SCRIPT = Path(__file__).parents[1] / "examples" / "benchmark.py"
CPU = torch.device("cpu")
MIB = 2**20


def maps(c=6, size=5, seed=0):
    return torch.randn(3, c, size, size, generator=torch.Generator().manual_seed(seed))


def test_peak_memory_counts_what_is_held_at_a_time_and_not_what_was_freed():
    def two_of_three():
        first = torch.zeros(MIB // 4)
        second = first + 1
        del first
        return second + 1

    assert peak_memory(two_of_three, CPU) == pytest.approx(2 * MIB, rel=1e-3)  # scalars too


def test_rounds_time_every_task_and_ratios_are_taken_within_a_round():
    calls = []
    seconds = paired_seconds(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, CPU
    )
    assert calls == ["a", "b"] * 4
    assert [len(values) for values in seconds.values()] == [3, 3]
    assert median_ratio([1.0, 4.0, 9.0], [2.0, 2.0, 3.0]) == 2.0


def test_small_gaps_are_of_one_and_a_half_per_cent():
    (point,) = small_gaps([Point("", maps(), maps())])
    values = torch.linalg.svdvals(point.teacher.flatten(2))
    torch.testing.assert_close(values[:, :-1] / values[:, 1:], torch.full((3, 5), 1.015))


@pytest.mark.parametrize("name", sorted(set(DECOMPOSITIONS) - {"svd_lowrank"}))
@pytest.mark.parametrize("shape", [(9, 20), (20, 9)])
def test_every_rival_finds_the_vectors(name, shape):
    rows = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).abs()
    wanted = DECOMPOSITIONS["linalg.svd"](rows, 1)
    cosine = (DECOMPOSITIONS[name](rows, 1) * wanted).sum(dim=-1).abs()
    assert (1 - cosine).max() < 1e-5


def test_lowrank_is_measured_as_torch_ships_it():
    torch.manual_seed(0)
    rows = torch.randn(2, 9, 20).abs()
    assert svd_lowrank(rows, 3).shape == (2, 3, 20)


def test_errors_are_those_of_the_method_and_not_of_the_measure(monkeypatch):
    points = [Point("5×6", maps(), maps(seed=1))]
    wrong = {"graph-kd": DECOMPOSITIONS["graph-kd"]}
    wrong["tilted"] = lambda rows, k: DECOMPOSITIONS["graph-kd"](rows, k) * 0.9
    wrong["broken"] = lambda *_: torch.linalg.cholesky(-torch.eye(2))
    monkeypatch.setattr("parts.bench_vectors.DECOMPOSITIONS", wrong)
    rows = {row["method"]: row for row in measure_vectors(points, 1, CPU)}
    assert rows["graph-kd"]["vector"] < 1e-6
    assert rows["graph-kd"]["gradient"] < 1e-3
    assert rows["tilted"]["vector"] == pytest.approx(0.1, abs=1e-3)
    assert rows["tilted"]["gradient"] == pytest.approx(0.1, abs=1e-3)
    assert "not positive-definite" in rows["broken"]["fails"]
    assert rows["bare Gram"]["peak_bytes"] > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_small_run_writes_and_prints_every_table(tmp_path):
    out = tmp_path / "run"
    flags = "--width 0.1 --train-steps 1 --batch-size 6 --repeats 1 --samples 8 16 --plain-up-to 8"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", out, *flags.split()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = {}
    for part in ("vectors", "step", "growth"):
        content = json.loads((out / f"{part}.json").read_text())
        assert set(content) == {"config", "environment", part}
        assert tables(content) in (out / "benchmark.md").read_text()
        assert tables(content) in done.stdout
        result |= content
    assert set(result["step"]) == {"VGG16 → VGG7", "WRN-22-4 → WRN-10-4"}
    assert "plain_bytes" in result["growth"][0]
    assert "plain_bytes" not in result["growth"][1]
    assert (out / "vectors.png").stat().st_size > 10_000


def test_an_unknown_device_ends_in_one_line():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--device", "cuda:77"], capture_output=True, text=True, check=False
    )
    assert done.returncode
    assert "`--device` must be one of this machine; got cuda:77" in done.stderr
    assert "Traceback" not in done.stderr
