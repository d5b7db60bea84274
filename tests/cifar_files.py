"""Write tiny CIFAR-100 files, in both layouts and as an archive."""

from __future__ import annotations

import io
import struct
import tarfile

import numpy as np

NAMES = ["apple", "bee", "cloud", "dolphin"]
COUNTS = {"train": 9, "test": 5}
PYTHON, BINARY = "cifar-100-python", "cifar-100-binary"


def pixels(split):
    rng = np.random.default_rng(COUNTS[split])
    return rng.integers(256, size=(COUNTS[split], 3072), dtype=np.uint8)


def labels(split):
    return [3 * i % len(NAMES) for i in range(COUNTS[split])]


def python2_pickle(entries):
    """Write a dict as Python 2 did: protocol 2, str as bytes, NumPy's old module names."""

    def text(value):
        return b"T" + struct.pack("<i", len(value)) + value

    def integer(value):
        return b"J" + struct.pack("<i", value)

    def encode(value):
        if isinstance(value, str):
            return text(value.encode())
        if isinstance(value, int):
            return integer(value)
        if isinstance(value, list):
            return b"](" + b"".join(map(encode, value)) + b"e"
        head = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        dtype = b"cnumpy\ndtype\n" + text(b"u1") + integer(0) + integer(1) + b"\x87R("
        dtype += integer(3) + text(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
        shape = b"".join(map(integer, value.shape)) + b"\x86"
        head += integer(0) + b"\x85" + text(b"b") + b"\x87R("
        return head + integer(1) + shape + dtype + b"\x89" + text(value.tobytes()) + b"tb"

    pairs = b"".join(text(key.encode()) + encode(value) for key, value in entries.items())
    return b"\x80\x02}(" + pairs + b"u."


def python_files(dumps=python2_pickle):
    files = {
        f"{PYTHON}/{split}": dumps({"data": pixels(split), "fine_labels": labels(split)})
        for split in COUNTS
    }
    return files | {f"{PYTHON}/meta": dumps({"fine_label_names": NAMES})}


def binary_files():
    files = {f"{BINARY}/fine_label_names.txt": "".join(f"{name}\n" for name in NAMES).encode()}
    for split in COUNTS:
        fine = np.array(labels(split), dtype=np.uint8)[:, None]
        files[f"{BINARY}/{split}.bin"] = np.hstack([fine * 0, fine, pixels(split)]).tobytes()
    return files


def write_folder(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path
