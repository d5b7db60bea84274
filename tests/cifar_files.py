"""Write scikit-learn's digits, real images, in CIFAR-100's layout, as Python 2 pickled it."""

import io
import pickle
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


class Python2Pickler(pickle._Pickler):
    """Write text and bytes as Python 2 wrote its strings."""

    def save_string(self, value):
        content = value.encode() if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(content)) + content)

    dispatch = pickle._Pickler.dispatch | {str: save_string, bytes: save_string}


def python2_pickle(entries):
    """Pickle a dict in protocol 2, with NumPy's old module names."""
    Python2Pickler(written := io.BytesIO(), protocol=2).dump(entries)
    return written.getvalue().replace(b"numpy._core.", b"numpy.core.")


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
        tar.add(write_folder(path.parent / "unpacked", contents) / PYTHON, PYTHON)
    return path
