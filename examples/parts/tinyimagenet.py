"""Tiny ImageNet as two tensors a split, read from its folder, its zip or a checked download."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import torch
from parts.data import ImageSet
from parts.download import cache_folder, download_once
from parts.errors import malformed
from parts.pixels import decode_once

__all__ = ["load_tinyimagenet"]

NAME = "tiny-imagenet-200"
URL = f"http://cs231n.stanford.edu/{NAME}.zip"
# Its makers state none; this one is in the loaders of other libraries, for example Avalanche's
# https://github.com/ContinualAI/avalanche, avalanche/benchmarks/datasets/tiny_imagenet
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
SIDE = 64  # height and width of an image, pixels
CLASSES, WORDS, ANNOTATIONS = "wnids.txt", "words.txt", "val/val_annotations.txt"
AGAIN = "Get or unpack the data set again."


def load_tinyimagenet(
    data_dir: Path | None, *, cache_dir: Path | None = None
) -> tuple[ImageSet, ImageSet]:
    """Load the train and the validation split; any data set in the same layout will do.

    The classes are numbered in the order of ``wnids.txt`` and named by ``words.txt``, where it is
    there. Images are stored class by class, grayscale ones as RGB. Validation images may lie in one
    folder beside ``val_annotations.txt`` or in folders of their class. A zip is read in place.

    The images are decoded once and then read from a file in ``cache_dir`` (1.4 GB).

    Args:
        data_dir: A folder that is or contains ``tiny-imagenet-200`` (or its ``.zip``), or the path
            of such a zip. None takes the zip from ``cache_dir`` and downloads it once.
        cache_dir: Folder of the decoded images and the download; None is
            ``$XDG_CACHE_HOME/graph-kd``, or ``~/.cache/graph-kd``.

    Raises:
        FileNotFoundError: Where a path is missing.
        ValueError: Where a file does not hold what the layout promises, a class is not listed or
            has fewer images than another, or the decoded images are damaged.
        RuntimeError: Where the download fails or the decoded images cannot be written.
    """
    cache_dir = cache_folder(cache_dir)
    if data_dir is None:
        data_dir = download_once(URL, MD5, cache_dir, name="Tiny ImageNet")
    with _opened(data_dir) as source:
        wnids = _text(source, CLASSES).split()
        if not wnids or len(set(wnids)) < len(wnids):
            rule = "list at least one class and each once"
            raise malformed(f"{source.where}/{CLASSES}", rule, f"{len(wnids)} lines")
        words = _text(source, WORDS) if WORDS in source.sizes else ""
        name_of = dict(line.split("\t", 1) for line in words.splitlines() if "\t" in line)
        labels = [_labels(source, split, wnids) for split in ("train", "val")]
        sizes = {name: source.sizes[name] for split in labels for name in split}
        images = decode_once(sizes, source.content, SIDE, cache_dir / NAME)
    class_names = tuple(name_of.get(wnid, wnid) for wnid in wnids)
    train, val = (
        ImageSet(part, torch.tensor(list(split.values())), class_names)
        for part, split in zip(torch.split(images, [*map(len, labels)]), labels, strict=True)
    )
    return train, val


@dataclass(frozen=True)
class _Source:
    """The files of a folder or zip, by their path below the folder of ``wnids.txt``."""

    where: Path  # what errors call it
    sizes: dict[str, int]  # bytes
    read: Callable[[str], bytes]

    def content(self, name: str) -> bytes:
        if name not in self.sizes:
            raise FileNotFoundError(f"`{self.where}/{name}` must exist; there is none. {AGAIN}")
        try:
            return self.read(name)
        except (OSError, EOFError, RuntimeError, BadZipFile, zlib.error) as error:
            got = f"{type(error).__name__}: {error}"
            raise malformed(f"{self.where}/{name}", "be readable", got, AGAIN) from error


@contextmanager
def _opened(path: Path) -> Iterator[_Source]:
    if not path.exists():
        raise FileNotFoundError(f"`data_dir` must exist; got {path}.")
    if path.is_dir():
        choices = (path, path / NAME, path / f"{NAME}.zip")
        found = [p for p in choices if (p / CLASSES).is_file() or p.is_file()]
        if not found:
            raise FileNotFoundError(
                f"`data_dir` must be or contain {NAME}[.zip] with its {CLASSES}; got {path}."
            )
        path = found[0]
    if path.is_dir():
        yield _Source(path, dict(_sizes(path)), lambda name: (path / name).read_bytes())
        return
    try:
        archive = ZipFile(path)
    except BadZipFile as error:
        raise malformed(path, "be a whole .zip", error, "Get it again.") from error
    with archive:
        sizes = {i.filename: i.file_size for i in archive.infolist() if not i.is_dir()}
        # The shortest: the top folder may have any name, or be missing.
        top = min((n for n in sizes if _file(n) == CLASSES), key=len, default=CLASSES)
        top = top.removesuffix(CLASSES)
        below = {name[len(top) :]: size for name, size in sizes.items() if name.startswith(top)}
        yield _Source(path, below, lambda name: archive.read(top + name))


def _sizes(folder: Path | str, above: str = "") -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield above + entry.name, entry.stat().st_size
            elif above or entry.name in ("train", "val"):
                yield from _sizes(entry.path, f"{above}{entry.name}/")


def _file(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _text(source: _Source, name: str) -> str:
    try:
        return source.content(name).decode()
    except UnicodeDecodeError as error:
        raise malformed(f"{source.where}/{name}", "be text", error, AGAIN) from error


def _labels(source: _Source, split: str, wnids: list[str]) -> dict[str, int]:
    """Return the label of each image of a split by the name of its file, in stored order."""
    folder_of = {}  # of each image: its folder below that of the split
    for name in source.sizes:
        *folders, file = name.split("/")  # pathlib takes seconds for all the names
        # macOS puts ._0.JPEG beside 0.JPEG
        is_image = file.lower().endswith((".jpeg", ".jpg")) and not file.startswith(".")
        if folders[:1] == [split] and is_image:
            folder_of[name] = "/".join(folder for folder in folders[1:] if folder != "images")
    class_of = folder_of
    if split == "val" and set(folder_of.values()) == {""}:
        class_of = _annotated(source, list(folder_of))
    elif loose := [name for name, folder in folder_of.items() if not folder]:
        rule = "hold all its images in folders of their class"
        raise malformed(f"{source.where}/{split}", rule, f"{loose[0]} and others")
    unlisted = sorted(set(class_of.values()) - set(wnids))
    if unlisted:
        rule = f"list each class that has images in {split}"
        raise malformed(f"{source.where}/{CLASSES}", rule, f"no {unlisted[:5]}")
    count = Counter(class_of.values())
    most, least = max(wnids, key=count.__getitem__), min(wnids, key=count.__getitem__)
    if count[least] < max(1, count[most]):
        rule = "hold equally many images of each class"
        got = f"{count[most]} of {most} and {count[least]} of {least}"
        raise malformed(f"{source.where}/{split}", rule, got, AGAIN)
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    labels = {name: label_of[wnid] for name, wnid in class_of.items()}

    def place(name: str) -> tuple[int, int, str]:
        file = _file(name)
        return labels[name], len(file), file  # shorter first: 9.JPEG before 10.JPEG

    return {name: labels[name] for name in sorted(labels, key=place)}


def _annotated(source: _Source, images: list[str]) -> dict[str, str]:
    """Return the class of each validation image as ``val_annotations.txt`` has it."""
    where = f"{source.where}/{ANNOTATIONS}"
    class_of: dict[str, str] = {}
    for number, line in enumerate(_text(source, ANNOTATIONS).splitlines(), start=1):
        file, *rest = line.split("\t")
        if not rest:
            raise malformed(
                where, "have a file and a class on each line", f"line {number}: {line!r}"
            )
        if class_of.setdefault(file, rest[0]) != rest[0]:
            raise malformed(where, "give each image one class", f"two of {file}")
    path_of = {_file(name): name for name in images}
    if missing := sorted(class_of.keys() - path_of.keys()):
        raise malformed(
            where, "list images that exist", f"{len(missing)} others: {missing[:3]}", AGAIN
        )
    if unlabelled := sorted(path_of.keys() - class_of.keys()):
        raise malformed(
            where, "list every image", f"no {unlabelled[:3]} of {len(unlabelled)}", AGAIN
        )
    return {path_of[file]: wnid for file, wnid in class_of.items()}
