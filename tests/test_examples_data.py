"""Laws of the example scripts' data: what is read, what is refused, and how batches are drawn."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
import urllib.error
from dataclasses import replace
from email.message import Message
from http.client import IncompleteRead
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cifar_files import (
    BINARY,
    COUNTS,
    NAMES,
    PYTHON,
    binary_files,
    labels,
    pixels,
    python2_pickle,
    python_files,
    write_archive,
    write_folder,
)
from einops import rearrange
from parts import data, download
from parts.augment import Normalize, batches, random_crop_flip
from parts.data import ImageSet, load_cifar100


def assert_stored(sets):
    for split, image_set in zip(COUNTS, sets, strict=True):
        expected = torch.from_numpy(pixels(split).reshape(-1, 3, 32, 32))
        assert image_set.images.dtype == torch.uint8
        assert image_set.images.is_contiguous()
        assert torch.equal(image_set.images, expected)
        assert image_set.labels.dtype == torch.int64
        assert image_set.labels.tolist() == labels(split)
        assert image_set.class_names == tuple(NAMES)


@pytest.fixture
def python_dir(tmp_path):
    return write_folder(tmp_path, python_files())


@pytest.mark.parametrize("files", [python_files(), binary_files()], ids=["python", "binary"])
def test_both_layouts_hold_the_stored_images(tmp_path, files):
    assert_stored(load_cifar100(write_folder(tmp_path, files)))


@pytest.mark.parametrize("files", [python_files(), binary_files()], ids=["python", "binary"])
def test_every_way_to_name_the_data_reads_the_same(tmp_path, monkeypatch, files):
    layout = next(iter(files)).split("/")[0]
    folder = write_folder(tmp_path / "folder", files) / layout
    renamed = (write_folder(tmp_path / "other", files) / layout).rename(tmp_path / "renamed")
    (tmp_path / "archives").mkdir()
    archive = write_archive(tmp_path / "archives" / f"{layout}.tar.gz", files)
    before = sorted(tmp_path.rglob("*"))
    for path in (folder, renamed, archive, archive.parent):
        assert_stored(load_cifar100(path))
    monkeypatch.chdir(folder)
    assert_stored(load_cifar100(Path()))
    assert sorted(tmp_path.rglob("*")) == before  # nothing is extracted


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F"])
def test_pickles_of_python_3_hold_the_stored_images(tmp_path, protocol, order):
    def dumps(entries):
        if "data" in entries:
            entries["data"] = np.asarray(entries["data"], order=order)
        return pickle.dumps(entries, protocol=protocol)

    assert_stored(load_cifar100(write_folder(tmp_path, python_files(dumps))))


def test_pickles_of_python_3_may_have_bytes_as_keys_and_names(tmp_path):
    def dumps(entries):
        if "fine_label_names" in entries:
            entries["fine_label_names"] = [name.encode() for name in NAMES]
        return pickle.dumps({key.encode(): value for key, value in entries.items()}, protocol=2)

    assert_stored(load_cifar100(write_folder(tmp_path, python_files(dumps))))


def test_the_old_and_the_new_module_name_of_numpy_mean_the_same(tmp_path):
    def dumps(entries):
        old, new = b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"
        return python2_pickle(entries).replace(old, new)

    assert dumps({"data": pixels("train")}) != python2_pickle({"data": pixels("train")})
    assert_stored(load_cifar100(write_folder(tmp_path, python_files(dumps))))


def test_the_python_layout_wins_over_the_binary_one(python_dir):
    write_folder(python_dir, binary_files() | {f"{BINARY}/train.bin": b"damaged"})
    assert_stored(load_cifar100(python_dir))


def test_an_archive_may_begin_its_names_with_a_dot(tmp_path):
    files = {f"./{name}": content for name, content in python_files().items()}
    assert_stored(load_cifar100(write_archive(tmp_path / f"{PYTHON}.tar.gz", files)))


def test_rejects_a_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`data_dir` must exist; got .*nowhere"):
        load_cifar100(tmp_path / "nowhere")


def test_rejects_a_folder_without_either_layout(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"must be or contain cifar-100-python\[\.tar\.gz\]"
    ):
        load_cifar100(tmp_path)


@pytest.mark.parametrize("name", sorted(python_files() | binary_files()))
def test_rejects_a_missing_file(tmp_path, name):
    files = python_files() if name.startswith(PYTHON) else binary_files()
    write_folder(tmp_path, files)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}` must be a file of the cifar-100-"):
        load_cifar100(tmp_path)


def test_the_working_folder_is_named_by_its_layout_too(python_dir, monkeypatch):
    (python_dir / PYTHON / "meta").unlink()
    monkeypatch.chdir(python_dir / PYTHON)
    with pytest.raises(FileNotFoundError, match=r"`meta` must be a file of the cifar-100-python"):
        load_cifar100(Path())


@pytest.mark.parametrize("name", sorted(python_files() | binary_files()))
def test_rejects_an_archive_without_a_file(tmp_path, name):
    files = python_files() if name.startswith(PYTHON) else binary_files()
    del files[name]
    archive = write_archive(tmp_path / f"{name.split('/')[0]}.tar.gz", files)
    with pytest.raises(ValueError, match=rf"tar\.gz` must contain .*; got no {name}\."):
        load_cifar100(archive)


@pytest.mark.parametrize("kept", [0, 1, 100, -2000, -3, -1])
def test_rejects_a_truncated_archive(tmp_path, kept):
    archive = write_archive(tmp_path / f"{PYTHON}.tar.gz", python_files())
    archive.write_bytes(archive.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"python\.tar\.gz` must (be a whole|contain)"):
        load_cifar100(archive)


@pytest.mark.parametrize("part", range(8))
def test_rejects_an_archive_with_a_flipped_bit(tmp_path, part):
    archive = write_archive(tmp_path / f"{PYTHON}.tar.gz", python_files())
    content = bytearray(archive.read_bytes())
    content[200 + part * (len(content) - 200) // 8] ^= 16
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"python\.tar\.gz` must be a whole \.tar\.gz; got \w+"):
        load_cifar100(archive)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]
)
def test_rejects_an_archive_member_that_is_no_regular_file(tmp_path, kind):
    path = tmp_path / f"{PYTHON}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo(f"{PYTHON}/meta")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(ValueError, match=r"python/meta` must be a regular file"):
        load_cifar100(path)


@pytest.mark.parametrize("kept", [0, 1, 40, 5000, -1])
@pytest.mark.parametrize("name", ["train", "test"])
def test_rejects_a_truncated_pickle(python_dir, name, kept):
    file = python_dir / PYTHON / name
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"python/{name}` must be a whole CIFAR pickle; got \w+"):
        load_cifar100(python_dir)


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("name", ["train", "meta"])
def test_a_malicious_pickle_does_not_run(python_dir, name):
    target = python_dir / "ran"
    attack = pickle.dumps({"data": Malicious(target)})
    (python_dir / PYTHON / name).write_bytes(attack)
    with pytest.raises(ValueError, match=rf"{name}` .*{os.name}\.system, which no CIFAR pickle"):
        load_cifar100(python_dir)
    assert not target.exists()
    pickle.loads(attack)  # the attack is real: the ordinary unpickler falls for it
    assert target.exists()


@pytest.mark.parametrize(
    "name", [b"builtins\neval", b"numpy\nload", b"numpy.core.multiarray\nscalar"]
)
def test_only_what_a_cifar_pickle_needs_is_resolved(python_dir, name):
    (python_dir / PYTHON / "train").write_bytes(b"\x80\x02c" + name + b"\n.")
    found = name.decode().replace("\n", ".")
    with pytest.raises(ValueError, match=f"got UnpicklingError: {found}, which no CIFAR pickle"):
        load_cifar100(python_dir)


def damaged(**changes):
    entries = {"data": pixels("train"), "fine_labels": labels("train")} | changes
    return pickle.dumps({key: value for key, value in entries.items() if value is not None})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([1, 2]), r"train` must hold a dict; got list\."),
        (damaged(data=None), r"train` must have the keys data, fine_labels; got \['fine_labels'\]"),
        (damaged(fine_labels=None), r"must have the keys data, fine_labels; got \['data'\]"),
        (damaged(data="text"), r"train` must hold `data` as an array; got str\."),
        (damaged(data=pixels("train").astype(np.float32)), r"dtype u1 .*; got dtype f4"),
        (damaged(data=pixels("train").astype(np.int8)), r"dtype u1 .*; got dtype i1"),
        (damaged(data=np.array([None])), r"dtype u1 .*; got dtype O8"),
        (damaged(data=pixels("train")[:, :-1]), r"shape \(n ≥ 1, 3072\); got .*\(9, 3071\)"),
        (damaged(data=pixels("train").reshape(-1, 3, 1024)), r"got .*shape \(9, 3, 1024\)"),
        (damaged(data=pixels("train").ravel()), r"got .*shape \(27648,\)"),
        (damaged(data=pixels("train")[:0]), r"got .*shape \(0, 3072\)"),
        (
            python2_pickle({"fine_labels": []})[:-2] + b"T\4\0\0\0datacnumpy\nndarray\n)Ru.",
            "got dtype",
        ),
        (
            damaged(fine_labels=labels("train")[1:]),
            r"train` must label each of its 9 images; got 8",
        ),
        (damaged(fine_labels=7), r"train` must hold `fine_labels` as a list of int; got int\."),
        (damaged(fine_labels=["bee"] * 9), r"train` must hold `fine_labels` as a list of int"),
        (damaged(fine_labels=[0] * 8 + [4]), r"have labels from 0 to 3, .*; got \[4\]"),
        (damaged(fine_labels=[0] * 8 + [-1]), r"have labels from 0 to 3, .*; got \[-1\]"),
        (damaged(fine_labels=[0] * 8 + [1 << 80]), r"have labels from 0 to 3, .*; got \[12089"),
    ],
)
def test_rejects_a_pickle_of_other_content(python_dir, content, message):
    (python_dir / PYTHON / "train").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_cifar100(python_dir)


def test_rejects_more_bytes_than_the_shape_of_an_array_holds(python_dir):
    array = SimpleNamespace(shape=(1, 3072), tobytes=lambda: bytes(3073))
    content = python2_pickle({"data": array, "fine_labels": [0]})
    (python_dir / PYTHON / "train").write_bytes(content)
    with pytest.raises(ValueError, match=r"got dtype u1, shape \(1, 3072\), 3073 bytes"):
        load_cifar100(python_dir)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"other": 1}, r"meta` must have the keys fine_label_names; got \['other'\]"),
        ({"fine_label_names": []}, r"meta` must name at least one class"),
        ({"fine_label_names": 3}, r"meta` must list the class names as text; got"),
        ({"fine_label_names": [1, 2]}, r"meta` must list the class names as text; got"),
        ({"fine_label_names": [b"\xff"]}, r"meta` must list the class names as text; got"),
    ],
)
def test_rejects_a_meta_file_without_class_names(python_dir, content, message):
    (python_dir / PYTHON / "meta").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_cifar100(python_dir)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train.bin",
            bytes(3073),
            r"train\.bin` must hold one or more records of 3074 .*got 3073 b",
        ),
        ("test.bin", bytes(3075), r"test\.bin` must hold one or more records of 3074 .*got 3075 b"),
        ("test.bin", b"", r"test\.bin` must hold one or more records of 3074 bytes; got 0 bytes"),
        (
            "train.bin",
            b"\0\4" + bytes(3072),
            r"train\.bin` must have labels from 0 to 3.*got \[4\]",
        ),
        ("fine_label_names.txt", b"\n", r"names\.txt` must name at least one class; got none"),
        ("fine_label_names.txt", b"\xff\n", r"names\.txt` must list the class names as text; got"),
    ],
)
def test_rejects_binary_files_of_other_content(tmp_path, name, content, message):
    write_folder(tmp_path, binary_files() | {f"{BINARY}/{name}": content})
    with pytest.raises(ValueError, match=message):
        load_cifar100(tmp_path)


def test_damage_anywhere_ends_in_a_value_error_or_in_data(python_dir):
    file = python_dir / PYTHON / "test"
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(3):
            at = int(rng.choice([rng.integers(400), rng.integers(-200, 0)]))
            content[at] = rng.integers(256)
        file.write_bytes(content)
        try:
            load_cifar100(python_dir)
        except ValueError as error:
            assert "python/test` must" in str(error)  # noqa: PT017  # some damage is readable
            refused += 1
    assert refused > 100


class Response(io.BytesIO):
    def __init__(self, content, error=None):
        super().__init__(content)
        self.headers = Message()
        self.headers["Content-Length"] = str(len(content))
        self.error = error

    def read(self, size=-1):
        chunk = super().read(size)
        if not chunk and self.error:
            raise self.error
        return chunk


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Serve a tiny archive in place of the real one and list the addresses asked for."""
    content = write_archive(tmp_path / "served.tar.gz", python_files()).read_bytes()
    asked = []

    def urlopen(url, timeout):
        assert timeout > 0
        asked.append(url)
        return Response(content)

    monkeypatch.setattr(download, "urlopen", urlopen)
    monkeypatch.setattr(data, "MD5", hashlib.md5(content).hexdigest())
    return asked


