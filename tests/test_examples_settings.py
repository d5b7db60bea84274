"""Flags that can not be meant are refused; files and commits are what others expect of them."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import reproduce
import torch
from parts import environment, script, workshop
from parts.data import ImageSet
from parts.files import write_atomically, write_json
from parts.runs import Run
from parts.settings import Settings

EXAMPLES = Path(reproduce.__file__).parent


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"bound": float("inf")}, "`--bound` must be > 0; got inf"),
        ({"learning_rate": float("nan")}, "`--learning-rate` must be > 0; got nan"),
        ({"checkpoint_seconds": float("nan")}, "`--checkpoint-seconds` must be ≥ 0; got nan"),
        ({"data_name": "../x"}, "`--data-name` must be letters, digits"),
        ({"data_name": ".."}, "`--data-name` must be letters, digits"),
        ({"data_name": ""}, "`--data-name` must be letters, digits"),
        ({"width": 5.0}, "`--width` must be ≤ 4; got 5.0"),
        ({"student_share": 1.5}, "`--student-share` must be ≤ 1; got 1.5"),
        ({"device": "meta"}, "`--device` must be one of this machine; got meta"),
    ],
)
def test_flags_that_can_not_be_meant_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"device": "cpu", **flags})


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(ValueError, match=f"`--seeds` must be ≥ 0 and < .*; got {seed}"):
        reproduce.Config(device="cpu", seeds=(0, seed))
    with pytest.raises(ValueError, match=f"`--seed` must be ≥ 0 and < .*; got {seed}"):
        script.Config(device="cpu", seed=seed)


@pytest.mark.parametrize(
    ("count", "share", "kept"), [(100, 0.3, 30), (100, 0.07, 7), (50, 0.6, 30), (10, 0.25, 3)]
)
def test_a_share_is_rounded_up_from_what_it_is_in_decimals(count, share, kept):
    image_set = ImageSet(
        torch.zeros(2 * count, 3, 2, 2, dtype=torch.uint8), torch.arange(2 * count) % 2, ("a", "b")
    )
    assert len(image_set.take_share(share).images) == 2 * kept


def test_an_import_leaves_the_devices_alone():
    """A script may run on the CPU, or on a GPU of its own among several."""
    code = "import torch; torch.cuda.is_available = lambda: True; import parts.workshop"
    without = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # to wake one fails, on any machine
    subprocess.run([sys.executable, "-c", code], cwd=EXAMPLES, env=without, check=True)


def test_a_broken_connection_is_not_called_a_full_disk(tmp_path):
    def broken(_file):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    with pytest.raises(ConnectionResetError, match="reset by peer") as caught:
        write_atomically(tmp_path / "archive", broken)
    assert "room" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_other_contents_is_refused(tmp_path):
    run = Run(tmp_path, {"images": 0}, torch.device("cpu"), 0.0)
    order = torch.Generator()
    run.epoch("student", {"epoch": 1}, 1.0, {"model": torch.nn.Linear(1, 1)}, order, last=False)
    again = Run(tmp_path, {"images": 0}, torch.device("cpu"), 0.0)
    with pytest.raises(ValueError, match=r"checkpoint\.pt must hold the state of net; it lacks"):
        again.restore("student", {"net": torch.nn.Linear(1, 1)}, order)


def test_a_dev_split_needs_ten_images_of_a_class():
    def load(_data_dir):
        images = torch.randint(256, (18, 3, 32, 32), dtype=torch.uint8)
        image_set = ImageSet(images, torch.arange(18) % 2, ("a", "b"))
        return image_set, image_set

    with pytest.raises(ValueError, match="`--split dev` must have ten training images of a class"):
        workshop._loaded(load, None, None, None, "dev", "cpu")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_may_be_read_by_whom_the_user_lets_read(umask, tmp_path):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "record.json", {})
    finally:
        os.umask(before)
    mode = stat.S_IMODE((tmp_path / "record.json").stat().st_mode)
    assert mode == 0o666 & ~umask


def test_results_do_not_make_a_commit_another(tmp_path, monkeypatch):
    here = tmp_path / "examples" / "parts"
    here.mkdir(parents=True)

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    (here / "environment.py").write_text("# as committed\n")
    git("init")
    git("add", "-A")
    git("commit", "-m", "first")
    monkeypatch.setattr(environment, "__file__", str(here / "environment.py"))
    clean = environment._commit()
    (tmp_path / "examples" / "results").mkdir()
    (tmp_path / "examples" / "results" / "record.json").write_text("{}")
    assert environment._commit() == clean
    assert not clean.endswith("+")
    (here / "environment.py").write_text("# changed\n")
    assert environment._commit() == clean + "+"
