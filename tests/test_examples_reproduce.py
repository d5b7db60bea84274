"""`reproduce.py` runs a table's cells, each once, and shows them beside what was published."""

import contextlib
import dataclasses
import io
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import cifar100_vgg
import pytest
import reproduce
import torch
from cifar_files import python_files, write_folder
from parts.augment import Normalize
from parts.data import ImageSet
from parts.engine import DivergedError, Engine
from parts.methods import METHODS, Both, train_student
from parts.models import build
from parts.poster import PUBLISHED
from parts.runs import Run
from parts.settings import Settings
from test_examples_scripts import SMALL, networks, progress
from tinyimagenet_files import tinyimagenet_files

from graph_kd import GraphTransferLoss

SCRIPT = Path(reproduce.__file__)
TINY = [flag if flag != "2" else "1" for flag in SMALL[:-1]] + ["2"]  # one epoch, two heads


def run(*flags):
    """Run the script in this process; return how it ended, and what it printed."""
    out = io.StringIO()
    words = [str(SCRIPT), *map(str, flags)]
    with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(out):
        try:
            reproduce.main()
        except SystemExit as end:
            return end.code, out.getvalue()
    return 0, out.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), python_files())


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("tables")
    flags = ["--data-dir", data, "--out", out, *TINY, "--table", "cifar100", "--seeds", 0, 1]
    code, text = run(*flags, "--methods", "student", "mhgd")
    assert code == 0, code
    return out, flags, text


