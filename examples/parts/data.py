"""CIFAR-100 as two tensors a split, read from a folder, an archive or a checked download.

Axis letters: ``n`` image, ``c`` channel, ``h w`` space, ``r`` byte of a record.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from einops import rearrange
from parts.cifar_pickle import CifarUnpickler, PickledArray
from parts.download import cache_folder, download_once
from parts.errors import malformed
from torch import Tensor

__all__ = ["ImageSet", "load_cifar100"]

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
MD5 = "eb9058c3a382ffc7106e4002c42a8d85"  # stated at https://www.cs.toronto.edu/~kriz/cifar.html
CHUNK = 1 << 20  # bytes
PIXELS = 3 * 32 * 32  # bytes of one image, stored channel by channel
RECORD = 2 + PIXELS  # bytes of one binary record: coarse label, fine label, image
PYTHON, BINARY = "cifar-100-python", "cifar-100-binary"
FILES = {  # train, test and class names; where both layouts are present the first is read
    PYTHON: ("train", "test", "meta"),
    BINARY: ("train.bin", "test.bin", "fine_label_names.txt"),
}


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Hold the labelled images of one split.

    Args:
        images: Pixels, uint8 ``n c h w``.
        labels: Position of each image's class in ``class_names``, int64 ``n``.
        class_names: One name a class.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes, whether or not each has an image here."""
        return len(self.class_names)

    def to(self, device: torch.device | str) -> ImageSet:
        """Return the set with its tensors on ``device``."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def take_per_class(self, limit: int | None) -> ImageSet:
        """Keep the first ``limit`` images of each class in stored order; None keeps all."""
        if limit is None:
            return self
        if isinstance(limit, bool) or not isinstance(limit, int):
            raise TypeError(f"`limit` must be an int or None; got {limit!r}.")
        if limit < 1:
            raise ValueError(f"`limit` must be an int ≥ 1 or None; got {limit}.")
        return self._keep(self._places() < limit)

    def take_share(self, share: float) -> ImageSet:
        """Keep the first ``share`` of each class in stored order, rounded up; 0 < share ≤ 1."""
        counts = torch.bincount(self.labels, minlength=self.num_classes).double()
        # 0.07 · 100 is above 7 even in float64.
        return self._keep(self._places() < (share * counts - 1e-6).ceil()[self.labels])

    def take_classes(self, count: int | None) -> ImageSet:
        """Keep the first ``count`` classes; None keeps all."""
        if count is None:
            return self
        if count > self.num_classes:
            raise ValueError(f"`--classes` must be at most {self.num_classes}; got {count}.")
        kept = self._keep(self.labels < count)
        return replace(kept, class_names=self.class_names[:count])

    def hold_out(self, every: int) -> tuple[ImageSet, ImageSet]:
        """Return all but every ``every``-th image of each class, and these."""
        held = self._places() % every == every - 1
        return self._keep(~held), self._keep(held)

    def _places(self) -> Tensor:
        """Return each image's place among those of its class, in stored order."""
        order = self.labels.argsort(stable=True)
        counts = torch.bincount(self.labels, minlength=self.num_classes)
        first = (counts.cumsum(0) - counts)[self.labels[order]]
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device) - first
        return places

    def _keep(self, chosen: Tensor) -> ImageSet:
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])


def load_cifar100(
    data_dir: Path | None, *, cache_dir: Path | None = None
) -> tuple[ImageSet, ImageSet]:
    """Load the train and the test split; any data set in the same layout will do.

    Archives are read in place, never extracted. Pickles are read without importing what they name.

    Args:
        data_dir: A folder that is or contains ``cifar-100-python`` or ``cifar-100-binary`` (or its
            ``.tar.gz``), or the path of such an archive. None takes the archive from the cache and
            downloads it once.
        cache_dir: Folder of the downloaded archive; None is ``$XDG_CACHE_HOME/graph-kd``,
            or ``~/.cache/graph-kd``.

    Raises:
        FileNotFoundError: Where a path is missing.
        ValueError: Where a file does not hold what its layout promises.
        RuntimeError: Where the download fails; nothing of it is kept.
    """
    if data_dir is None:
        data_dir = download_once(URL, MD5, cache_folder(cache_dir), name="CIFAR-100")
    path, layout = _locate(data_dir)
    read = _read_archive if path.is_file() else _read_folder
    train, test, names = read(path, layout)
    if layout == PYTHON:
        class_names = _class_names(names, _unpickle(names, ("fine_label_names",))[0])
        return _python_split(train, class_names), _python_split(test, class_names)
    class_names = _class_names(names, names.content.strip().splitlines())
    return _binary_split(train, class_names), _binary_split(test, class_names)


