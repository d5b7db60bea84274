"""What the four training scripts share: settings, data on the device, accuracy, records, plot.

The method is not here: its training loops stand in the scripts.

Axis letters: ``n`` image of a set, ``b`` sample, ``c`` channel, ``h w`` space.
"""

from __future__ import annotations

import _codecs
import io
import json
import math
import os
import pickle
import platform
import re
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pooch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from einops import rearrange
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR
from tqdm import tqdm  # type: ignore[import-untyped] # it ships no types

import graph_kd

# Set by torchrun. The first process prints and writes files.
RANK, NUM_PROCESSES = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

S = TypeVar("S")
M = TypeVar("M", bound=nn.Module)

CIFAR100 = "cifar-100-python"
CIFAR100_URL = f"https://www.cs.toronto.edu/~kriz/{CIFAR100}.tar.gz"
CIFAR100_MD5 = "md5:eb9058c3a382ffc7106e4002c42a8d85"  # stated on the page of the data set
TINY = "tiny-imagenet-200"
TINY_URL = f"http://cs231n.stanford.edu/{TINY}.zip"
TINY_MD5 = "md5:90528d7ca1a48142e341f4ef8d21d0de"  # of other libraries' loaders: none is stated
CACHE = Path(pooch.os_cache("graph-kd"))  # folder of downloads and decoded images

RULES: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {  # other flags are positive
    "≥ 0": (lambda value: value >= 0, ("teacher_epochs", "first_epochs", "plain_up_to")),
    "≥ 2": (lambda value: value >= 2, ("batch_size", "classes")),
    "> 0 and ≤ 1": (lambda value: 0 < value <= 1, ("student_width", "student_share")),
    "> 0 and ≤ 4": (lambda value: 0 < value <= 4, ("width",)),
    "≥ 0 and ≤ 1": (lambda value: 0 <= value <= 1, ("soft_share",)),
    "≥ 1 and ≤ 77": (lambda value: 1 <= value <= 77, ("labels",)),
    "≥ 0 and < 2**63": (lambda value: 0 <= value < 2**63, ("seed", "teacher_seed", "first_seed")),
}
RULE_OF = {name: (rule, holds) for rule, (holds, names) in RULES.items() for name in names}


def check(settings: Any) -> None:
    """Refuse numbers that are out of range, by the name of their flag."""
    for name, value in vars(settings).items():
        rule, holds = RULE_OF.get(name, ("> 0 and finite", lambda number: 0 < number < math.inf))
        if type(value) in (int, float) and not holds(value):
            raise ValueError(f"`--{name.replace('_', '-')}` must be {rule}; got {value}.")


@dataclass(frozen=True)
class Settings:
    """Data, machine and seed; a script adds what the method needs. Each field is a flag."""

    out: Path = Path("runs/one")  # folder of the run; the same command continues it
    data_dir: Path | None = None  # folder or archive of the data set; else it is downloaded
    data_name: str | None = None  # name of the data in records
    classes: int | None = None  # only the first N classes
    limit_per_class: int | None = None  # only the first N training images of each class
    split: Literal["test", "dev"] = "test"  # dev: measure on a tenth of the training images
    batch_size: int = 128  # images a step, of all processes
    seed: int = 0  # of weights, order of images and augmentation
    amp: Literal["none", "bfloat16"] = "none"  # precision of the networks
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to run
    threads: int | None = None  # CPU threads of torch

    def __post_init__(self) -> None:
        if vars(self).get("teacher_epochs", 0) is None:
            object.__setattr__(self, "teacher_epochs", vars(self)["epochs"])
        check(self)
        shared = [
            m for m in vars(self).get("method", ()) if m.startswith("mhgd") and "own" not in m
        ]
        if shared and vars(self)["student_width"] != 1:
            raise ValueError(
                f"`--student-width` must be 1 for the method {shared[0]}, which shares the "
                "teacher's attention heads. Take the methods student and mhgd-own-heads."
            )
        gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if self.device == "cuda" and gpus < local:
            raise ValueError(
                f"`--device cuda` must have a GPU for each of {local} processes; got {gpus}. Start "
                "fewer processes, or take `--device cpu`."
            )
        if self.batch_size % NUM_PROCESSES:
            raise ValueError(
                f"`--batch-size` must be a multiple of {NUM_PROCESSES}, the number of processes; "
                f"got {self.batch_size}."
            )

    def autocast(self) -> torch.autocast:
        """Return the context of a network's forward pass."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.amp == "bfloat16")


def command(main: Callable[[S], object], settings: type[S], description: str | None) -> None:
    """Parse the flags and run; an error that the user can repair ends in one line.

    Under torchrun the processes form one group: over NCCL if there are GPUs, else over gloo.
    """
    try:
        if NUM_PROCESSES > 1:
            gpus, rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
            if rank < gpus:
                torch.cuda.set_device(rank)
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
        parsed = tyro.cli(settings, description=description)
        if (threads := getattr(parsed, "threads", None)) is not None:
            torch.set_num_threads(threads)
        main(parsed)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}")
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def process_group() -> dist.ProcessGroup | None:
    """Return the group of all processes; None if there is only this one."""
    return dist.group.WORLD if NUM_PROCESSES > 1 else None


def own_share(rows: Tensor) -> Tensor:
    """Return the rows of this process, in rank order."""
    return rows.tensor_split(NUM_PROCESSES)[RANK]


def sum_over_processes(value: Tensor) -> Tensor:
    """Return the sum of all processes' tensors."""
    if NUM_PROCESSES > 1:
        dist.all_reduce(value)
    return value