def test_a_table_shows_mean_and_deviation_beside_the_published_numbers(finished):
    out, _, text = finished
    content = json.loads((out / "cifar100,num_heads=2.json").read_text())
    assert len(content["cells"]) == 2 * 3
    assert {"graph_kd", "torch", "python", "hardware", "commit"} == set(content["environments"][0])
    of_method = {}
    for cell in content["cells"]:
        teacher = {"VGG": ("VGG16", "VGG7"), "WRN": ("WRN-22-4", "WRN-10-4")}[cell["row"]]
        above = "" if cell["method"] == "teacher" else f"{teacher[1]}/"
        name = cell["method"] + (",num_heads=2" if "mhgd" in cell["method"] else "")
        accuracies = [
            json.loads(
                (out / "CIFAR-100" / teacher[0] / f"seed-{seed}" / f"{above}{name}" / "record.json")
                .read_text()
            )["accuracy"]
            for seed in (0, 1)
        ]  # fmt: skip
        assert cell["accuracies"] == accuracies
        assert cell["n"] == 2
        mean, sd = statistics.mean(accuracies), statistics.stdev(accuracies)
        assert (cell["mean"], cell["sd"]) == (round(mean, 2), round(sd, 2))
        of_method[cell["row"], cell["method"]] = accuracies
        gain = "–"
        if cell["method"] == "mhgd":
            alone = of_method[cell["row"], "student"]
            gains = [ours - theirs for ours, theirs in zip(accuracies, alone, strict=True)]
            mean, sd = statistics.mean(gains), statistics.stdev(gains)
            assert cell["gain"] == {"mean": round(mean, 2), "sd": round(sd, 2), "n": 2}
            gain = f"{cell['gain']['mean']:+.2f} ± {cell['gain']['sd']:.2f} (2)"
        else:
            assert cell["gain"] is None
        measured = f"{cell['mean']:.2f} ± {cell['sd']:.2f} (2)"
        assert f"{measured} | {gain} | {cell['published']:.2f} |" in text
    assert (out / "cifar100,num_heads=2.md").read_text() in text
    for name in ("cifar100,num_heads=2.png", "cifar100,num_heads=2_epochs.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_done_again(finished):
    out, flags, text = finished
    times = {path: path.stat().st_mtime_ns for path in out.rglob("model.pt")}
    code, again = run(*flags, "--methods", "student", "mhgd")
    assert code == 0
    assert text.endswith(again)  # which says nothing of teachers that teach
    assert {path: path.stat().st_mtime_ns for path in out.rglob("model.pt")} == times


def test_shares_of_the_time_are_those_of_the_records(finished):
    out, _, text = finished
    seconds = {
        path: sum(json.loads(path.read_text()).values()) for path in out.rglob("seconds.json")
    }
    assert f"Training took {sum(seconds.values()) / 60:.1f} minutes" in text
    of_teachers = sum(s for path, s in seconds.items() if path.parent.name == "teacher")
    assert f"Teacher {of_teachers / sum(seconds.values()):.0%}, " in text


def test_tables_of_other_settings_stand_beside_each_other(finished):
    out, flags, _ = finished
    before = (out / "cifar100,num_heads=2.json").read_bytes()
    code, _ = run(*flags, "--methods", "mhgd", "--bound", "3", "--rows", "WRN", "--seeds", "1")
    assert code == 0
    assert (out / "cifar100,num_heads=2.json").read_bytes() == before
    content = json.loads((out / "cifar100,num_heads=2,bound=3.0.json").read_text())
    assert {(cell["row"], cell["method"], cell["n"]) for cell in content["cells"]} >= {
        ("WRN", "mhgd", 1),
        ("WRN", "teacher", 2),  # which knows no bound
    }
    assert content["settings"]["bound"] == 3.0


def test_a_part_of_a_table_leaves_the_rest_in_it(finished):
    _, flags, text = finished
    flags = [*flags, "--methods", "student", "mhgd"]
    for part in (["--seeds", 1], ["--rows", "VGG"], ["--methods", "student"], ["--render-only"]):
        code, again = run(*flags, *part)
        assert code == 0
        assert text.endswith(again)


def test_a_seed_counts_once(finished):
    _, flags, text = finished
    code, again = run(*flags, "--seeds", 0, 0, 1, "--methods", "student", "mhgd")
    assert code == 0
    assert text.endswith(again)


def test_tables_can_be_written_without_images_or_training(finished, tmp_path):
    out, flags, text = finished
    code, again = run("--out", out, *flags[4:], "--render-only", "--data-dir", "nowhere")
    assert code == 0
    assert text.endswith(again)
    code, text = run(*flags, "--out", tmp_path / "empty", "--render-only")
    assert code == 0
    assert "| MHGD | – | – | 67.02 | – | – | 72.79 |" in text
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("more", [["--epochs", "7"], ["--epochs", "7", "--render-only"]])
def test_a_table_of_other_settings_is_refused_and_kept(finished, more):
    out, flags, _ = finished
    before = {path: path.read_bytes() for path in out.glob("*.*")}
    code, _ = run(*flags, *more)
    assert "where 7 is wanted. Choose another folder." in code
    assert {path: path.read_bytes() for path in out.glob("*.*")} == before


def test_a_damaged_record_is_named(finished, tmp_path):
    out, flags, _ = finished
    copy = shutil.copytree(out, tmp_path / "copy")
    damaged = copy / "CIFAR-100" / "VGG16" / "seed-0" / "teacher" / "record.json"
    for content in ("{}", damaged.read_text()[:-20]):
        damaged.write_text(content)
        code, _ = run(*flags, "--out", copy, "--render-only")
        assert str(damaged) in code
        assert "train it again" in code


def test_a_cell_that_diverges_is_left_out_and_told(data, tmp_path):
    flags = ["--data-dir", data, "--out", tmp_path, *TINY, "--learning-rate", "1e30"]
    flags += ["--epochs", "3", "--rows", "VGG", "--seeds", 0, "--methods", "student", "mhgd", "ab"]
    code, text = run(*flags)
    head, teacher, student = code.splitlines()
    assert head == "reproduce.py: cells without a result:"
    assert teacher.startswith("VGG, teacher, seed 0: The loss of phase 'teacher' must stay finite")
    assert student.startswith("VGG, student, seed 0: The loss of phase 'student' must stay finite")
    assert "| Student | – | – | 59.97 |" in text


@pytest.mark.parametrize("method", ["mhgd", "kd-svd"])
def test_a_gated_method_that_diverges_is_told_from_a_wrong_map(method, tmp_path):
    """Its maps would be refused before the epoch's loss is looked at."""
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    image_set = ImageSet(images, torch.arange(8) % 4, tuple("abcd"))
    settings = cifar100_vgg.EXPERIMENT, Settings(epochs=1, batch_size=4, device="cpu")
    teacher, student = build("VGG16", 4, 0.05), build("VGG7", 4, 0.05)
    with torch.no_grad():
        next(student.parameters()).fill_(torch.nan)
    about = {"images": 0}
    run_of = Run(tmp_path, about, torch.device("cpu"), 30.0)
    engine = Engine(image_set, image_set, 4, 0, None, run_of, Normalize(image_set))
    transfer = GraphTransferLoss(teacher.channels, 2) if method == "mhgd" else None
    with pytest.raises(DivergedError, match="phase 'student' must stay finite; it was nan"):
        train_student(method, student, teacher, transfer, engine, *settings)


@pytest.mark.parametrize("method", ["student", "soft-logits", "fsp", "dml", "kd-svd", "mhgd"])
def test_every_method_trains_by_the_optimizer_that_the_script_shows(method, tmp_path):
    class ShownError(Exception):
        pass

    def shown(_params, _settings):
        raise ShownError

    image_set = ImageSet(
        torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 4, tuple("abcd")
    )
    run_of = Run(tmp_path, {"images": 0}, torch.device("cpu"), 30.0)
    engine = Engine(image_set, image_set, 4, 0, None, run_of, Normalize(image_set))
    experiment = dataclasses.replace(
        cifar100_vgg.EXPERIMENT, optimizer=shown, gated_optimizer=shown
    )
    teacher, student = build("VGG16", 4, 0.05), build("VGG7", 4, 0.05)
    transfer = GraphTransferLoss(teacher.channels, 2) if method == "mhgd" else None
    settings = Settings(epochs=1, first_epochs=1, batch_size=4, device="cpu")
    with pytest.raises(ShownError):
        train_student(method, student, teacher, transfer, engine, experiment, settings)


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
def test_losses_are_taken_in_float32_whatever_the_networks_run_in(amp, tmp_path):
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    image_set = ImageSet(images, torch.arange(8) % 4, tuple("abcd"))
    run_of = Run(tmp_path, {"images": 0}, torch.device("cpu"), 30.0)
    engine = Engine(image_set, image_set, 4, 0, amp, run_of, Normalize(image_set))
    with Both(build("VGG7", 4, 0.05), build("VGG16", 4, 0.05), engine) as both:
        for outputs in both(torch.randn(4, 3, 32, 32)):
            assert outputs.logits.dtype == torch.float32


def test_a_record_has_the_mean_of_every_loss_of_an_epoch(tmp_path):
    image_set = ImageSet(
        torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 4, tuple("abcd")
    )
    run_of = Run(tmp_path, {"images": 0}, torch.device("cpu"), 30.0)
    engine = Engine(image_set, image_set, 4, 0, None, run_of, Normalize(image_set))
    transfers = iter([10.0, 30.0, 5.0, torch.inf])

    def step(_images, _labels):
        return {"loss": torch.tensor(1.5), "transfer_loss": torch.tensor(next(transfers))}

    engine.run("student", 2, step, {})
    first, second = run_of.phase("student")["epochs"]
    assert first == {"epoch": 1, "loss": 1.5, "transfer_loss": 20.0}
    assert second == {"epoch": 2, "loss": 1.5, "transfer_loss": None}  # JSON has no infinity


def test_every_row_of_the_heads_table_has_its_own_method(data):
    config = reproduce.Config(data_dir=data, table=("heads",), seeds=(0,), device="cpu")
    cells = [c for c in reproduce.cells_to_train("heads", config) if c.method != "teacher"]
    assert [(c.row.title, c.method) for c in cells] == [
        ("0 heads", "student"), *((f"{n} heads", "mhgd") for n in (1, 2, 4, 8, 16)),
    ]  # fmt: skip
    assert [c.workshop.settings.num_heads for c in cells[1:]] == [1, 2, 4, 8, 16]


def test_every_cell_of_every_table_can_be_trained(data, tmp_path):
    tiny = write_folder(tmp_path / "tiny", tinyimagenet_files())
    for table, rows in PUBLISHED.items():
        folder = tiny if table == "tinyimagenet" else data
        config = reproduce.Config(data_dir=folder, table=(table,), seeds=(0,), device="cpu")
        cells = list(reproduce.cells_to_train(table, config))
        assert {(c.row.title, c.method) for c in cells} >= {
            (row.title, method) for row in rows for method in row.published
        }
        assert {c.method for c in cells} <= {"teacher", *METHODS}
        for cell in cells:
            networks_of = cell.workshop.experiment
            teacher, student = networks_of.teacher(4, 0.1), networks_of.student(4, 0.1)
            assert teacher.channels == student.channels


def test_the_published_numbers_are_the_poster_s():
    assert PUBLISHED["cifar100"][0].published["mhgd"] == 67.02
    assert PUBLISHED["cifar100"][1].published["mhgd"] == 72.79
    assert PUBLISHED["tinyimagenet"][0].published["kd-svdf"] == 55.35
    assert PUBLISHED["tinyimagenet"][1].published["student"] == 55.91
    assert PUBLISHED["students"][1].published["fsp"] == 60.35
    assert [row.published for row in PUBLISHED["heads"]][1:] == [
        {"mhgd": accuracy} for accuracy in (65.71, 66.41, 67.01, 67.02, 66.70)
    ]
    assert PUBLISHED["sota"][0].published["rkd"] == 73.40


def test_rows_that_are_not_in_the_table_are_refused(finished):
    for rows in (["LeNet"], ["VGG", "LeNet"]):
        code, _ = run(*finished[1], "--rows", *rows)
        assert code == "reproduce.py: `--rows` must be some of 'VGG', 'WRN'; got 'LeNet'."


def test_methods_that_the_heads_table_does_not_have_are_refused(data):
    code, _ = run("--table", "heads", "--data-dir", data, "--methods", "mhgd-scaled")
    assert "`--methods` of the table 'heads' must be some of student, mhgd" in code


def test_other_folders_beside_those_of_seeds_are_left_alone(finished):
    out, flags, text = finished
    folder = out / "CIFAR-100" / "VGG16" / "seed-0-old"
    folder.mkdir()
    code, again = run(*flags, "--render-only")
    folder.rmdir()
    assert code == 0
    assert text.endswith(again)


def test_killed_at_random_moments_and_side_by_side_nothing_is_lost(data, tmp_path):
    out = tmp_path / "out"
    flags = ["--data-dir", data, *TINY, "--threads", 1, "--checkpoint-seconds", 0]
    flags += ["--rows", "VGG", "--seeds", 0, 1, "--methods", "student", "mhgd", "fsp"]

    def start(out=out):
        command = [str(word) for word in (sys.executable, SCRIPT, *flags, "--out", out)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait(timeout=120) == 0

    generator, kills = random.Random(1), 0
    while kills < 5:
        before, process = progress(out), start()
        while process.poll() is None and progress(out) <= before:
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.05))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        assert process.returncode == -signal.SIGKILL  # the table is longer than five of these
    both = [start(), start()]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert not list(out.rglob("*.part"))
    assert not list(out.rglob("checkpoint.pt"))
    content = json.loads((out / "cifar100,num_heads=2.json").read_text())
    assert [cell["n"] for cell in content["cells"]] == [2] * 4
    assert networks(out) == networks(tmp_path / "whole")
    for name in ("cifar100,num_heads=2.json", "cifar100,num_heads=2.md"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
