"""Load a golden case of the authors' program as inputs and modules of this library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from graph_kd import GraphTransferLoss, SVDFeature

GOLDEN = Path(__file__).parent / "golden"
NUM_HEADS = 8
POINTS = 3


def load(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return the arrays of one file, floats in ``dtype``."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        tensors = {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}


def head_major(array: Tensor) -> Tensor:
    """Reorder the program's columns e*8 + a to ours, a*d + e."""
    return rearrange(array, "... (d m) -> ... (m d)", m=NUM_HEADS)


def maps(case: dict[str, Tensor], who: str) -> list[Tensor]:
    """Return the maps of "teacher" or "student" as ``b c h w``.

    The program's singular vectors come in TensorFlow's signs, ours are canonical. Where they
    differ the teacher's map is negated, which turns its canonical vector round.
    """
    features = [rearrange(case[f"in.{who}{p}"], "b h w c -> b c h w") for p in range(POINTS)]
    if who == "teacher":
        for p, feature in enumerate(features):
            ours = SVDFeature(k=1)(feature)[:, 0].to(feature.dtype)
            theirs = case[f"V_T{p}"][:, :, 0]
            sign = (ours * theirs).sum(dim=1).sign()
            features[p] = feature * rearrange(sign, "b -> b 1 1 1")
    return features


def names_of(pair: int) -> dict[str, str]:
    """Map a parameter or buffer of our estimator to the program's name for it."""
    norm = {
        "weight": "gamma",
        "bias": "beta",
        "running_mean": "moving_mean",
        "running_var": "moving_variance",
    }
    names = {}
    for ours, theirs in (("theta", "S"), ("phi", "R")):
        names[f"{ours}.0.weight"] = f"MHA{pair}.Attention.{theirs}fc.weights"
        for key, value in norm.items():
            names[f"{ours}.1.{key}"] = f"MHA{pair}.Attention.{theirs}bn.{value}"
    names["f1.0.weight"] = f"MHA{pair}.Estimator.fc0.weights"
    for key, value in norm.items():
        names[f"f1.1.{key}"] = f"MHA{pair}.Estimator.bn0.{value}"
    names["f2.weight"] = f"MHA{pair}.Estimator.fc1.weights"
    names["f2.bias"] = f"MHA{pair}.Estimator.fc1.biases"
    return names


def as_ours(name: str, array: Tensor) -> Tensor:
    """Bring an array of the program into the layout of our parameter ``name``."""
    if name.startswith(("theta", "phi")):
        array = head_major(array)
    return array.mT if array.ndim == 2 else array


def transfer(case: dict[str, Tensor], **settings: object) -> GraphTransferLoss:
    """Return a loss that holds the case's weights."""
    features = maps(case, "student")
    loss = GraphTransferLoss([f.shape[1] for f in features], NUM_HEADS, **settings)
    loss.to(features[0].dtype)
    for pair, estimator in enumerate(loss.estimators, start=1):
        state = {
            name: as_ours(name, case[f"w.{theirs}"]) for name, theirs in names_of(pair).items()
        }
        state |= {k: v for k, v in estimator.state_dict().items() if "num_batches" in k}
        estimator.load_state_dict(state)
    return loss
