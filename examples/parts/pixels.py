"""The pixels of JPEG files as one tensor, decoded once and kept in a checked file.

Axis letters: ``n`` image, ``c`` channel, ``h w`` space.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import IO

import torch
from einops import rearrange
from parts.errors import malformed
from parts.files import write_atomically
from parts.jpegs import decoded
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]  # it ships no types

__all__ = ["decode_once"]


def decode_once(
    sizes: Mapping[str, int], read: Callable[[str], bytes], side: int, path: str | Path
) -> Tensor:
    """Return the pixels of JPEG files, from ``path`` where an earlier call has left them there.

    What is returned was read back from ``path`` and compared with its checksum, the first time too.
    The name of the file ends in a digest of the names and sizes: other files go to another one. A
    change that keeps all names and sizes is not noticed.

    Args:
        sizes: Bytes of each file by its name, in the order of the images.
        read: Return the content of a named file.
        side: Height and width that all images must have, pixels.
        path: Where the pixels are kept, without the digest and the suffix.

    Shape:
        - returns: ``n c h w``, uint8 RGB

    Raises:
        ValueError: Where a file is no whole JPEG of that size, or the kept pixels are damaged.
        RuntimeError: Where the pixels cannot be written; nothing of them is kept.
    """
    listing = "".join(f"{size} {name}\n" for name, size in sizes.items())
    digest = hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()
    head = f"graph-kd pixels, format 1: uint8 {len(sizes)} 3 {side} {side} of {digest}\n".encode()
    kept = Path(f"{path}-{digest[:16]}.pixels")
    if not kept.exists():
        files = ((name, read(name)) for name in sizes)
        try:
            write_atomically(kept, lambda file: _write(file, head, files, len(sizes), side))
        except OSError as error:  # of the file that is written: `read` raises ValueError
            megabytes = len(sizes) * 3 * side**2 / 1e6
            raise RuntimeError(
                f"The decoded images could not be kept in {kept} ({type(error).__name__}: "
                f"{error}). They need a writable folder with {megabytes:.0f} MB free; choose one "
                f"with the environment variable XDG_CACHE_HOME."
            ) from error
    return _read(kept, head, len(sizes), side)


def _write(
    file: IO[bytes], head: bytes, files: Iterable[tuple[str, bytes]], count: int, side: int
) -> None:
    """Write what the pixels are and come from, the pixels, and a checksum of all of it."""
    file.write(head)
    checksum = zlib.crc32(head)
    # Closing the generator also stops its processes, should writing fail.
    with closing(decoded(files, count, side)) as images:
        for pixels in tqdm(images, "Decoding, once", total=count, unit="image"):
            file.write(pixels)
            checksum = zlib.crc32(pixels, checksum)
    file.write(checksum.to_bytes(4, "big"))


def _read(kept: Path, head: bytes, count: int, side: int) -> Tensor:
    content = bytearray(kept.stat().st_size)
    with kept.open("rb") as file:
        file.readinto(content)
    whole = len(head) + count * 3 * side**2 + 4
    checksum = zlib.crc32(memoryview(content)[:-4]).to_bytes(4, "big")
    if not content.startswith(head) or content[-4:] != checksum:
        got = f"{len(content)} bytes of {whole}, or others than were written"
        raise malformed(kept, "be as it was written", got, "Delete it to decode the images again.")
    pixels = torch.frombuffer(
        content, dtype=torch.uint8, offset=len(head), count=whole - len(head) - 4
    )
    return rearrange(pixels, "(n c h w) -> n c h w", c=3, h=side, w=side)