def _locate(path: Path) -> tuple[Path, str]:
    """Return the folder or archive to read and the name of its layout."""
    if not path.exists():
        raise FileNotFoundError(f"`data_dir` must exist; got {path}.")
    for layout, files in FILES.items():
        if path.is_file() and path.name.startswith(layout):
            return path, layout
        if (path / layout).is_dir():
            return path / layout, layout
        if path.absolute().name == layout or all((path / name).is_file() for name in files):
            return path, layout
        if (archive := path / f"{layout}.tar.gz").is_file():
            return archive, layout
    choices = " or ".join(f"{layout}[.tar.gz]" for layout in FILES)
    raise FileNotFoundError(f"`data_dir` must be or contain {choices}; got {path}.")


class _File(NamedTuple):
    source: str  # what an error calls it
    content: bytes


def _read_folder(folder: Path, layout: str) -> list[_File]:
    for path in (paths := [folder / name for name in FILES[layout]]):
        if not path.is_file():
            raise FileNotFoundError(f"`{path}` must be a file of the {layout} layout; got none.")
    return [_File(str(path), path.read_bytes()) for path in paths]


def _read_archive(archive: Path, layout: str) -> list[_File]:
    wanted = [f"{layout}/{name}" for name in FILES[layout]]
    found: dict[str, _File] = {}
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                name = str(PurePosixPath(member.name))
                if name not in wanted:
                    continue
                if not member.isreg() or (content := tar.extractfile(member)) is None:
                    raise malformed(f"{archive}:{name}", "be a regular file", "a link or folder")
                found[name] = _File(f"{archive}:{name}", content.read())
            while stream.read(CHUNK):  # gzip compares its checksum at the end of the stream only
                pass
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        got = f"{type(error).__name__}: {error}"
        raise malformed(archive, "be a whole .tar.gz", got, "Get it again.") from error
    if missing := [name for name in wanted if name not in found]:
        raise malformed(archive, f"contain {', '.join(wanted)}", f"no {', '.join(missing)}")
    return [found[name] for name in wanted]


def _unpickle(file: _File, keys: tuple[str, ...]) -> list[Any]:
    try:
        stored = CifarUnpickler(io.BytesIO(file.content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        got = f"{type(error).__name__}: {error}"
        raise malformed(file.source, "be a whole CIFAR pickle", got) from error
    if not isinstance(stored, dict):
        raise malformed(file.source, "hold a dict", type(stored).__name__)
    # Python 2 wrote the keys as bytes, Python 3 writes them as str.
    named = {key.decode("latin1") if isinstance(key, bytes) else key: stored[key] for key in stored}
    if any(key not in named for key in keys):
        raise malformed(file.source, f"have the keys {', '.join(keys)}", list(named))
    return [named[key] for key in keys]


def _class_names(file: _File, stored: Iterable[Any]) -> tuple[str, ...]:
    try:
        names = tuple(name if isinstance(name, str) else bytes.decode(name) for name in stored)
    except (TypeError, UnicodeDecodeError) as error:
        raise malformed(file.source, "list the class names as text", error) from error
    if not names:
        raise malformed(file.source, "name at least one class", "none")
    return names


def _python_split(file: _File, class_names: tuple[str, ...]) -> ImageSet:
    data, labels = _unpickle(file, ("data", "fine_labels"))
    if not isinstance(data, PickledArray):
        raise malformed(file.source, "hold `data` as an array", type(data).__name__)
    count = len(data.raw) // PIXELS
    if data.code != "u1" or not count or data.shape != (count, PIXELS) or len(data.raw) % PIXELS:
        raise malformed(file.source, f"hold `data` of dtype u1 and shape (n ≥ 1, {PIXELS})", data)
    stored = "(c h w n)" if data.fortran else "(n c h w)"
    pixels = torch.frombuffer(bytearray(data.raw), dtype=torch.uint8)
    images = rearrange(pixels, f"{stored} -> n c h w", n=count, c=3, h=32)
    return _image_set(file, images, labels, class_names)


def _binary_split(file: _File, class_names: tuple[str, ...]) -> ImageSet:
    size = len(file.content)
    if not size or size % RECORD:
        rule = f"hold one or more records of {RECORD} bytes"
        raise malformed(file.source, rule, f"{size} bytes", "Get it again.")
    stored = torch.frombuffer(bytearray(file.content), dtype=torch.uint8)
    records = rearrange(stored, "(n r) -> n r", r=RECORD)
    images = rearrange(records[:, 2:], "n (c h w) -> n c h w", c=3, h=32)
    return _image_set(file, images, records[:, 1].tolist(), class_names)


def _image_set(file: _File, images: Tensor, labels: object, names: tuple[str, ...]) -> ImageSet:
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise malformed(file.source, "hold `fine_labels` as a list of int", type(labels).__name__)
    if len(labels) != len(images):
        raise malformed(file.source, f"label each of its {len(images)} images", len(labels))
    if outside := sorted({label for label in labels if not 0 <= label < len(names)}):
        rule = f"have labels from 0 to {len(names) - 1}, the last of the named classes"
        raise malformed(file.source, rule, outside)
    return ImageSet(images.contiguous(), torch.tensor(labels), names)
