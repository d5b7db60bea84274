"""Data, augmentation and records of the examples: what is read, drawn, written and refused."""

import json
import os
import pickle

import cifar100_vgg
import cifar_files
import common
import numpy as np
import pytest
import tinyimagenet_vgg
import torch
from cifar_files import PYTHON, digits, write_archive, write_folder
from common import Data, ImageSet, Run
from PIL import Image
from torch import nn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), cifar_files.files())


def random_data(classes=3, per_class=20, batch_size=8, size=8):
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat(per_class)
    images = torch.randint(256, (len(labels), 3, size, size), generator=draw, dtype=torch.uint8)
    part = ImageSet(images, labels)
    std, mean = torch.std_mean(images.float(), dim=(0, 2, 3), keepdim=True)
    return Data(part, part, classes, batch_size, 0, mean, std)


def settings(**changes):
    return cifar100_vgg.Settings(**{"device": "cpu"} | changes)


def assert_digits(train, test):
    for part, split in ((train, "train"), (test, "test")):
        pixels, labels = digits(split)
        assert part.labels.tolist() == labels
        assert np.array_equal(part.images.numpy().reshape(len(pixels), -1), pixels)


def test_every_way_to_name_the_data_reads_the_same(folder, tmp_path, monkeypatch):
    archive = write_archive(tmp_path / f"{PYTHON}.tar.gz", cifar_files.files())
    monkeypatch.setattr(common.pooch, "retrieve", lambda *_, **__: str(archive))
    for path in (folder, folder / PYTHON, archive, tmp_path, None):
        assert_digits(*common.read_cifar100(path))


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_of_python_3_are_read_too(tmp_path, protocol):
    contents = cifar_files.files(lambda entries: pickle.dumps(entries, protocol))
    assert_digits(*common.read_cifar100(write_folder(tmp_path, contents)))


def test_a_pickle_that_names_anything_else_is_not_run(tmp_path):
    contents = cifar_files.files() | {f"{PYTHON}/train": b"cos\nsystem\n(S'touch harm'\ntR."}
    with pytest.raises(ValueError, match=r"UnpicklingError: it names os\.system, which no CIFAR"):
        cifar100_vgg.load(settings(data_dir=write_folder(tmp_path, contents)))
    assert not os.path.exists("harm")  # noqa: PTH110


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("cut", "Error: pickle data was truncated"),
        ("labels", "labels that are no whole numbers"),
        ("pixels", r"pixels uint8 \(400, 3071\) for 400 labels"),
        ("keys", "KeyError: 'fine_labels'"),
        ("archive", "EOFError: Compressed file ended"),
        ("missing", "FileNotFoundError: .*none'"),
    ],
)
def test_damaged_data_are_refused_with_the_reason(tmp_path, damage, reason):
    pixels, labels = digits("train")
    contents, name = cifar_files.files(), f"{PYTHON}/train"
    if damage in ("archive", "missing"):
        path = write_archive(tmp_path / f"{PYTHON}.tar.gz", contents)
        path.write_bytes(path.read_bytes()[:5000])
        path = path if damage == "archive" else tmp_path / "none"
    else:
        contents[name] = {
            "cut": contents[name][:-100],
            "labels": pickle.dumps({"data": pixels, "fine_labels": [-1] * len(labels)}, 2),
            "pixels": pickle.dumps({"data": pixels[:, 1:], "fine_labels": labels}, 2),
            "keys": pickle.dumps({"data": pixels}, 2),
        }[damage]
        path = write_folder(tmp_path, contents)
    wanted = rf"`--data-dir` must be or contain .*; got {tmp_path}.*{reason}.*Get it again"
    with pytest.raises(ValueError, match=wanted):
        cifar100_vgg.load(settings(data_dir=path))


def write_tiny(root, flat=True):
    """Write two classes, not in sorted order, with a grey image and a 10 beside a 9."""
    (root / "val/images").mkdir(parents=True)
    (root / "wnids.txt").write_text("n02\nn01\n")
    wanted, notes = {"train": [], "val": []}, []
    for label, wnid in enumerate(("n02", "n01")):
        for split, count in (("train", 11), ("val", 2)):
            for i in range(count):
                pixels = np.full((64, 64, 3), 20 * i + 5 * label + (split == "val"), np.uint8)
                image = Image.fromarray(pixels).convert("L" if i == 1 else "RGB")
                below = f"{wnid}/images" if split == "train" or not flat else "images"
                (root / split / below).mkdir(parents=True, exist_ok=True)
                file = root / split / below / f"{wnid}_{i}.JPEG"
                image.save(file, quality=100)
                notes += [f"{file.name}\t{wnid}\t0\t0\t9\t9\n"] if split == "val" else []
                wanted[split].append((label, int(pixels[0, 0, 0])))
    if flat:
        (root / "val/val_annotations.txt").write_text("".join(reversed(notes)))
    return wanted


