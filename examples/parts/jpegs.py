"""JPEG files decoded by several processes.

Nothing here imports torch, which would take a process longer than thousands of small images, and
the processes are kept from importing the script that is run.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing import get_context
from unittest.mock import patch

from parts.errors import malformed
from PIL import Image

__all__ = ["decoded"]

WORKERS = min(8, os.cpu_count() or 1)  # processes
FILES_PER_WORKER = 4096  # fewer are decoded before another process has started
GROUP = 8192  # files read ahead of the decoding
CHUNK = 64  # files a process is handed at a time


def decoded(
    files: Iterable[tuple[str, bytes]], count: int, side: int
) -> Generator[bytes, None, None]:
    """Decode files in order, each to the bytes of its RGB pixels, channel by channel.

    Small images spend most of their time in Python, so threads only wait for each other: 300 µs an
    image with two threads on two cores, 220 µs with one, 140 µs with two processes.

    Args:
        files: Name and content of each file.
        count: Number of files.
        side: Height and width that all images must have, pixels.

    Raises:
        ValueError: Where a file is no whole JPEG of that size.
    """
    decode = partial(_decode, side=side)
    workers = min(WORKERS, count // FILES_PER_WORKER)
    if workers < 2:
        yield from map(decode, files)
        return
    files = iter(files)
    with _processes(workers) as pool:
        while group := list(islice(files, GROUP)):
            yield from pool.map(decode, group, chunksize=CHUNK)


@contextmanager
def _processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    # Forking would copy the locks of torch's threads in whatever state they are.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        # A spawned process imports the main module again, unless that has no name and no file.
        with patch.multiple(sys.modules["__main__"], create=True, __spec__=None, __file__=None):
            pool.submit(int)  # starts all of them
        yield pool


def _decode(file: tuple[str, bytes], side: int) -> bytes:
    name, content = file
    fix = "Get or unpack the data set again."
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            size = image.size
            # Pixels of any other size are not even decoded.
            bands = image.convert("RGB").split() if size == (side, side) else ()
    except Exception as error:  # a damaged image can raise nearly anything
        got = f"{type(error).__name__}: {error}"
        raise malformed(name, "be a whole JPEG image", got, fix) from error
    if not bands:
        got = f"{size[0]}×{size[1]}"
        raise malformed(name, f"be an image of {side}×{side} pixels", got, fix)
    return b"".join(band.tobytes() for band in bands)
