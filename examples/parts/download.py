"""An archive downloaded once, whole or not at all."""

from __future__ import annotations

import hashlib
import os
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.request import urlopen

from parts.errors import malformed
from parts.files import write_atomically
from tqdm import tqdm  # type: ignore[import-untyped]  # it ships no types

__all__ = ["cache_folder", "download_once"]

TIMEOUT = 30  # seconds without a byte from the server
CHUNK = 1 << 20  # bytes


def cache_folder(chosen: Path | None) -> Path:
    """Return the chosen folder, else ``$XDG_CACHE_HOME/graph-kd``, else ``~/.cache/graph-kd``."""
    if chosen is not None:
        return chosen
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graph-kd"


def download_once(url: str, md5: str, folder: Path, *, name: str) -> Path:
    """Return the archive in ``folder``, after downloading it where it is not there yet.

    Args:
        url: Where from; its last part names the file.
        md5: Checksum of the archive, hexadecimal.
        folder: Where to.
        name: What the data set is called.

    Raises:
        ValueError: Where the file in ``folder`` has another checksum.
        RuntimeError: Where the download fails; nothing of it is kept.
    """
    archive = folder / url.rsplit("/", 1)[-1]
    if not archive.exists():
        try:
            write_atomically(archive, lambda file: _download(url, md5, file, archive.name))
        except (OSError, HTTPException, ValueError) as error:
            raise RuntimeError(
                f"{name} could not be downloaded from {url} to {archive} "
                f"({type(error).__name__}: {error}). Get {archive.name} from any mirror and pass "
                f"its path with `--data-dir`."
            ) from error
    elif (got := _md5(archive)) != md5:
        fix = "Delete it to download it again, or pass other data with `--data-dir`."
        raise malformed(archive, f"have MD5 {md5}", got, fix)
    return archive


def _download(url: str, md5: str, file: IO[bytes], description: str) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with urlopen(url, timeout=TIMEOUT) as response:
        total = int(response.headers.get("Content-Length") or 0) or None
        with tqdm(total=total, unit="B", unit_scale=True, desc=description) as bar:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
    if (got := digest.hexdigest()) != md5:
        raise malformed("download", f"have MD5 {md5}", got)


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