@pytest.mark.parametrize("flat", [True, False])
def test_tiny_imagenet_is_read_class_by_class_and_decoded_once(tmp_path, monkeypatch, flat):
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    wanted = write_tiny(tmp_path / common.TINY, flat=flat)
    for path in (tmp_path, tmp_path / common.TINY):
        for part, split in zip(common.read_tinyimagenet(path), wanted, strict=True):
            found = zip(part.labels.tolist(), part.images[:, 0, 0, 0].tolist(), strict=True)
            assert all(
                label == right and abs(level - p) <= 2
                for (label, level), (right, p) in zip(found, wanted[split], strict=True)
            )
        monkeypatch.setattr(common, "decoded", None)  # the second time nothing is decoded
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"must be a file of these scripts; .*Delete it to decode"):
        common.read_tinyimagenet(tmp_path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("image", r"OSError: .*n01_3\.JPEG: "),
        ("missing", r"val has no n01_0\.JPEG"),
        ("wnids", r"train has not the classes of wnids\.txt"),
    ],
)
def test_a_tiny_imagenet_with_a_gap_is_refused(tmp_path, monkeypatch, damage, reason):
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    root = tmp_path / common.TINY
    write_tiny(root)
    file = root / "train/n01/images/n01_3.JPEG"
    if damage == "image":
        file.write_bytes(file.read_bytes()[:300])
    elif damage == "missing":
        (root / "val/images/n01_0.JPEG").unlink()
    else:
        (root / "wnids.txt").write_text("n02\nn01\nn03\n")
    with pytest.raises(ValueError, match=f"`--data-dir` must be .*{reason}"):
        tinyimagenet_vgg.load(settings(data_dir=tmp_path))
    assert not list((tmp_path / "cache").glob("*"))


def test_a_share_a_limit_and_a_dev_split_take_the_first_images_of_each_class(folder):
    whole = cifar100_vgg.load(settings(data_dir=folder, classes=4))
    assert (whole.classes, len(whole.train.labels), len(whole.test.labels)) == (4, 160, 40)
    assert torch.bincount(whole.share(0.07).train.labels).tolist() == [3] * 4
    dev = cifar100_vgg.load(settings(data_dir=folder, split="dev"))
    assert (len(dev.train.labels), len(dev.test.labels)) == (360, 40)
    few = cifar100_vgg.load(settings(data_dir=folder, limit_per_class=2))
    assert torch.bincount(few.train.labels).tolist() == [2] * 10
    assert len({data.digest for data in (whole, dev, few)}) == 3


def test_images_are_standardised_and_a_constant_channel_becomes_zero():
    part = random_data().train
    part.images[:, 2] = 7
    plain = common.load(settings(), lambda _path: (part, part)).normalize(part.images)
    torch.testing.assert_close(plain.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    wanted = torch.tensor([1.0, 1.0, 0.0])
    torch.testing.assert_close(plain.var(dim=(0, 2, 3), correction=0), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 4}, "`--classes` must be ≤ 3; got 4"),
        ({"split": "dev"}, "`--split dev` must have ten training images of a class; got fewer"),
    ],
)
def test_more_than_the_data_have_is_refused(change, message):
    part = random_data(per_class=9).train
    with pytest.raises(ValueError, match=message):
        common.load(settings(**change), lambda _path: (part, part))


def test_an_epoch_holds_each_image_once():
    data = random_data(per_class=16)
    batches = list(data.batches(torch.Generator().manual_seed(0)))
    assert torch.cat([labels for _, labels in batches]).bincount().tolist() == [16] * 3
    assert {tuple(images.shape) for images, _ in batches} == {(8, 3, 8, 8)}
    again = next(data.batches(torch.Generator().manual_seed(0)))[0]
    assert torch.equal(again, batches[0][0])


def test_too_few_images_for_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"`--batch-size` must be ≤ 60, .*; got 61\. Take"):
        next(random_data(batch_size=61).batches(torch.Generator()))