def wait() -> None:
    """Wait until all processes are here."""
    sum_over_processes(torch.zeros(1))


@contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process run a block before the others: what it writes, they read."""
    if RANK > 0:
        wait()
    yield
    if RANK == 0:
        wait()


def place(network: M, settings: Settings) -> M:
    """Return the network on its device; on several GPUs batch norm sees the whole batch."""
    if NUM_PROCESSES > 1 and settings.device == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network.to(settings.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return] # torch's own overloads leave it out


def step_decay(optimizer: Optimizer, epochs: int) -> MultiStepLR:
    """Return the schedule of the authors' program: times 0.1 at 30, 60 and 80 % of the epochs."""
    return MultiStepLR(optimizer, [max(1, round(epochs * part)) for part in (0.3, 0.6, 0.8)])


def suited(method: str, settings: S) -> tuple[S, float, float]:
    """Return settings, bound and weight of soft logits, which suit the method if no flag sets them.

    Those of own heads were chosen on a validation split; the others are the authors'.
    """
    given, own, soft = vars(settings), "own-heads" in method, "soft-logits" in method
    bound = given["bound"] or (10.0 if own and soft else 3.0 if own else 1.0)
    share = (0.8 if own else 0.3) if given["soft_share"] is None else given["soft_share"]
    return replace(settings, bound=bound, soft_share=share), bound, share  # type: ignore[type-var] # a dataclass


