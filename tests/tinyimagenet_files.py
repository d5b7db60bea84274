"""Write tiny Tiny ImageNets: real JPEGs in the original layout, as a folder or a zip."""

from __future__ import annotations

import io
from functools import cache
from zipfile import ZipFile

import numpy as np
from PIL import Image

NAME = "tiny-imagenet-200"
WNIDS = ["n03", "n01", "n02"]  # not sorted, as in the original
COUNTS = {"train": 11, "val": 2}  # images a class; 11, so that a 10 comes before a 9 in text order


@cache
def jpeg(number, mode="RGB", size=(64, 64), kind="JPEG"):
    bands = len(Image.new(mode, (1, 1)).getbands())
    coarse = np.random.default_rng(number).bytes(8 * 8 * bands)
    image = Image.frombytes(mode, (8, 8), coarse).resize(size)
    image.save(file := io.BytesIO(), kind)
    return file.getvalue()


def images():
    """Map (split, wnid, position in the class) to a JPEG; some are grayscale, one is CMYK."""
    mode_of = {0: "L", 5: "CMYK", 12: "L", 40: "L"}
    keys = [(split, wnid, i) for split in COUNTS for wnid in WNIDS for i in range(COUNTS[split])]
    return {key: jpeg(n, mode_of.get(n, "RGB")) for n, key in enumerate(keys)}


def tinyimagenet_files(val="flat"):
    """Return the content of every file, by its path below the top folder."""
    files = {
        "wnids.txt": "".join(f"{wnid}\n" for wnid in WNIDS).encode(),
        "words.txt": b"n00\tentity\nn01\tgoldfish, Carassius\nn03\tschool bus\n",
        "test/images/test_0.JPEG": b"never read",
    }
    annotations = []
    for (split, wnid, i), content in images().items():
        if split == "train":
            files[f"train/{wnid}/{wnid}_boxes.txt"] = b"never read"
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = content
            continue
        file = f"val_{7 * i + WNIDS.index(wnid)}.JPEG"
        folder = {"flat": "images", "folders": wnid, "nested": f"{wnid}/images"}[val]
        files[f"val/{folder}/{file}"] = content
        annotations.append(f"{file}\t{wnid}\t0\t1\t62\t63\n")
    if val == "flat":
        files["val/val_annotations.txt"] = "".join(reversed(annotations)).encode()
    return files


def write_zip(path, files, top=f"{NAME}/"):
    with ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(top + name, content)
    return path
