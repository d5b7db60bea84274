"""Data, augmentation, records and settings of the examples: what is read, drawn and refused."""

import io
import pickle
from functools import partial
from itertools import product

import cifar100_vgg
import cifar_files
import common
import numpy as np
import pytest
import quickstart
import reproduce
import tinyimagenet_vgg
import torch
from cifar_files import PYTHON, digits, write_archive, write_folder
from common import TINY, ImageSet, Run
from PIL import Image
from torch import nn

TRAIN, ARCHIVE = f"unpacked/{PYTHON}/train", f"{PYTHON}.tar.gz"
PIXELS, LABELS = digits("train")


@pytest.fixture(autouse=True)
def own_folder_and_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


settings = partial(cifar100_vgg.Settings, device="cpu")
tables = partial(reproduce.Settings, device="cpu")


def random_data(per_class=20, **changes):
    """Load random images of three classes, the same ones to learn from and to measure on."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(per_class)
    images = torch.randint(256, (len(labels), 3, 8, 8), generator=draw, dtype=torch.uint8)
    part = ImageSet(images, labels)
    return common.load(settings(**{"batch_size": 8} | changes), lambda _path: (part, part))


def first_batch(**changes):
    return next(random_data(**changes).batches(torch.Generator().manual_seed(0)))


def test_images_are_standardised_and_a_constant_channel_becomes_zero():
    part = random_data().train
    part.images[:, 2] = 7
    plain = common.load(settings(), lambda _path: (part, part)).normalize(part.images)
    torch.testing.assert_close(plain.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    wanted = torch.tensor([1.0, 1.0, 0.0])
    torch.testing.assert_close(plain.var(dim=(0, 2, 3), correction=0), wanted)


def test_an_epoch_holds_each_image_once():
    batches = list(random_data(per_class=16).batches(torch.Generator().manual_seed(0)))
    assert torch.cat([labels for _, labels in batches]).bincount().tolist() == [16] * 3
    assert {tuple(images.shape) for images, _ in batches} == {(8, 3, 8, 8)}
    assert torch.equal(first_batch()[0], first_batch()[0])


def test_crop_and_flip_are_those_of_a_padded_image():
    images = random_data().train.images
    drawn = common.random_crop_flip(images, torch.Generator().manual_seed(3), padding=2)
    padded = nn.functional.pad(images.float(), [2] * 4, mode="reflect").byte()
    shifts = set()
    for n, got in enumerate(drawn):
        found = [
            (top, left, flip)
            for top, left, flip in product(range(5), range(5), (False, True))
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


def test_a_share_a_limit_and_a_dev_split_take_the_first_images_of_each_class(tmp_path):
    folder = write_folder(tmp_path, cifar_files.files())
    whole = cifar100_vgg.load(settings(data_dir=folder, classes=4))
    assert (whole.classes, len(whole.train.labels), len(whole.test.labels)) == (4, 160, 40)
    assert torch.bincount(whole.share(0.07).train.labels).tolist() == [3] * 4
    # 0.254 · 500 is 127, but more in float32; 0.07 · 100 is more than 7 in float64 too.
    for per_class, share, kept in ((500, 0.254, 127), (100, 0.07, 7)):
        assert len(random_data(per_class=per_class).share(share).train.labels) == 3 * kept
    dev = cifar100_vgg.load(settings(data_dir=folder, split="dev"))
    assert (len(dev.train.labels), len(dev.test.labels)) == (360, 40)
    few = cifar100_vgg.load(settings(data_dir=folder, limit_per_class=2))
    assert torch.bincount(few.train.labels).tolist() == [2] * 10
    assert len({data.digest for data in (whole, dev, few)}) == 3


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
    def records():
        lines = common.read_records(tmp_path / "records.jsonl")
        return [(line["settings"]["seed"], line["accuracy"]) for line in lines]

    assert run_two_epochs(tmp_path, 7.0)[0] == 2
    assert run_two_epochs(tmp_path, 8.0, seed=1)[0] == 2
    done, model, record = run_two_epochs(tmp_path, 9.0, num_heads=2)  # which a student has not
    assert (done, model.weight.item(), record["accuracy"]) == (0, 7.0, 7.0)
    assert records() == [(0, 7.0), (1, 8.0)]
    assert {"graph_kd", "torch", "python", "hardware", "commit"} == set(record["versions"])
    for network in (tmp_path / "networks").glob("student-0-*"):
        network.unlink()
    run_two_epochs(tmp_path, 9.0)  # again, in place of the first
    assert records() == [(0, 9.0), (1, 8.0)]


def test_a_run_that_diverges_leaves_no_record(tmp_path):
    with pytest.raises(common.DivergedError, match=r"must stay finite; got .*`--learning-rate`"):
        run_two_epochs(tmp_path, float("nan"))
    assert not (tmp_path / "records.jsonl").exists()


def test_a_folder_that_can_not_be_made_is_refused_before_the_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`--out` must be a folder to write to; got .*file"):
        Run(settings(out=tmp_path / "file"), random_data(), "student")


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
    "dumps", [cifar_files.python2_pickle, *(partial(pickle.dumps, protocol=n) for n in (2, 4))]
)
def test_every_way_to_write_and_to_name_the_data_reads_the_same(tmp_path, monkeypatch, dumps):
    archive = write_archive(tmp_path / ARCHIVE, cifar_files.files(dumps))
    folder = tmp_path / "unpacked"
    monkeypatch.setattr(common.pooch, "retrieve", lambda *_, **__: str(archive))
    for path in (folder, folder / PYTHON, archive, tmp_path, None):
        for part, split in zip(common.read_cifar100(path), ("train", "test"), strict=True):
            pixels, labels = digits(split)
            assert part.labels.tolist() == labels
            assert np.array_equal(part.images.numpy().reshape(len(pixels), -1), pixels)


def write_tiny(root, flat=True):
    """Write two classes, not in sorted order, with a grey image and a 10 beside a 9."""
    wanted, notes = {"train": [], "val": []}, []
    for label, wnid in enumerate(("n02", "n01")):
        for split, count in (("train", 11), ("val", 2)):
            below = "images" if flat and split == "val" else f"{wnid}/images"
            (root / split / below).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = np.full((64, 64, 3), 20 * i + 5 * label + (split == "val"), np.uint8)
                image = Image.fromarray(pixels).convert("L" if i == 1 else "RGB")
                image.save(root / split / below / f"{wnid}_{i}.JPEG", quality=100)
                notes += [f"{wnid}_{i}.JPEG\t{wnid}\t0\t0\t9\t9\n"] if split == "val" else []
                wanted[split].append((label, pytest.approx(int(pixels[0, 0, 0]), abs=2)))
    (root / "wnids.txt").write_text("n02\nn01\n")
    if flat:
        (root / "val/val_annotations.txt").write_text("".join(reversed(notes)))
    return wanted


@pytest.mark.parametrize("flat", [True, False])
def test_tiny_imagenet_is_read_class_by_class_and_decoded_once(tmp_path, monkeypatch, flat):
    wanted = write_tiny(tmp_path / TINY, flat=flat)
    for path in (tmp_path, tmp_path / TINY):
        for part, split in zip(common.read_tinyimagenet(path), wanted, strict=True):
            levels = part.images[:, 0, 0, 0].tolist()
            assert [*zip(part.labels.tolist(), levels, strict=True)] == wanted[split]
        monkeypatch.setattr(common, "decoded", None)  # the second time nothing is decoded
    (kept,) = common.CACHE.iterdir()
    foreign = io.BytesIO()
    torch.save({}, foreign)
    for damaged in (kept.read_bytes()[:-50], foreign.getvalue()):
        kept.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"must be a file of these scripts; .*Delete it to de"):
            common.read_tinyimagenet(tmp_path)


def pickled(**entries):
    return lambda _whole: pickle.dumps(entries, protocol=2)


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        (TRAIN, lambda whole: whole[:-100], "Error: pickle data was truncated"),
        (TRAIN, pickled(data=PIXELS, fine_labels=[-1] * 400), "labels that are no whole numbers"),
        (TRAIN, pickled(data=PIXELS[:, 1:], fine_labels=LABELS), r"\(400, 3071\) for 400 labels"),
        (TRAIN, pickled(data=PIXELS), "KeyError: 'fine_labels'"),
        (TRAIN, lambda _: b"cos\nsystem\n(S'touch harm'\ntR.", r"it names os\.system, which no"),
        (TRAIN, None, f"FileNotFoundError: .*{ARCHIVE}'"),
        (ARCHIVE, lambda whole: whole[:5000], "EOFError: Compressed file ended"),
        (f"{TINY}/train/n01/images/n01_3.JPEG", lambda whole: whole[:300], r"OSError: .*n01_3\.J"),
        (f"{TINY}/val/images/n01_0.JPEG", None, r"val has no n01_0\.JPEG"),
        (f"{TINY}/wnids.txt", lambda whole: whole + b"n03", r"train has not the classes of wnids"),
    ],
)
def test_damaged_data_are_refused_with_the_reason(tmp_path, file, damage, reason):
    write_archive(tmp_path / ARCHIVE, cifar_files.files())
    write_tiny(tmp_path / TINY)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink()
    if damage is not None:
        (tmp_path / file).write_bytes(damage(whole))
    script = tinyimagenet_vgg if file.startswith(TINY) else cifar100_vgg
    path = tmp_path / file.split("/")[0]
    wanted = rf"`--data-dir` must be or contain .*; got {path}.*{reason}.*Get it again"
    with pytest.raises(ValueError, match=wanted):
        script.load(settings(data_dir=path))
    assert not list(common.CACHE.glob("*"))
    assert not (tmp_path / "harm").exists()


def test_a_download_that_fails_gives_its_reason(monkeypatch):
    monkeypatch.setattr(common, "CIFAR100_URL", "file:///none")
    with pytest.raises(ValueError, match=r"`--data-dir` must be .*; got a download .*none"):
        cifar100_vgg.load(settings())


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (settings, {"epochs": 0}, "`--epochs` must be > 0 and finite; got 0"),
        (settings, {"teacher_epochs": -1}, "`--teacher-epochs` must be ≥ 0; got -1"),
        (settings, {"first_epochs": -1}, "`--first-epochs` must be ≥ 0; got -1"),
        (settings, {"batch_size": 1}, "`--batch-size` must be ≥ 2; got 1"),
        (settings, {"learning_rate": 0.0}, "`--learning-rate` must be > 0 and finite; got 0"),
        (settings, {"bound": float("inf")}, "`--bound` must be > 0 and finite; got inf"),
        (settings, {"width": 5.0}, "`--width` must be > 0 and ≤ 4; got 5"),
        (settings, {"student_share": 1.5}, "`--student-share` must be > 0 and ≤ 1; got 1.5"),
        (settings, {"soft_share": float("nan")}, "`--soft-share` must be ≥ 0 and ≤ 1; got nan"),
        (settings, {"num_heads": 0}, "`--num-heads` must be > 0 and finite; got 0"),
        (settings, {"seed": -1}, r"`--seed` must be ≥ 0 and < 2\*\*63; got -1"),
        (tables, {"teacher_seed": -1}, r"`--teacher-seed` must be ≥ 0 and < 2\*\*63; got -1"),
        (tables, {"rows": ("VGG16",)}, r"`--rows` must be some of \['VGG', 'WRN'\]; got 'VGG16'"),
        (first_batch, {"batch_size": 61}, r"`--batch-size` must be ≤ 60, .*; got 61\. Take"),
        (random_data, {"classes": 4}, "`--classes` must be ≤ 3; got 4"),
        (random_data, {"split": "dev", "per_class": 9}, "`--split dev` must have ten .* got fewer"),
        (quickstart.Config, {"labels": 78}, "`--labels` must be ≥ 1 and ≤ 77; got 78"),
        (quickstart.Config, {"seeds": 0}, "`--seeds` must be > 0 and finite; got 0"),
    ],
)
def test_what_is_out_of_range_is_refused(make, change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


@pytest.mark.parametrize(
    ("method", "suited"),
    [
        ("mhgd", (1.0, 0.3)),
        ("kd-svd", (1.0, 0.3)),
        ("soft-logits", (1.0, 0.3)),
        ("mhgd-soft-logits", (1.0, 0.3)),
        ("mhgd-own-heads", (3.0, 0.8)),
        ("mhgd-own-heads-soft-logits", (10.0, 0.8)),
    ],
)
def test_bound_and_weight_of_soft_logits_suit_the_method_unless_a_flag_sets_them(method, suited):
    of_method, *found = common.suited(method, settings())
    assert (of_method.bound, of_method.soft_share) == tuple(found) == suited
    set_by_flags = settings(bound=5.0, soft_share=0.0)
    assert common.suited(method, set_by_flags) == (set_by_flags, 5.0, 0.0)
