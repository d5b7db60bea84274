"""Laws of Tiny ImageNet: which image is what, what is refused, and what is decoded only once."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
from email.message import Message
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar_files import write_folder
from parts import download, jpegs, tinyimagenet
from parts.pixels import decode_once
from parts.tinyimagenet import load_tinyimagenet
from PIL import Image
from tinyimagenet_files import COUNTS, NAME, WNIDS, images, jpeg, tinyimagenet_files, write_zip


def decoded(content):
    rgb = Image.open(io.BytesIO(content)).convert("RGB")
    return torch.from_numpy(np.array(rgb).transpose(2, 0, 1))


EXPECTED = {
    split: torch.stack([decoded(c) for key, c in images().items() if key[0] == split])
    for split in COUNTS
}


def assert_stored(sets):
    for split, image_set in zip(COUNTS, sets, strict=True):
        assert image_set.images.dtype == torch.uint8
        assert image_set.images.is_contiguous()
        assert torch.equal(image_set.images, EXPECTED[split])
        assert image_set.labels.dtype == torch.int64
        assert image_set.labels.tolist() == [c for c in range(3) for _ in range(COUNTS[split])]
        assert image_set.class_names == ("school bus", "goldfish, Carassius", "n02")


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "data" / NAME, tinyimagenet_files())


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def test_the_images_are_those_of_pillow_in_the_order_of_wnids(root, cache):
    assert_stored(load_tinyimagenet(root, cache_dir=cache))


def test_every_way_to_name_the_data_reads_the_same(root, cache, tmp_path, monkeypatch):
    zips = tmp_path / "zips"
    zips.mkdir()
    archive = write_zip(zips / f"{NAME}.zip", tinyimagenet_files())
    before = sorted(tmp_path.rglob("*"))
    for path in (root, root.parent, archive, zips):
        assert_stored(load_tinyimagenet(path, cache_dir=cache))
    monkeypatch.chdir(root)
    assert_stored(load_tinyimagenet(Path(), cache_dir=cache))
    assert len(list(cache.iterdir())) == 1  # all of them share the decoded images
    shutil.rmtree(cache)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is extracted


@pytest.mark.parametrize("top", ["", "other/", "./", f"deep/{NAME}/"])
def test_the_top_folder_of_a_zip_may_have_any_name(tmp_path, cache, top):
    files = tinyimagenet_files() | {"a/b/wnids.txt": b"another, deeper down"}
    archive = write_zip(tmp_path / "renamed.zip", files, top)
    assert_stored(load_tinyimagenet(archive, cache_dir=cache))


@pytest.mark.parametrize("val", ["folders", "nested"])
def test_validation_images_may_lie_in_folders_of_their_class(tmp_path, cache, val):
    folder = write_folder(tmp_path, tinyimagenet_files(val))
    assert_stored(load_tinyimagenet(folder, cache_dir=cache))


def test_classes_without_words_keep_their_wnid(root, cache):
    (root / "words.txt").unlink()
    train, val = load_tinyimagenet(root, cache_dir=cache)
    assert train.class_names == val.class_names == tuple(WNIDS)


def test_hidden_files_are_no_images(root, cache):
    write_folder(root, {"train/n01/images/._n01_0.JPEG": b"", "val/images/.DS_Store": b""})
    assert_stored(load_tinyimagenet(root, cache_dir=cache))


def refuse(*_, **__):
    raise AssertionError("decoded again")


def test_decoded_images_are_not_decoded_again(root, cache, monkeypatch):
    first = load_tinyimagenet(root, cache_dir=cache)
    monkeypatch.setattr(jpegs, "_decode", refuse)
    assert_stored(load_tinyimagenet(root, cache_dir=cache))
    first[0].images.zero_()  # a caller's images are the caller's
    assert_stored(load_tinyimagenet(root, cache_dir=cache))


def test_labels_and_names_are_never_those_of_an_earlier_call(root, cache, monkeypatch):
    load_tinyimagenet(root, cache_dir=cache)
    monkeypatch.setattr(jpegs, "_decode", refuse)
    (root / "words.txt").write_text("n03\tother\n")
    assert load_tinyimagenet(root, cache_dir=cache)[0].class_names == ("other", "n01", "n02")


@pytest.mark.parametrize("change", ["size", "order", "place", "name"])
def test_a_changed_source_is_decoded_anew(root, cache, change):
    load_tinyimagenet(root, cache_dir=cache)
    train, val = EXPECTED.values()
    image = root / "train" / "n02" / "images" / "n02_10.JPEG"
    if change == "size":
        image.write_bytes(jpeg(99))
        train = torch.cat([train[:-1], decoded(jpeg(99))[None]])
    elif change == "order":
        (root / "wnids.txt").write_text("n02\nn03\nn01\n")
        train, val = train.roll(11, dims=0), val.roll(2, dims=0)
    elif change == "name":
        image.rename(image.with_name("n02_99.JPEG"))
    else:
        image.rename(image.with_name("n02_-.JPEG"))
        train = torch.cat([train[:22], train[-1:], train[22:-1]])
    for _ in range(2):
        sets = load_tinyimagenet(root, cache_dir=cache)
        assert torch.equal(sets[0].images, train)
        assert torch.equal(sets[1].images, val)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "head", "pixel", "checksum"])
def test_damaged_decoded_images_are_refused_and_kept(root, cache, damage):
    load_tinyimagenet(root, cache_dir=cache)
    (kept,) = cache.iterdir()
    content = bytearray(kept.read_bytes())
    if damage in ("cut", "longer", "empty"):
        content = {"cut": content[:-9], "longer": content + b"a", "empty": b""}[damage]
    else:
        content[{"head": 1, "pixel": 5000, "checksum": -1}[damage]] ^= 4
    kept.write_bytes(content)
    with pytest.raises(ValueError, match=r"\.pixels` must be as it was written; .* Delete it to"):
        load_tinyimagenet(root, cache_dir=cache)
    assert kept.read_bytes() == content
    kept.unlink()
    assert_stored(load_tinyimagenet(root, cache_dir=cache))


def test_the_decoded_images_of_another_set_are_refused(root, cache):
    load_tinyimagenet(root, cache_dir=cache)
    (old,) = cache.iterdir()
    (root / "train" / "n02" / "images" / "n02_10.JPEG").write_bytes(jpeg(99))
    load_tinyimagenet(root, cache_dir=cache)
    (new,) = set(cache.iterdir()) - {old}
    old.replace(new)
    with pytest.raises(ValueError, match=r"\.pixels` must be as it was written"):
        load_tinyimagenet(root, cache_dir=cache)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_decoding_leaves_no_file(root, cache, monkeypatch, error):
    decode, left = jpegs._decode, iter(range(20))

    def interrupted(file, side):
        if next(left, None) is None:
            raise error("stopped")
        return decode(file, side)

    monkeypatch.setattr(jpegs, "_decode", interrupted)
    with pytest.raises(error, match="stopped"):
        load_tinyimagenet(root, cache_dir=cache)
    assert list(cache.iterdir()) == []


def test_a_full_disk_is_reported_and_nothing_is_left(root, cache, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    message = (
        r"could not be kept in .*cache.*No space left .* writable folder with 0 MB free; .*XDG"
    )
    with pytest.raises(RuntimeError, match=message):
        load_tinyimagenet(root, cache_dir=cache)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_made_is_named_before_anything_is_decoded(
    root, tmp_path, monkeypatch
):
    monkeypatch.setattr(jpegs, "_decode", refuse)
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"could not be kept in .*file/cache.*XDG_CACHE_HOME"):
        load_tinyimagenet(root, cache_dir=tmp_path / "file" / "cache")


@pytest.mark.parametrize("xdg", [True, False])
def test_the_default_cache_is_the_users(root, tmp_path, monkeypatch, xdg):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg") if xdg else "")
    load_tinyimagenet(root)
    (kept,) = (tmp_path / ("xdg" if xdg else ".cache") / "graph-kd").iterdir()
    assert kept.name.startswith("tiny-imagenet-200-")


def test_processes_decode_the_same_in_order_and_name_what_they_refuse(tmp_path, monkeypatch):
    monkeypatch.setattr(jpegs, "WORKERS", 2)
    monkeypatch.setattr(jpegs, "FILES_PER_WORKER", 2)
    monkeypatch.setattr(jpegs, "GROUP", 5)
    monkeypatch.setattr(jpegs, "CHUNK", 2)
    files = {f"{n}.JPEG": jpeg(n) for n in range(7)}
    sizes = {name: len(content) for name, content in files.items()}
    drawn = decode_once(sizes, files.__getitem__, 64, tmp_path / "a")
    assert torch.equal(drawn, torch.stack([decoded(content) for content in files.values()]))
    files["3.JPEG"] = b"damaged"
    with pytest.raises(ValueError, match=r"`3\.JPEG` must be a whole JPEG"):
        decode_once(sizes, files.__getitem__, 64, tmp_path / "b")
    assert len(list(tmp_path.iterdir())) == 1


def test_processes_import_nothing_of_the_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\nfrom parts import jpegs\n"
        "if __name__ == '__main__':\n"
        "    with jpegs._processes(2) as pool:\n"
        "        print(pool.submit(eval, \"'torch' in __import__('sys').modules\").result())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(jpegs.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


IMAGE = "train/n01/images/n01_4.JPEG"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"be a whole JPEG image; got UnidentifiedImageError"),
        (b"text", r"be a whole JPEG image; got UnidentifiedImageError"),
        (jpeg(3, kind="PNG"), r"be a whole JPEG image; got UnidentifiedImageError"),
        (jpeg(3)[:300], r"be a whole JPEG image; got \w+: "),
        (jpeg(3)[:-300], r"be a whole JPEG image; got OSError: .*truncated"),
        (jpeg(3, size=(64, 63)), r"be an image of 64×64 pixels; got 64×63"),
        (jpeg(3, size=(32, 64)), r"be an image of 64×64 pixels; got 32×64"),
    ],
    ids=["empty", "text", "png", "head", "truncated", "low", "narrow"],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_rejects_an_image_that_is_none(tmp_path, cache, content, message, zipped):
    files = tinyimagenet_files() | {IMAGE: content}
    data = write_zip(tmp_path / "a.zip", files) if zipped else write_folder(tmp_path / "a", files)
    with pytest.raises(ValueError, match=rf"{IMAGE}` must {message}.*unpack the data set again"):
        load_tinyimagenet(data, cache_dir=cache)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"wnids.txt": None}, FileNotFoundError, r"must be or contain tiny-imagenet-200\[\.zip\]"),
        ({"wnids.txt": b"\n"}, ValueError, r"wnids\.txt` must list at least one class .*; got 0 "),
        (
            {"wnids.txt": b"n01\nn02\nn03\nn01\n"},
            ValueError,
            r"wnids\.txt` must list at least one class and each once; got 4 lines",
        ),
        ({"wnids.txt": b"n01\xff"}, ValueError, r"wnids\.txt` must be text; got"),
        (
            {"wnids.txt": b"n01\nn02\n"},
            ValueError,
            r"wnids\.txt` must list each class that has images in train; got no \['n03'\]",
        ),
        (
            {"wnids.txt": b"n01\nn02\nn03\nn04\n"},
            ValueError,
            r"train` must hold equally many images of each class; got 11 of n01 and 0 of n04",
        ),
        (
            {IMAGE: None},
            ValueError,
            r"train` must hold equally many .*; got 11 of n03 and 10 of n01",
        ),
        (
            {"train/images/a.JPEG": b"a"},
            ValueError,
            r"train` must hold all its images in folders of their class; got .*/a\.JPEG",
        ),
        (
            {"val/n01/a.JPEG": b"a"},
            ValueError,
            r"val` must hold all its images in folders of their class; got val/images/",
        ),
        (
            {"val/val_annotations.txt": None},
            FileNotFoundError,
            r"val/val_annotations\.txt` must exist; there is none",
        ),
        ({"val/images/val_0.JPEG": None}, ValueError, r"list images that exist; .* \['val_0\.JPEG"),
        ({"val/images/a.JPEG": b"a"}, ValueError, r"annotations\.txt` must list every .*a\.JPEG"),
        (
            {"val/val_annotations.txt": b"val_0.JPEG n03\n"},
            ValueError,
            r"have a file and a class on each line; got line 1: 'val_0",
        ),
    ],
)
def test_rejects_a_layout_with_a_gap(tmp_path, cache, changes, error, message):
    files = {n: c for n, c in (tinyimagenet_files() | changes).items() if c is not None}
    with pytest.raises(error, match=message):
        load_tinyimagenet(write_folder(tmp_path, files), cache_dir=cache)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            b"val_0.JPEG\tn03",
            b"val_0.JPEG\tn09",
            r"wnids\.txt` must list each .* in val; .*\['n09'\]",
        ),
        (
            b"val_0.JPEG\tn03",
            b"val_0.JPEG\tn01",
            r"val` must hold equally many .* 3 of n01 and 1 of",
        ),
        (
            b"val_0.JPEG\tn03",
            b"val_1.JPEG\tn03",
            r"must give each image one class; got two of val_1",
        ),
    ],
)
def test_rejects_annotations_that_do_not_fit(root, cache, old, new, message):
    annotations = root / "val" / "val_annotations.txt"
    before = annotations.read_bytes()
    annotations.write_bytes(before.replace(old, new))
    assert annotations.read_bytes() != before
    with pytest.raises(ValueError, match=message):
        load_tinyimagenet(root, cache_dir=cache)


@pytest.mark.parametrize("split", COUNTS)
def test_rejects_a_missing_split(root, cache, split):
    shutil.rmtree(root / split)
    with pytest.raises(
        ValueError, match=rf"{split}` must hold equally many .*; got 0 of n03 and 0"
    ):
        load_tinyimagenet(root, cache_dir=cache)


def test_rejects_a_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`data_dir` must exist; got .*nowhere"):
        load_tinyimagenet(tmp_path / "nowhere")


@pytest.mark.parametrize("kept", [0, 100, -100, -1])
def test_rejects_a_truncated_zip(tmp_path, cache, kept):
    archive = write_zip(tmp_path / "a.zip", tinyimagenet_files())
    archive.write_bytes(archive.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"a\.zip` must be a whole \.zip; got .*Get it again"):
        load_tinyimagenet(archive, cache_dir=cache)


def test_rejects_a_zip_with_a_flipped_bit(tmp_path, cache):
    archive = write_zip(tmp_path / "a.zip", tinyimagenet_files())
    content = archive.read_bytes()
    archive.write_bytes(content.replace(jpeg(4), jpeg(4)[:-9] + b"\0" + jpeg(4)[-8:]))
    with pytest.raises(ValueError, match=r"n03_4\.JPEG` must be readable; got BadZipFile: Bad CRC"):
        load_tinyimagenet(archive, cache_dir=cache)
    assert list(cache.iterdir()) == []


def test_rejects_a_zip_without_classes(tmp_path, cache):
    archive = write_zip(tmp_path / "a.zip", {"readme.txt": b""})
    with pytest.raises(FileNotFoundError, match=r"a\.zip/wnids\.txt` must exist; there is none"):
        load_tinyimagenet(archive, cache_dir=cache)


def test_downloads_once(tmp_path, cache, monkeypatch):
    content = write_zip(tmp_path / "served.zip", tinyimagenet_files()).read_bytes()
    asked = []

    def urlopen(url, timeout):
        assert timeout > 0
        asked.append(url)
        response = io.BytesIO(content)
        response.headers = Message()
        return response

    monkeypatch.setattr(download, "urlopen", urlopen)
    with pytest.raises(RuntimeError, match=r"Tiny ImageNet could not .*MD5 90528d7c.*--data-dir`"):
        load_tinyimagenet(None, cache_dir=cache)
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(tinyimagenet, "MD5", hashlib.md5(content).hexdigest())
    for _ in range(2):
        assert_stored(load_tinyimagenet(None, cache_dir=cache))
    assert asked == ["http://cs231n.stanford.edu/tiny-imagenet-200.zip"] * 2
    assert sorted(path.suffix for path in cache.iterdir()) == [".pixels", ".zip"]
