"""What the four training scripts share: data on the device, augmentation, accuracy, record, plot.

The method is not here: its loops stand in the scripts.

Axis letters: ``n`` image of a set, ``b`` sample, ``c`` channel, ``h w`` space.
"""

from __future__ import annotations

import _codecs
import hashlib
import io
import json
import math
import os
import pickle
import platform
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pooch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from einops import rearrange, repeat
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR
from tqdm import tqdm  # type: ignore[import-untyped] # it ships no types

import graph_kd

S = TypeVar("S")
M = TypeVar("M", bound=nn.Module)

CIFAR100 = "cifar-100-python"
CIFAR100_URL = f"https://www.cs.toronto.edu/~kriz/{CIFAR100}.tar.gz"
CIFAR100_MD5 = "md5:eb9058c3a382ffc7106e4002c42a8d85"  # stated on the page of the data set
TINY = "tiny-imagenet-200"
TINY_URL = f"http://cs231n.stanford.edu/{TINY}.zip"
TINY_MD5 = "md5:90528d7ca1a48142e341f4ef8d21d0de"  # of other libraries' loaders: none is stated

AT_LEAST = {"epochs": 1, "teacher_epochs": 0, "first_epochs": 0, "batch_size": 2, "classes": 2}
AT_LEAST |= {"limit_per_class": 1, "num_heads": 1, "threads": 1, "seed": 0, "soft_share": 0}
ABOVE_ZERO = ("bound", "learning_rate", "width", "student_width", "student_share")
AT_MOST = {"width": 4, "student_width": 1, "student_share": 1, "soft_share": 1, "seed": 2**63 - 1}


@dataclass(frozen=True)
class Settings:
    """Data, machine and seed; a script adds what the method needs. Each field is a flag."""

    out: Path = Path("runs/one")  # folder of the run; the same command goes on with it
    data_dir: Path | None = None  # folder or archive of the data set; else it is downloaded
    data_name: str | None = None  # what to call it, if it is another one in the same layout
    classes: int | None = None  # only the first N classes
    limit_per_class: int | None = None  # only the first N training images of each class
    split: Literal["test", "dev"] = "test"  # measure on test images, or on a tenth of the training
    batch_size: int = 128  # images a step, of all processes
    seed: int = 0  # of weights, order and augmentation
    amp: Literal["none", "bfloat16"] = "none"  # precision of the networks
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to run
    threads: int | None = None  # CPU threads of torch

    def __post_init__(self) -> None:
        if getattr(self, "teacher_epochs", 1) is None:  # as many as a student's
            object.__setattr__(self, "teacher_epochs", getattr(self, "epochs", None))
        for name, value in vars(self).items():
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, int | float):
                if name in AT_LEAST and not value >= AT_LEAST[name]:
                    raise ValueError(f"`{flag}` must be ≥ {AT_LEAST[name]}; got {value}.")
                if name in ABOVE_ZERO and not 0 < value < math.inf:
                    raise ValueError(f"`{flag}` must be > 0 and finite; got {value}.")
                if name in AT_MOST and value > AT_MOST[name]:
                    raise ValueError(f"`{flag}` must be ≤ {AT_MOST[name]}; got {value}.")
        try:
            torch.empty(0, device=self.device).cpu()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(
                f"`--device` must be a device of this machine, as cpu; got {self.device}."
            ) from error
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if self.device == "cuda" and torch.cuda.device_count() < here:
            raise ValueError(
                f"`--device` must be cpu, or cuda with a GPU for each of {here} processes; "
                f"got cuda and {torch.cuda.device_count()} GPUs."
            )
        if self.batch_size % num_processes():
            raise ValueError(
                f"`--batch-size` must be a multiple of {num_processes()}, the number of processes; "
                f"got {self.batch_size}."
            )

    def autocast(self) -> torch.autocast:
        """Return the context of a network's forward pass."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.amp == "bfloat16")


def command(main: Callable[[S], object], settings: type[S], description: str | None) -> None:
    """Parse the flags and run; what a user can repair ends in one line.

    Under torchrun the processes form one group: over NCCL with a GPU each, else over gloo.
    """
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            gpus, rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
            if rank < gpus:
                torch.cuda.set_device(rank)
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
        parsed = tyro.cli(settings, description=description)
        if (threads := getattr(parsed, "threads", None)) is not None:
            torch.set_num_threads(threads)
        main(parsed)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    finally:
        if process_group() is not None:
            dist.destroy_process_group()


def process_group() -> dist.ProcessGroup | None:
    """Return the group of all processes; None if there is only this one."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def num_processes() -> int:
    """Return how many processes train together."""
    return 1 if process_group() is None else dist.get_world_size()


