"""The quickstart runs in miniature, says what it measured, and refuses what it does not know."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import quickstart
import torch
from parts.config import parse

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.py"
NAMES = ["teacher", "alone", "soft logits", "MHGD"]
MINIATURE = ["--seeds", "2", "--teacher-steps", "3", "--head-steps", "2", "--student-steps", "2"]
MINIATURE += ["--split", "dev", "--threads", "1"]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-W", "error", str(SCRIPT), *MINIATURE, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    return done, out, json.loads((out / "record.json").read_text())


def test_table_shows_what_the_record_holds(miniature):
    done, _, record = miniature
    assert list(record["accuracies"]) == NAMES
    for name, values in record["accuracies"].items():
        assert len(values) == 2
        assert all(0 <= value <= 100 for value in values)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{name:12}")]
        assert f"{sum(values) / 2:.1f} ± {abs(values[0] - values[1]) / 2**0.5:.1f}" in line


def test_record_holds_settings_versions_and_seconds(miniature):
    _, out, record = miniature
    assert record["config"]["split"] == "dev"
    assert record["config"]["student_steps"] == 2
    assert record["config"]["out"] == str(out)
    assert {"graph_kd", "torch", "python", "hardware", "commit"} == set(record["environment"])
    assert record["seconds"] > 0


def test_picture_is_a_png_and_the_bar_reaches_its_end(miniature):
    done, out, _ = miniature
    assert (out / "graphs.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "22/22" in done.stderr  # 2 seeds of 3 + 2 + 3 · 2 steps


def test_same_seed_gives_the_same_accuracies(miniature, tmp_path):
    _, _, record = miniature
    threads = torch.get_num_threads()
    try:
        quickstart.run(parse(quickstart.Config, None, [*MINIATURE, "--out", str(tmp_path)]))
    finally:
        torch.set_num_threads(threads)
    again = json.loads((tmp_path / "record.json").read_text())
    assert again["accuracies"] == record["accuracies"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labelz", "5"], "unrecognized arguments: --labelz"),
        (["--split", "train"], "argument --split: invalid choice: 'train'"),
        (["--seeds", "0"], "quickstart.py: `--seeds` must be ≥ 1; got 0"),
        (["--labels", "78"], "quickstart.py: `--labels` must be ≤ 77; got 78"),
        (["--bound", "wide"], "argument --bound: invalid float value: 'wide'"),
    ],
)
def test_wrong_flag_fails_clearly(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *flags, "--out", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as end:
        quickstart.main()
    assert message in f"{capsys.readouterr().err}{end.value}"
    assert not (tmp_path / "none").exists()


def test_forms_of_own_heads_are_compared_with_one_line_a_student(tmp_path):
    script, out = SCRIPT.with_name("own_heads.py"), tmp_path / "own_heads.jsonl"
    flags = ["--seeds", "1", "--steps", "2", "--head-steps", "2", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), *flags],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len({record["row"] for record in records}) == len(records) > 10
    for record in records:
        assert f"| {record['row']} | {record['accuracy']:.1f} (1) |" in done.stdout
        assert {"seed", "split", "bound", "squash", "environment"} <= set(record)
    assert any(record["teacher"] == "untrained" for record in records)