def test_downloads_once(tmp_path, served):
    cache = tmp_path / "deep" / "cache"
    for _ in range(2):
        assert_stored(load_cifar100(None, cache_dir=cache))
    assert served == ["https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"]
    assert [path.name for path in cache.iterdir()] == ["cifar-100-python.tar.gz"]


@pytest.mark.parametrize("xdg", [True, False])
def test_the_default_cache_is_the_users(tmp_path, monkeypatch, served, xdg):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg") if xdg else "")
    load_cifar100(None)
    parent = tmp_path / ("xdg" if xdg else ".cache") / "graph-kd"
    assert (parent / "cifar-100-python.tar.gz").is_file()
    assert len(served) == 1


def test_given_data_is_never_downloaded(python_dir, served):
    assert_stored(load_cifar100(python_dir))
    assert served == []


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (urllib.error.URLError("no route"), "URLError: .*no route"),
        (TimeoutError("timed out"), "TimeoutError: timed out"),
    ],
)
def test_a_refused_connection_says_how_to_give_the_data(tmp_path, monkeypatch, failure, message):
    def urlopen(_, timeout):
        assert timeout > 0
        raise failure

    monkeypatch.setattr(download, "urlopen", urlopen)
    with pytest.raises(RuntimeError, match=rf"could not be downloaded .*{message}.*`--data-dir`"):
        load_cifar100(None, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, "download` must have MD5 eb9058c3a382ffc7106e4002c42a8d85; got eec15aae"),
        (TimeoutError("timed out"), "TimeoutError: timed out"),
        (IncompleteRead(b"ab"), "IncompleteRead"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_a_broken_download_leaves_no_file(tmp_path, monkeypatch, error, message):
    monkeypatch.setattr(download, "urlopen", lambda _, timeout: Response(b"ab" * timeout, error))
    with pytest.raises(RuntimeError, match=rf"could not be downloaded .*{message}.*`--data-dir`"):
        load_cifar100(None, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_download_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(
        download, "urlopen", lambda _, timeout: Response(b"ab", KeyboardInterrupt(timeout))
    )
    with pytest.raises(KeyboardInterrupt, match="30"):
        load_cifar100(None, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_made_is_named(tmp_path, served):
    (tmp_path / "file").touch()
    with pytest.raises(
        RuntimeError, match=r"could not be downloaded .*Error: .*file.*`--data-dir`"
    ):
        load_cifar100(None, cache_dir=tmp_path / "file" / "cache")
    assert served == []


def test_a_damaged_cached_archive_is_reported_and_kept(tmp_path, served):
    archive = tmp_path / "cifar-100-python.tar.gz"
    archive.write_bytes(b"ab")
    with pytest.raises(ValueError, match=r"tar\.gz` must have MD5 \w+; got \w+\. Delete it to"):
        load_cifar100(None, cache_dir=tmp_path)
    assert archive.read_bytes() == b"ab"
    assert served == []


def image_set(n=12, size=8, classes=3):
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(n) * 5 % classes, tuple("abcdefgh"[:classes]))


def test_the_limit_keeps_the_first_of_each_class_in_stored_order():
    whole = ImageSet(
        rearrange(torch.arange(8, dtype=torch.uint8), "n -> n 1 1 1"),
        torch.tensor([2, 0, 0, 2, 0, 2, 2, 0]),
        ("a", "b", "c"),
    )
    kept = whole.take_per_class(2)
    assert rearrange(kept.images, "n 1 1 1 -> n").tolist() == [0, 1, 2, 3]
    assert kept.labels.tolist() == [2, 0, 0, 2]
    assert kept.class_names == whole.class_names
    assert kept.num_classes == 3
    assert whole.take_per_class(None) is whole
    assert torch.equal(whole.take_per_class(9).labels, whole.labels)


def test_rejects_a_limit_below_one():
    with pytest.raises(ValueError, match="`limit` must be an int ≥ 1 or None; got 0"):
        image_set().take_per_class(0)


@pytest.mark.parametrize("limit", [True, 1.5, "3"])
def test_rejects_a_limit_that_is_no_int(limit):
    with pytest.raises(TypeError, match="`limit` must be an int or None; got"):
        image_set().take_per_class(limit)


def test_a_set_moves_whole():
    moved = image_set().to("meta")
    assert moved.images.device.type == moved.labels.device.type == "meta"
    assert moved.class_names == image_set().class_names


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_normalised_training_pixels_have_mean_zero_and_variance_one():
    train = image_set(n=20)
    normalized = Normalize(train)(train.images)
    assert normalized.dtype == torch.float32
    channels = rearrange(normalized.double(), "n c h w -> c (n h w)")
    assert channels.mean(dim=1) == pytest.approx([0, 0, 0], abs=1e-6)
    assert channels.std(dim=1, correction=0) == pytest.approx([1, 1, 1], abs=1e-6)


def test_other_images_are_normalised_by_the_training_pixels():
    train, other = image_set(n=20), image_set(n=2).images
    values = train.images.double()
    mean, std = values.mean(dim=(0, 2, 3)), values.std(dim=(0, 2, 3), correction=0)
    expected = (other - rearrange(mean, "c -> c 1 1")) / rearrange(std, "c -> c 1 1")
    torch.testing.assert_close(Normalize(train)(other).double(), expected, rtol=1e-5, atol=1e-6)


def test_rejects_a_constant_channel():
    train = image_set()
    train.images[:, 1] = 7
    with pytest.raises(ValueError, match=r"`train` must vary in every channel; got .* 0\.0, "):
        Normalize(train)


def crops_and_flips(image, padding):
    """List every crop of one reflection-padded image, each plain and mirrored, by loops."""
    _, h, w = image.shape
    padded = np.pad(image.numpy(), ((0, 0), (padding, padding), (padding, padding)), mode="reflect")
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = torch.from_numpy(padded[:, top : top + h, left : left + w].copy())
            yield (top, left, False), crop
            yield (top, left, True), crop.flip(2)


@pytest.mark.parametrize("shape", [(8, 8), (5, 9)])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_each_output_is_a_crop_of_its_padded_image_perhaps_flipped(shape, padding):
    images = torch.rand(6, 3, *shape, generator=seeded())
    drawn = random_crop_flip(images, seeded(1), padding=padding)
    assert drawn.shape == images.shape
    for image, output in zip(images, drawn, strict=True):
        candidates = crops_and_flips(image, padding)
        assert any(torch.equal(crop, output) for _, crop in candidates)


def test_every_offset_and_both_flips_are_drawn_equally_often():
    padding, n = 1, 3600
    image = torch.randint(256, (3, 4, 4), dtype=torch.uint8, generator=seeded())
    drawn = random_crop_flip(image.expand(n, -1, -1, -1), seeded(1), padding=padding)
    counts = [
        int((drawn == crop).all(dim=(1, 2, 3)).sum()) for _, crop in crops_and_flips(image, padding)
    ]
    assert sum(counts) == n
    assert min(counts) > 150  # 18 equally likely outcomes: 200 expected, standard deviation 14
    assert max(counts) < 250


def test_augmentation_keeps_dtype_and_leaves_its_input_alone():
    images = image_set().images
    before = images.clone()
    assert random_crop_flip(images, seeded()).dtype == torch.uint8
    assert torch.equal(images, before)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_changes_nothing_and_is_kept(memory_format):
    images = image_set().images
    drawn = random_crop_flip(images.to(memory_format=memory_format), seeded())
    assert drawn.is_contiguous(memory_format=memory_format)
    assert torch.equal(drawn, random_crop_flip(images, seeded()))
    chosen, _ = next(
        batches(replace(image_set(), images=images.to(memory_format=memory_format)), 5)
    )
    assert Normalize(image_set())(chosen).is_contiguous(memory_format=memory_format)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no queue to wait for")
def test_drawing_a_batch_does_not_wait_for_the_gpu():
    on_gpu, generator = image_set().to("cuda"), seeded()
    normalize = Normalize(on_gpu)
    normalized = [
        normalize(random_crop_flip(i, generator)) for i, _ in batches(on_gpu, 5, generator)
    ]
    drawing = batches(on_gpu, 5, generator)  # the order is moved once, here
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, _ in drawing:
            normalized.append(normalize(random_crop_flip(images, generator)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(normalized) == 4


def test_the_generator_alone_decides_the_augmentation():
    images = image_set().images
    first = random_crop_flip(images, seeded(3))
    torch.rand(5)
    assert torch.equal(first, random_crop_flip(images, seeded(3)))
    assert not torch.equal(first, random_crop_flip(images, seeded(4)))


@pytest.mark.parametrize("padding", [-1, 8])
def test_rejects_a_padding_that_cannot_be_reflected(padding):
    with pytest.raises(ValueError, match=rf"`padding` must be from 0 to .* = 7; got {padding}\."):
        random_crop_flip(image_set().images, seeded(), padding=padding)


def test_rejects_images_without_a_batch_axis():
    with pytest.raises(ValueError, match=r'must have axes "b c h w"; got shape \(3, 8, 8\)'):
        random_crop_flip(image_set().images[0], seeded())


def numbered(n):
    """Make a set whose images and labels carry their position."""
    number = torch.arange(n)
    return ImageSet(rearrange(number.to(torch.uint8), "n -> n 1 1 1"), number, ("a",) * n)


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (9, 3), (3, 3), (7, 1)])
def test_training_batches_are_full_and_hold_each_image_at_most_once(n, batch_size):
    drawn = list(batches(numbered(n), batch_size, seeded()))
    assert [len(labels) for _, labels in drawn] == [batch_size] * (n // batch_size)
    seen = torch.cat([labels for _, labels in drawn]).tolist()
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(n))
    for images, of_images in drawn:
        assert torch.equal(rearrange(images, "b 1 1 1 -> b").long(), of_images)


def test_each_training_epoch_has_its_own_order_and_the_seed_decides_them_all():
    def run(seed):
        generator = seeded(seed)
        epochs = [batches(numbered(50), 10, generator) for _ in range(3)]
        return [torch.cat([labels for _, labels in epoch]).tolist() for epoch in epochs]

    first = run(0)
    assert first == run(0)
    assert first != run(1)
    assert len({tuple(order) for order in [*first, range(50)]}) == 4


def test_the_image_left_out_changes_between_epochs():
    generator = seeded()
    left_out = {
        frozenset(range(7))
        - {int(i) for _, labels in batches(numbered(7), 3, generator) for i in labels}
        for _ in range(60)
    }
    assert len(left_out) == 7


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (9, 3), (2, 5)])
def test_evaluation_batches_hold_every_image_in_stored_order(n, batch_size):
    drawn = list(batches(numbered(n), batch_size))
    assert len(drawn) == -(-n // batch_size)
    assert torch.cat([labels for _, labels in drawn]).tolist() == list(range(n))
    assert torch.equal(torch.cat([images for images, _ in drawn]), numbered(n).images)


def test_rejects_fewer_training_images_than_a_batch_at_once():
    with pytest.raises(ValueError, match=r"`batch_size` must be ≤ 4, the number of .*; got 5\."):
        batches(numbered(4), 5, seeded())


@pytest.mark.parametrize("generator", [None, seeded()])
def test_rejects_a_batch_size_below_one(generator):
    with pytest.raises(ValueError, match="`batch_size` must be an int ≥ 1; got 0"):
        batches(numbered(4), 0, generator)


def test_rejects_a_batch_size_that_is_no_int():
    with pytest.raises(TypeError, match=r"`batch_size` must be an int; got 2\.0"):
        batches(numbered(4), 2.0)