def is_main() -> bool:
    """Return whether this process prints and writes files."""
    return process_group() is None or dist.get_rank() == 0


def own_share(rows: Tensor) -> Tensor:
    """Return the rows of this process, in rank order."""
    count = num_processes()
    rank = 0 if count == 1 else dist.get_rank()
    return rows[rank * len(rows) // count : (rank + 1) * len(rows) // count]


def sum_over_processes(value: Tensor) -> Tensor:
    """Return the sum of all processes' tensors."""
    if process_group() is not None:
        dist.all_reduce(value)
    return value


def place(network: M, settings: Settings) -> M:
    """Return the network on its device; among several GPUs batch norm sees the whole batch."""
    if num_processes() > 1 and torch.device(settings.device).type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    return network.to(settings.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return] # torch's own overloads leave it out


def step_decay(optimizer: Optimizer, epochs: int) -> MultiStepLR:
    """Return the authors' schedule: times 0.1 at 30, 60 and 80 % of the epochs."""
    return MultiStepLR(optimizer, [max(1, round(epochs * part)) for part in (0.3, 0.6, 0.8)])


def soft_logits(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Return mean_b KL(softmax(t / T) ‖ softmax(s / T)) of logits ``b c`` (Hinton et al. 2015).

    Without the factor T², as in the authors' program.
    """
    answer = (student / temperature).log_softmax(dim=1)
    target = (teacher.detach() / temperature).log_softmax(dim=1)
    return F.kl_div(answer, target, reduction="batchmean", log_target=True)


class DivergedError(RuntimeError):
    """A loss is not finite any more."""


def finite(loss: Tensor) -> Tensor:
    """Return the loss; refuse one that has diverged."""
    if not bool(loss.isfinite().all()):
        raise DivergedError(f"The loss must stay finite; got {loss}. Lower `--learning-rate`.")
    return loss


# Data


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of a split.

    Args:
        images: Pixels, uint8 ``n c h w``.
        labels: Classes, int64 ``n``.
    """

    images: Tensor
    labels: Tensor

    def places(self) -> Tensor:
        """Return each image's place among those of its class, in stored order."""
        order = self.labels.argsort(stable=True)
        counts = torch.bincount(self.labels)
        first = (counts.cumsum(0) - counts)[self.labels[order]]
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device) - first
        return places

    def keep(self, chosen: Tensor) -> ImageSet:
        """Return the chosen images."""
        return ImageSet(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Data:
    """Images to learn from and images to measure on, on the device.

    Args:
        train: Images to learn from.
        test: Images to measure on.
        classes: Classes. Count.
        batch_size: Images a step, of all processes.
        digest: Checksum of both sets, for records.
        mean, std: Of each channel over the training pixels, ``c 1 1``.
    """

    train: ImageSet
    test: ImageSet
    classes: int
    batch_size: int
    digest: int
    mean: Tensor
    std: Tensor

    def share(self, share: float) -> Data:
        """Return the first ``share`` of the training images of each class, rounded up."""
        counts = torch.bincount(self.train.labels, minlength=self.classes).double()
        wanted = (share * counts - 1e-6).ceil()[self.train.labels]  # 0.07 · 100 exceeds 7
        return replace(self, train=self.train.keep(self.train.places() < wanted))

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
    """Return the data that the settings name.

    ``split="dev"`` measures on every tenth training image of a class, which is then not learnt.
    """
    train, test = read(settings.data_dir)
    classes = int(train.labels.max()) + 1
    if settings.classes is not None:
        if settings.classes > classes:
            raise ValueError(f"`--classes` must be ≤ {classes}; got {settings.classes}.")
        classes = settings.classes
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
    mean, std = moments(train.images)
    train, test = (
        ImageSet(part.images.to(settings.device), part.labels.to(settings.device))
        for part in (train, test)
    )
    mean, std = mean.to(settings.device), std.to(settings.device)
    return Data(train, test, classes, settings.batch_size, digest, mean, std)


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, ``c 1 1``; exact, from a histogram."""
    channels = (rearrange(c, "n h w -> (n h w)") for c in images.unbind(dim=1))
    counts = torch.stack([torch.bincount(channel, minlength=256) for channel in channels])
    share = counts.double() / counts[0].sum()
    level = torch.arange(256, dtype=torch.float64)
    mean = (share * level).sum(dim=1, keepdim=True)
    std = (share * (level - mean).square()).sum(dim=1, keepdim=True).sqrt()
    if not bool((std > 0).all()):
        raise ValueError("The training images must vary in every channel; some are constant.")
    return rearrange(mean, "c 1 -> c 1 1").float(), rearrange(std, "c 1 -> c 1 1").float()


def random_crop_flip(images: Tensor, order: torch.Generator, padding: int = 4) -> Tensor:
    """Pad each image by reflection, crop it at random to its size, mirror it or not.

    The padded images are never built: each output pixel is looked up where it comes from.

    Shape:
        - images: ``b c h w``
        - returns: ``b c h w``, same dtype
    """
    b, c, h, w = images.shape
    corner = torch.randint(-padding, padding + 1, (2, b, 1), generator=order)
    mirror = torch.randint(2, (1, b, 1), generator=order)
    top, left, flip = torch.cat([corner, mirror]).to(images.device, non_blocking=True)
    column = torch.arange(w, device=images.device)
    rows = reflect(top + torch.arange(h, device=images.device), h)
    columns = reflect(left + torch.where(flip.bool(), column.flip(0), column), w)
    position = rearrange(rows * w, "b h -> b h 1") + rearrange(columns, "b w -> b 1 w")
    pixels = rearrange(images, "b c h w -> b c (h w)")
    drawn = pixels.gather(2, repeat(position, "b h w -> b c (h w)", c=c))
    return rearrange(drawn, "b c (h w) -> b c h w", h=h)


def reflect(position: Tensor, size: int) -> Tensor:
    """Fold positions outside 0 to ``size`` - 1 back inside, without repeating the border."""
    last = size - 1
    return last - (last - position.abs()).abs()


def cache() -> Path:
    """Return the folder of downloads and decoded images."""
    folder: Path = pooch.os_cache("graph-kd")
    return folder


def download(url: str, md5: str, **options: Any) -> Any:
    """Return what pooch has of a file, checked; it is downloaded once."""
    try:
        return pooch.retrieve(url, md5, Path(url).name, cache(), progressbar=True, **options)
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"{url} could not be downloaded to {cache()} ({type(error).__name__}: {error}). Get it "
            "elsewhere and pass its path with `--data-dir`."
        ) from error


class CifarUnpickler(pickle.Unpickler):
    """Unpickle arrays and plain types, and import nothing else that a file names."""

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

    Args:
        path: A folder that is or contains ``cifar-100-python`` (or its ``.tar.gz``), or that
            archive, which is read in place. None downloads it once.
    """
    path = Path(download(CIFAR100_URL, CIFAR100_MD5)) if path is None else path
    choices = (path, path / CIFAR100, path / f"{CIFAR100}.tar.gz")
    found = [p for p in choices if (p / "train").is_file() or p.is_file()]
    if not found:
        raise FileNotFoundError(
            f"`--data-dir` must be or contain {CIFAR100}[.tar.gz]; got {path}. Leave it out to "
            "download CIFAR-100."
        )
    source = found[0]
    try:
        if source.is_dir():
            files = {split: (source / split).read_bytes() for split in ("train", "test")}
        else:
            with tarfile.open(source) as archive:
                files = {s: extracted(archive, f"{CIFAR100}/{s}") for s in ("train", "test")}
        train, test = (cifar_split(content) for content in files.values())
    except Exception as error:  # damaged archives and pickles raise nearly anything
        raise ValueError(
            f"`{source}` must hold whole CIFAR-100 files; got {type(error).__name__}: {error}. "
            "Get it again."
        ) from error
    return train, test


def extracted(archive: tarfile.TarFile, name: str) -> bytes:
    """Return the content of a regular file of an archive."""
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is no regular file")
    return file.read()


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
    from the cache.

    Args:
        path: A folder that is or contains ``tiny-imagenet-200``. None downloads it once.
    """
    if path is None:
        path = Path(download(TINY_URL, TINY_MD5, processor=pooch.Unzip())[0])
        path = next(p for p in path.parents if (p / "wnids.txt").is_file())
    found = [p for p in (path, path / TINY) if (p / "wnids.txt").is_file()]
    if not found:
        raise FileNotFoundError(
            f"`--data-dir` must be or contain the folder {TINY}, with wnids.txt; got {path}. "
            "Unpack the archive, or leave the flag out to download the data set."
        )
    root = found[0]
    label_of = {wnid: n for n, wnid in enumerate((root / "wnids.txt").read_text().split())}
    splits = [tiny_labels(root, split, label_of) for split in ("train", "val")]
    listing = "".join(f"{file} {file.stat().st_size}\n" for split in splits for file in split)
    kept = cache() / f"{TINY}-{hashlib.sha256(listing.encode()).hexdigest()[:16]}.pt"
    if not kept.exists():
        images = [torch.stack([decoded(file) for file in tqdm(split)]) for split in splits]
        save_atomically(kept, {"train": images[0], "val": images[1]})
    pixels = read_tensors(kept, "to decode the images again")
    train, val = (
        ImageSet(pixels[name], torch.tensor(list(split.values())))
        for name, split in zip(("train", "val"), splits, strict=True)
    )
    return train, val


def tiny_labels(root: Path, split: str, label_of: Mapping[str, int]) -> dict[Path, int]:
    """Return the label of each image of a split, class by class."""
    wnid_of = {}
    if (notes := root / split / "val_annotations.txt").is_file():
        for line in notes.read_text().splitlines():
            file, wnid, *_ = line.split("\t")
            wnid_of[root / split / "images" / file] = wnid
    else:
        for wnid in label_of:
            folder = root / split / wnid
            images = folder / "images" if (folder / "images").is_dir() else folder
            wnid_of |= dict.fromkeys(images.glob("[!.]*.JPEG"), wnid)
    wrong = [file for file, wnid in wnid_of.items() if wnid not in label_of or not file.is_file()]
    if wrong or set(wnid_of.values()) != set(label_of):
        raise ValueError(
            f"`{root / split}` must hold images of each class of wnids.txt and no others; got "
            f"{wrong[0] if wrong else 'none of some classes'}. Unpack the data set again."
        )
    labels = {file: label_of[wnid] for file, wnid in wnid_of.items()}
    # Shorter names first: 9.JPEG before 10.JPEG.
    return dict(sorted(labels.items(), key=lambda x: (x[1], len(x[0].name), x[0].name)))


def decoded(file: Path) -> Tensor:
    """Return a JPEG as RGB pixels, uint8 ``c h w``."""
    try:
        with Image.open(file, formats=["JPEG"]) as image:
            pixels = np.array(image.convert("RGB"))
    except Exception as error:  # a damaged image can raise nearly anything
        raise ValueError(
            f"`{file}` must be a whole JPEG; got {type(error).__name__}: {error}. Unpack the data "
            "set again."
        ) from error
    if pixels.shape != (64, 64, 3):
        raise ValueError(f"`{file}` must have 64×64 pixels; got shape {pixels.shape}.")
    return torch.from_numpy(rearrange(pixels, "h w c -> c h w").copy())


@torch.no_grad()
def accuracy(network: nn.Module, data: Data, settings: Settings) -> float:
    """Return the top-1 accuracy on the test images in evaluation mode, per cent."""
    network.eval()
    images, labels = own_share(data.test.images), own_share(data.test.labels)
    right = torch.zeros((), device=labels.device)
    for some, wanted in zip(torch.split(images, 512), torch.split(labels, 512), strict=True):
        with settings.autocast():
            right += (network(data.normalize(some)).argmax(dim=1) == wanted).sum()
    return round(100 * float(sum_over_processes(right)) / len(data.test.labels), 2)


# Records


class Run:
    """The training of one network: a checkpoint after each epoch, a record at the end.

    The checkpoint is a file of its own in ``OUT/networks``, named after a digest of all that makes
    the network what it is: other settings are another file. A finished network is loaded and not
    trained again. Its record goes to ``OUT/records.jsonl``.

    Args:
        settings: Of the script.
        data: What it learns from.
        method: What trains it, as "teacher" or "mhgd".
        uses: Names of the settings that it depends on beside those of `Settings`.
        **networks: Their names, as ``teacher="VGG16"``.

    Attributes:
        order: Generator of the order of images and of the augmentation.
        record: What the record says.
    """

    def __init__(
        self, settings: Settings, data: Data, method: str, uses: Sequence[str], **networks: str
    ) -> None:
        always = ("seed", "batch_size", "learning_rate", "width", "amp", "split")
        cell = {name: getattr(settings, name) for name in (*always, *uses)}
        cell |= {"method": method, "classes": data.classes, "images": data.digest, **networks}
        cell["data"] = settings.data_name
        key = zlib.crc32(json.dumps(cell, sort_keys=True).encode())
        self.seed, self.order = settings.seed, torch.Generator()
        self.file = settings.out / "networks" / f"{method}-{settings.seed}-{key:08x}.pt"
        self.records = settings.out / "records.jsonl"
        self.saved: dict[str, Any] = {"phase": None}
        if self.file.exists():
            self.saved = read_tensors(self.file, "to train it again")
        self.record: dict[str, Any] = self.saved.get("record") or {
            "settings": cell,
            "versions": versions(settings.device),
            "phases": {},
            "seconds": {},
        }

    def epochs(self, phase: str, count: int, **parts: Any) -> Iterator[int]:
        """Yield the epochs of a phase that are left, and write a checkpoint after each.

        Args:
            phase: Its name in the record.
            count: Epochs in all.
            **parts: What the phase changes: "model", the optimizer and so on.
        """
        epochs = self.record["phases"].setdefault(phase, [])
        self.order.manual_seed(self.seed)
        if self.saved["phase"] == phase:
            for name, state in self.saved["parts"].items():
                parts[name].load_state_dict(state)
            self.order.set_state(self.saved["order"])
        left = range(len(epochs), count)
        name = f"{self.record['settings']['method']}, {phase}"
        hidden = not is_main() or not left
        bar = tqdm(left, name, count, initial=len(epochs), unit="epoch", disable=hidden)
        for epoch in bar:
            started = time.perf_counter()
            yield epoch
            seconds = self.record["seconds"].get(phase, 0.0) + time.perf_counter() - started
            self.record["seconds"][phase] = round(seconds, 3)
            states = {name: part.state_dict() for name, part in parts.items()}
            self.save({"phase": phase, "parts": states, "order": self.order.get_state()})
            bar.set_postfix(epochs[-1])

    def log(self, phase: str, losses: Iterable[Sequence[Tensor]], **values: float) -> None:
        """Add an epoch to the record.

        Args:
            phase: Its name.
            losses: Of each step the loss and, if there is one, the transfer loss.
            **values: What else is to be recorded.
        """
        rows = torch.stack([torch.stack(list(row)).detach().float() for row in losses])
        means = sum_over_processes(rows.mean(dim=0)) / num_processes()
        finite(means)
        named = zip(("loss", "transfer_loss"), means.tolist(), strict=False)
        epochs = self.record["phases"][phase]
        epochs.append({"epoch": len(epochs) + 1, **{k: round(v, 5) for k, v in named}, **values})

    def finish(self, model: nn.Module) -> dict[str, Any]:
        """Keep the trained network, add its record to the others, and return the record.

        The result is the accuracy after the last epoch; the best one is for comparison.
        """
        if "finished" not in self.saved:
            *_, (phase, epochs) = self.record["phases"].items()
            measured = [e["test_accuracy"] for e in epochs if "test_accuracy" in e]
            if measured:
                self.record |= {"accuracy": measured[-1], "best_accuracy": max(measured)}
            parts = {"model": model.state_dict()}
            order = self.order.get_state()
            self.save({"phase": phase, "parts": parts, "order": order, "finished": True})
        others = read_records(self.records)
        if is_main() and self.record not in others:
            write_records(self.records, [*others, self.record])
        return self.record

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint, whole or not at all."""
        if is_main():
            save_atomically(self.file, {**state, "record": self.record})


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
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def read_tensors(path: Path, purpose: str) -> dict[str, Any]:
    """Return what `save_atomically` wrote, on the CPU."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(
            f"`{path}` must be a file of these scripts; got {type(error).__name__}. "
            f"Delete it {purpose}."
        ) from error
    return content


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON line a record."""
    write_atomically(path, "".join(json.dumps(r) + "\n" for r in records).encode())


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file; none if there is no file."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(
            f"`{path}` must hold a JSON record a line; got {error}. Move it away."
        ) from error


def versions(device: str) -> dict[str, str]:
    """Return what a number was measured with: versions, hardware, commit."""
    if torch.device(device).type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        hardware = f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12"]
    try:
        commit = subprocess.run(
            [*describe, "--dirty=+", "--exclude=*"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "none"
    return {
        "graph_kd": graph_kd.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "hardware": hardware if num_processes() == 1 else f"{num_processes()} × {hardware}",
        "commit": commit,
    }


def plot_curves(path: Path, curves: Mapping[str, Sequence[float]]) -> None:
    """Draw accuracies over epochs by name."""
    figure = Figure(figsize=(6.5, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, label=f"{name}: {values[-1]:.1f} %")
    axes.set(xlabel="epoch", ylabel="accuracy, %", title="Accuracy (last epoch named)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture."""
    figure.savefig(picture := io.BytesIO(), format="png", dpi=110)
    write_atomically(path, picture.getvalue())


def report(out: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Print the accuracy of each network after its last epoch, and draw all epochs."""
    if not is_main():
        return
    curves = {}
    for record in records:
        if "accuracy" not in record:  # a teacher that stays untrained
            continue
        method = record["settings"]["method"]
        *_, epochs = record["phases"].values()
        curves[method] = [epoch["test_accuracy"] for epoch in epochs]
        print(f"{method:20} {record['accuracy']:6.2f} %")
    plot_curves(out / "curves.png", curves)
    print(f"Records, curves and networks: {out}")