def soft_logits(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Return mean_b KL(softmax(t / T) ‖ softmax(s / T)) of logits ``b c`` (Hinton et al. 2015).

    Without the factor T², as in the authors' program.
    """
    answer = (student / temperature).log_softmax(dim=1)
    target = (teacher.detach() / temperature).log_softmax(dim=1)
    return F.kl_div(answer, target, reduction="batchmean", log_target=True)


class DivergedError(RuntimeError):
    """A loss is no longer finite."""


def finite(loss: Tensor) -> Tensor:
    """Return the loss; refuse one that has diverged."""
    if not bool(loss.isfinite().all()):
        raise DivergedError(f"The loss must stay finite; got {loss}. Lower `--learning-rate`.")
    return loss


# Data


@dataclass(frozen=True)
class ImageSet:
    """Images ``n c h w`` and their classes, int64 ``n``."""

    images: Tensor
    labels: Tensor

    def places(self) -> Tensor:
        """Return each image's place among those of its class, in stored order."""
        places = torch.empty_like(self.labels)
        for label in range(int(self.labels.max()) + 1):
            of_class = self.labels == label
            places[of_class] = torch.arange(int(of_class.sum()), device=places.device)
        return places

    def keep(self, chosen: Tensor) -> ImageSet:
        """Return the chosen images."""
        return ImageSet(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Data:
    """Images to learn from and images to measure on, on the device."""

    train: ImageSet
    test: ImageSet
    classes: int
    batch_size: int  # images a step, of all processes
    digest: int  # checksum of both sets, for records
    mean: Tensor  # of each channel over the training pixels, ``1 c 1 1``
    std: Tensor

    def share(self, share: float) -> Data:
        """Return the first ``share`` of the training images of each class, rounded up."""
        # In float64; even there 0.07 · 100 exceeds 7.
        wanted = share * torch.bincount(self.train.labels).double() - 1e-6
        return replace(self, train=self.train.keep(self.train.places() < wanted[self.train.labels]))

    def batches(self, order: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch of augmented batches, shuffled, without the last incomplete one.

        Every process draws the same batch and yields its own part of it.
        """
        count, size = len(self.train.labels), self.batch_size
        if count < size:
            raise ValueError(
                f"`--batch-size` must be ≤ {count}, the number of training images; got {size}. "
                "Take a smaller batch, or more images."
            )
        chosen = torch.randperm(count, generator=order)[: count - count % size]
        for rows in torch.split(chosen.to(self.train.labels.device), size):
            images = random_crop_flip(self.train.images[rows], order)
            yield self.normalize(own_share(images)), own_share(self.train.labels[rows])

    def normalize(self, images: Tensor) -> Tensor:
        """Return standardised images, channels last in memory."""
        standard = (images.float() - self.mean) / self.std
        return standard.contiguous(memory_format=torch.channels_last)


def load(settings: Settings, read: Callable[[Path | None], tuple[ImageSet, ImageSet]]) -> Data:
    """Return the data that the settings name, on the device.

    ``split="dev"`` measures on every tenth training image of a class and learns from the others.
    """
    try:
        with first_process_first():
            train, test = read(settings.data_dir)
    except Exception as error:  # damaged archives, pickles and images raise nearly anything
        raise ValueError(
            "`--data-dir` must be or contain the whole data set; got "
            f"{settings.data_dir or 'a download'} ({type(error).__name__}: {error}). Get it again, "
            "and pass its path."
        ) from error
    found = int(train.labels.max()) + 1
    classes = settings.classes or found
    if classes > found:
        raise ValueError(f"`--classes` must be ≤ {found}; got {classes}.")
    train, test = (part.keep(part.labels < classes) for part in (train, test))
    if settings.split == "dev":
        held = train.places() % 10 == 9
        train, test = train.keep(~held), train.keep(held)
        if not len(test.labels):
            raise ValueError("`--split dev` must have ten training images of a class; got fewer.")
    if settings.limit_per_class is not None:
        train = train.keep(train.places() < settings.limit_per_class)
    digest = 0
    for tensor in (train.images, train.labels, test.images, test.labels):
        digest = zlib.crc32(tensor.contiguous().numpy().tobytes(), digest)
    train, test = (
        ImageSet(part.images.to(settings.device), part.labels.to(settings.device))
        for part in (train, test)
    )
    some = train.images[:: 1 + len(train.images) // 10_000].float()  # all may not fit in memory
    std, mean = torch.std_mean(some, dim=(0, 2, 3), correction=0, keepdim=True)
    std = std.clamp_min(1)  # a constant channel becomes zero
    return Data(train, test, classes, settings.batch_size, digest, mean, std)


def random_crop_flip(images: Tensor, order: torch.Generator, padding: int = 4) -> Tensor:
    """Pad images ``b c h w`` by reflection, crop them at random to their size, and flip half."""
    b, _, h, w = images.shape
    corner = torch.randint(2 * padding + 1, (2, b), generator=order)
    mirror = torch.randint(2, (1, b), generator=order)
    top, left, flip = torch.cat([corner, mirror]).to(images.device, non_blocking=True)
    padded = F.pad(images.float(), [padding] * 4, mode="reflect")
    windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # b c top left h w
    crops = windows[torch.arange(b, device=images.device), :, top, left]
    return torch.where(rearrange(flip.bool(), "b -> b 1 1 1"), crops.flip(3), crops)


def download(url: str, md5: str, **options: Any) -> Any:
    """Return what pooch has of a file, checked; it is downloaded once."""
    return pooch.retrieve(url, md5, Path(url).name, CACHE, progressbar=True, **options)


class CifarUnpickler(pickle.Unpickler):
    """Unpickle arrays and plain types; refuse everything else, so that no foreign code runs."""

    known = {  # noqa: RUF012 # read only
        ("_codecs", "encode"): _codecs.encode,  # bytes as Python 3 wrote them in protocol 2
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return a known name."""
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR file needs")
        return self.known[module, name]


def read_cifar100(path: Path | None) -> tuple[ImageSet, ImageSet]:
    """Return training and test images of CIFAR-100, or of another set in its Python layout.

    ``path`` is or contains the folder ``cifar-100-python`` or its ``.tar.gz``, which is read in
    place; None downloads it once.
    """
    path = Path(download(CIFAR100_URL, CIFAR100_MD5)) if path is None else path
    for folder in (path, path / CIFAR100):
        if (folder / "train").is_file():
            train, test = ((folder / split).read_bytes() for split in ("train", "test"))
            return cifar_split(train), cifar_split(test)
    with tarfile.open(path / f"{CIFAR100}.tar.gz" if path.is_dir() else path) as archive:
        files = (archive.extractfile(f"{CIFAR100}/{split}") for split in ("train", "test"))
        train, test = (file.read() for file in files if file is not None)
    return cifar_split(train), cifar_split(test)


def cifar_split(content: bytes) -> ImageSet:
    """Return the images of a pickled split."""
    stored = CifarUnpickler(io.BytesIO(content), encoding="bytes").load()
    named = {k.decode() if isinstance(k, bytes) else k: value for k, value in stored.items()}
    pixels, labels = named["data"], torch.tensor(named["fine_labels"])
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3 * 32 * 32) or not len(labels):
        raise ValueError(f"pixels {pixels.dtype} {pixels.shape} for {len(labels)} labels")
    if labels.dtype != torch.int64 or not int(labels.min()) >= 0:
        raise ValueError("labels that are no whole numbers from 0")
    images = rearrange(pixels, "n (c h w) -> n c h w", c=3, h=32)
    return ImageSet(torch.from_numpy(np.ascontiguousarray(images)), labels)


def read_tinyimagenet(path: Path | None) -> tuple[ImageSet, ImageSet]:
    """Return training and validation images of Tiny ImageNet, or of another set in its layout.

    Classes are numbered as in ``wnids.txt``. The images are decoded once; later calls read them
    from the cache. ``path`` is or contains ``tiny-imagenet-200``; None downloads it once.
    """
    if path is None:
        path = Path(os.path.commonpath(download(TINY_URL, TINY_MD5, processor=pooch.Unzip())))
    root = path / TINY if (path / TINY).is_dir() else path
    label_of = {wnid: n for n, wnid in enumerate((root / "wnids.txt").read_text().split())}
    splits = [tiny_labels(root / split, label_of) for split in ("train", "val")]
    listing = "".join(f"{file} {file.stat().st_size}\n" for split in splits for file in split)
    kept = CACHE / f"{TINY}-{zlib.crc32(listing.encode()):08x}.pt"
    if not kept.exists():
        images = [torch.stack([decoded(file) for file in tqdm(split)]) for split in splits]
        save_atomically(kept, {"images": images})
    images = read_tensors(kept, "images", "to decode the images again")["images"]
    labels = [torch.tensor(list(split.values())) for split in splits]
    train, val = map(ImageSet, images, labels)
    return train, val


def tiny_labels(folder: Path, label_of: Mapping[str, int]) -> dict[Path, int]:
    """Return the label of each image of a split, class by class.

    Images stand in a folder for each class, or ``val_annotations.txt`` names their classes.
    """
    notes = folder / "val_annotations.txt"
    lines = notes.read_text().splitlines() if notes.is_file() else []
    wnid_of = dict(line.split("\t")[:2] for line in lines)
    labels = {
        file: label_of.get(wnid_of.get(file.name, file.relative_to(folder).parts[0]), -1)
        for file in folder.rglob("[!.]*.JPEG")
    }
    missing = wnid_of.keys() - {file.name for file in labels}
    if missing or set(labels.values()) != set(label_of.values()):
        wrong = f"no {min(missing)}" if missing else "not the classes of wnids.txt"
        raise ValueError(f"{folder} has {wrong}")
    # Shorter names first: 9.JPEG before 10.JPEG.
    return dict(sorted(labels.items(), key=lambda x: (x[1], len(x[0].name), x[0].name)))


def decoded(file: Path) -> Tensor:
    """Return a JPEG as RGB pixels, uint8 ``c h w``."""
    try:
        with Image.open(file, formats=["JPEG"]) as image:
            pixels = np.array(image.convert("RGB"))
    except OSError as error:
        raise OSError(f"{file}: {error}") from error
    if pixels.shape != (64, 64, 3):
        raise ValueError(f"{file} has shape {pixels.shape}")
    return torch.from_numpy(rearrange(pixels, "h w c -> c h w").copy())


@torch.no_grad()
def accuracy(network: nn.Module, data: Data, settings: Settings) -> float:
    """Return the top-1 accuracy on the test images in evaluation mode, per cent."""
    network.eval()
    images, labels = own_share(data.test.images), own_share(data.test.labels)
    right = torch.zeros((), device=labels.device)
    for some, wanted in zip(torch.split(images, 256), torch.split(labels, 256), strict=True):
        with settings.autocast():
            right += (network(data.normalize(some)).argmax(dim=1) == wanted).sum()
    return round(100 * float(sum_over_processes(right)) / len(data.test.labels), 2)


# Records


def dependencies(method: str) -> list[str]:
    """Return the settings, beside those of `Settings`, that a network of the scripts depends on.

    A change of any other setting does not train it again.
    """
    if method == "teacher":
        return ["teacher_epochs"]
    if method == "heads":
        return ["teacher_epochs", "first_epochs", "student_share", "num_heads"]
    names = ["epochs", "student_share", "student_width"]
    if method != "student":
        names += ["teacher_epochs", "first_epochs", "num_heads", "gate", "bound"]
    return [*names, "soft_share"] if "soft-logits" in method else names


class Run:
    """The training of one network: a checkpoint after each epoch, a record at the end.

    The checkpoint is a file of its own in ``OUT/networks``, named after a digest of all settings
    that the network depends on: other settings are another file. A finished network is loaded, not
    trained again. Its record goes to ``OUT/records.jsonl``. ``uses`` names the settings that it
    depends on, by default those of `dependencies`; ``**networks`` are as ``teacher="VGG16"``.
    """

    def __init__(
        self, settings: Settings, data: Data, method: str, uses: Sequence[str] = (), **networks: str
    ) -> None:
        always = ("seed", "batch_size", "learning_rate", "width", "amp", "split")
        names = (*always, *(uses or dependencies(method)))
        cell: dict[str, Any] = {name: getattr(settings, name) for name in names}
        cell |= {"method": method, "classes": data.classes, "images": data.digest, **networks}
        cell["data"] = settings.data_name
        if (teacher_seed := vars(settings).get("teacher_seed")) is not None:
            cell["teacher_seed"] = teacher_seed
        key = zlib.crc32(json.dumps(cell, sort_keys=True).encode())
        self.seed, self.order = settings.seed, torch.Generator()  # of images and augmentation
        self.file = settings.out / "networks" / f"{method}-{settings.seed}-{key:08x}.pt"
        self.records = settings.out / "records.jsonl"
        # An error comes before the training.
        read_records(self.records)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"`--out` must be a folder to write to; got {error}.") from error
        self.saved: dict[str, Any] = {"phase": None}
        if self.file.exists():
            self.saved = read_tensors(self.file, "record", "to train it again")
        new = {"settings": cell, "versions": versions(settings.device), "phases": {}, "seconds": {}}
        self.record: dict[str, Any] = self.saved.get("record", new)

    def epochs(self, phase: str, count: int, **parts: Any) -> Iterator[int]:
        """Yield the epochs that remain of ``count``, and write a checkpoint after each.

        ``**parts`` are what the phase changes: "model", "optimizer" and so on.
        """
        self.phase, self.optimizer = phase, parts["optimizer"]
        epochs = self.record["phases"].setdefault(phase, [])
        self.order.manual_seed(self.seed)
        if self.saved["phase"] == phase:
            for name, state in self.saved["parts"].items():
                parts[name].load_state_dict(state)
            self.order.set_state(self.saved["order"])
            if "random" in self.saved:  # not in checkpoints of version 0.2
                torch.set_rng_state(self.saved["random"])
        left = range(len(epochs), count)
        name = f"{self.record['settings']['method']}, {phase}"
        hidden = RANK > 0 or not left
        bar = tqdm(left, name, count, initial=len(epochs), unit="epoch", disable=hidden)
        for epoch in bar:
            started = time.perf_counter()
            yield epoch
            seconds = self.record["seconds"].get(phase, 0.0) + time.perf_counter() - started
            self.record["seconds"][phase] = round(seconds, 3)
            states = {name: part.state_dict() for name, part in parts.items()}
            state = {"phase": phase, "parts": states, "record": self.record}
            state |= {"order": self.order.get_state(), "random": torch.get_rng_state()}
            if RANK == 0:
                save_atomically(self.file, state)
            bar.set_postfix(epochs[-1])

    def log(self, losses: Iterable[Sequence[Tensor]], **measured: float) -> None:
        """Add an epoch to the record: means of the losses of each step, and what was measured."""
        rows = torch.stack([torch.stack(list(row)).detach().float() for row in losses])
        means = finite(sum_over_processes(rows.mean(dim=0)) / NUM_PROCESSES).tolist()
        named = zip(("loss", "transfer_loss"), means, strict=False)
        epochs = self.record["phases"][self.phase]
        epoch = {"epoch": len(epochs) + 1, **{name: round(mean, 5) for name, mean in named}}
        rate = float(self.optimizer.param_groups[0]["lr"])
        epochs.append({**epoch, "learning_rate": rate, **measured})

    def finish(self) -> dict[str, Any]:
        """Add the record to the others, and return it.

        The result is the accuracy after the last epoch; the best one is for comparison.
        """
        *_, epochs = self.record["phases"].values()
        measured = [epoch["test_accuracy"] for epoch in epochs if "test_accuracy" in epoch]
        if measured:
            self.record |= {"accuracy": measured[-1], "best_accuracy": max(measured)}
        if RANK == 0:
            # It takes the place of an earlier one.
            runs = [*read_records(self.records), self.record]
            write_records(self.records, {str(run["settings"]): run for run in runs}.values())
        wait()  # else another process could read an earlier checkpoint
        return self.record


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is whole or not there, however the program ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def save_atomically(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain types."""
    torch.save(content, buffer := io.BytesIO())
    write_atomically(path, buffer.getvalue())


def read_tensors(path: Path, needed: str, purpose: str) -> dict[str, Any]:
    """Return what `save_atomically` wrote, on the CPU; it has a needed key."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        content[needed]  # a file of another program may lack it
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(
            f"`{path}` must be a file of these scripts; got {type(error).__name__}. "
            f"Delete it {purpose}."
        ) from error
    return content


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON line a record."""
    write_atomically(path, "".join(json.dumps(r) + "\n" for r in records).encode())


def read_records(
    path: Path, needed: Sequence[str] = ("settings", "phases")
) -> list[dict[str, Any]]:
    """Return the records of a file, by default of trained networks; none if there is no file."""
    if not path.exists():
        return []
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        [record[name] for record in records for name in needed]  # raises if missing
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"`{path}` must hold a JSON record a line, each with {' and '.join(needed) or 'keys'}; "
            f"got {type(error).__name__}: {error}. Move it away."
        ) from error
    return records


def versions(device: str) -> dict[str, str]:
    """Return what a number was measured with: versions, hardware, commit."""
    if torch.device(device).type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        text = cpuinfo.read_text() if cpuinfo.exists() else ""
        named = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
        hardware = named[1] if named else platform.machine()
        hardware += f", {torch.get_num_threads()} threads"
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*"]
    try:
        command = [*git, "--abbrev=12", "--dirty=+"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "none"
    return {
        "graph_kd": graph_kd.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "hardware": hardware if NUM_PROCESSES == 1 else f"{NUM_PROCESSES} × {hardware}",
        "commit": commit,
    }


def report(out: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Print the accuracy of each network after its last epoch, and draw all epochs."""
    if RANK > 0:
        return
    figure = Figure(figsize=(6.5, 4.0), layout="constrained")
    axes = figure.subplots()
    for record in records:
        if "accuracy" not in record:  # a teacher that stays untrained
            continue
        *_, epochs = record["phases"].values()
        line = f"{record['settings']['method']:20} {record['accuracy']:6.2f} %"
        print(line)
        curve = [epoch["test_accuracy"] for epoch in epochs]
        axes.plot(range(1, len(curve) + 1), curve, label=line)
    axes.set(xlabel="epoch", ylabel="accuracy, %", title="Accuracy (last epoch named)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    save_figure(figure, out / "curves.png")
    print(f"Records, curves and networks: {out}")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture."""
    figure.savefig(picture := io.BytesIO(), format="png", dpi=110)
    write_atomically(path, picture.getvalue())