def test_crop_and_flip_are_those_of_a_padded_image():
    images = random_data().train.images
    drawn = common.random_crop_flip(images, torch.Generator().manual_seed(3), padding=2)
    padded = nn.functional.pad(images.float(), [2] * 4, mode="reflect").byte()
    shifts = set()
    for n, got in enumerate(drawn):
        found = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            for crop in [padded[n, :, top : top + 8, left : left + 8]]
            if torch.equal(got, crop.flip(2) if flip else crop)
        ]
        assert found
        shifts |= set(found)
    assert len(shifts) > 25  # of 50


def test_accuracy_is_that_of_all_test_images_in_evaluation_mode():
    data = random_data()
    network = nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(192, 3))
    got = common.accuracy(network, data, settings())
    network.eval()
    right = (network(data.normalize(data.test.images)).argmax(1) == data.test.labels).float()
    assert got == pytest.approx(100 * right.mean().item(), abs=0.01)


@pytest.mark.parametrize(("epochs", "falls"), [(10, [3, 6, 8]), (5, [2, 3, 4]), (1, [1])])
def test_rate_falls_at_30_60_and_80_per_cent(epochs, falls):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    assert sorted(common.step_decay(optimizer, epochs).milestones) == falls


def run_two_epochs(out, value, **changes):
    """Return the number of epochs that were run, the model and the record."""
    model, done = nn.Linear(1, 1), 0
    run = Run(settings(out=out, **changes), random_data(), "student")
    parts = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    for _ in run.epochs("student", 2, **parts):
        done += 1
        nn.init.constant_(model.weight, value)
        run.log([[torch.tensor(value)]], test_accuracy=value)
    return done, model, run.finish()


def test_other_settings_are_another_file_and_a_finished_run_is_not_run_again(tmp_path):
    assert run_two_epochs(tmp_path, 7.0)[0] == 2
    assert run_two_epochs(tmp_path, 8.0, seed=1)[0] == 2
    done, model, record = run_two_epochs(tmp_path, 9.0, num_heads=2)  # which a student has not
    assert (done, model.weight.item(), record["accuracy"]) == (0, 7.0, 7.0)
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["settings"]["seed"] for line in lines] == [0, 1]
    assert {"graph_kd", "torch", "python", "hardware", "commit"} == set(record["versions"])
    for network in (tmp_path / "networks").glob("student-0-*"):
        network.unlink()
    run_two_epochs(tmp_path, 9.0)  # again, in place of the first
    lines = common.read_records(tmp_path / "records.jsonl")
    assert [(line["settings"]["seed"], line["accuracy"]) for line in lines] == [(0, 9.0), (1, 8.0)]


def test_a_run_that_diverges_leaves_no_record(tmp_path):
    with pytest.raises(common.DivergedError, match=r"must stay finite; got .*`--learning-rate`"):
        run_two_epochs(tmp_path, float("nan"))
    assert not (tmp_path / "records.jsonl").exists()


def test_a_damaged_checkpoint_and_damaged_records_are_named(tmp_path):
    run_two_epochs(tmp_path, 7.0)
    (checkpoint,) = (tmp_path / "networks").iterdir()
    common.write_atomically(checkpoint, b"no checkpoint")
    with pytest.raises(ValueError, match=r"student-0-.*must be a file of .*Delete it to train"):
        run_two_epochs(tmp_path, 7.0)
    (tmp_path / "records.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"records.jsonl` must hold a JSON .*Move it away"):
        run_two_epochs(tmp_path, 7.0, seed=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "`--epochs` must be ≥ 1; got 0"),
        ({"teacher_epochs": -1}, "`--teacher-epochs` must be ≥ 0; got -1"),
        ({"first_epochs": -1}, "`--first-epochs` must be ≥ 0; got -1"),
        ({"batch_size": 1}, "`--batch-size` must be ≥ 2; got 1"),
        ({"learning_rate": 0.0}, "`--learning-rate` must be > 0 and finite; got 0"),
        ({"bound": float("inf")}, "`--bound` must be > 0 and finite; got inf"),
        ({"width": 5.0}, "`--width` must be > 0 and ≤ 4; got 5"),
        ({"student_share": 1.5}, "`--student-share` must be > 0 and ≤ 1; got 1.5"),
        ({"soft_share": float("nan")}, "`--soft-share` must be ≥ 0 and ≤ 1; got nan"),
        ({"num_heads": 0}, "`--num-heads` must be ≥ 1; got 0"),
        ({"seed": -1}, r"`--seed` must be ≥ 0 and < 2\*\*63; got -1"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        settings(**change)
