"""Write scikit-learn's digits, real images, in CIFAR-100's layout, as Python 2 pickled it."""

import io
import struct
import tarfile

import numpy as np
from sklearn.datasets import load_digits

PYTHON = "cifar-100-python"


def digits(split):
    """Return 32×32 images ``n (c h w)`` and labels: 40 training and 10 test images a class."""
    images, labels = load_digits(return_X_y=True)
    places = np.array([(labels[:n] == label).sum() for n, label in enumerate(labels)])
    chosen = places < 40 if split == "train" else (places >= 40) & (places < 50)
    grey = (images[chosen].reshape(-1, 1, 8, 8) * 15).astype(np.uint8)
    large = grey.repeat(3, axis=1).repeat(4, axis=2).repeat(4, axis=3)
    return large.reshape(len(large), -1), labels[chosen].tolist()


def python2_pickle(entries):
    """Pickle a dict as Python 2 did: protocol 2, str as bytes, NumPy's old module names."""

    def text(value):
        return b"T" + struct.pack("<i", len(value)) + value

    def integer(value):
        return b"J" + struct.pack("<i", value)

    def encode(value):
        if isinstance(value, list):
            return b"](" + b"".join(map(integer, value)) + b"e"
        head = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        dtype = b"cnumpy\ndtype\n" + text(b"u1") + integer(0) + integer(1) + b"\x87R("
        dtype += integer(3) + text(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
        shape = b"".join(map(integer, value.shape)) + b"\x86"
        head += integer(0) + b"\x85" + text(b"b") + b"\x87R("
        return head + integer(1) + shape + dtype + b"\x89" + text(value.tobytes()) + b"tb"

    pairs = b"".join(text(key.encode()) + encode(value) for key, value in entries.items())
    return b"\x80\x02}(" + pairs + b"u."


def files(dumps=python2_pickle):
    """Return the content of each file by its path."""
    contents = {}
    for split in ("train", "test"):
        pixels, labels = digits(split)
        contents[f"{PYTHON}/{split}"] = dumps({"data": pixels, "fine_labels": labels})
    return contents


def write_folder(root, contents):
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_archive(path, contents):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path
