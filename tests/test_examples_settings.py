"""Flags that can not be meant are refused; files and commits are what others expect of them."""

import os
import stat
import subprocess

import pytest
import torch
from parts import environment, workshop
from parts.data import ImageSet
from parts.files import write_json
from parts.settings import Settings


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"bound": float("inf")}, "`--bound` must be > 0; got inf"),
        ({"learning_rate": float("nan")}, "`--learning-rate` must be > 0; got nan"),
        ({"checkpoint_seconds": float("nan")}, "`--checkpoint-seconds` must be ≥ 0; got nan"),
        ({"data_name": "../x"}, "`--data-name` must be letters, digits"),
        ({"data_name": ".."}, "`--data-name` must be letters, digits"),
        ({"data_name": ""}, "`--data-name` must be letters, digits"),
    ],
)
def test_flags_that_can_not_be_meant_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        Settings(device="cpu", **flags)


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
