"""Ways to the top-k right singular vectors that a user might pick, for the benchmark.

Each takes matrices ``b n c`` and returns vectors ``b k c`` of arbitrary sign, with autograd's own
gradient. Axes: ``b`` sample, ``n`` position, ``c`` channel, ``k`` singular vector, ``s`` row of the
Gram matrix of the shorter side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from graph_kd import SVDFeature

__all__ = ["DECOMPOSITIONS", "gram", "gram_eigh", "graph_kd"]

OVERSAMPLING = 4  # columns that svd_lowrank draws beside the wanted ones


def graph_kd(rows_bnc: Tensor, k: int) -> Tensor:
    """The package's own."""
    vectors: Tensor = SVDFeature(k)(rows_bnc)
    return vectors


def gram(rows_bnc: Tensor) -> Tensor:
    """The Gram matrix of the shorter side alone, ``b s s``: the least that the others need."""
    _, n, c = rows_bnc.shape
    return rows_bnc.mT @ rows_bnc if n >= c else rows_bnc @ rows_bnc.mT


def gram_eigh(rows_bnc: Tensor, k: int) -> Tensor:
    """Eigenvectors of the Gram matrix of the shorter side."""
    _, basis = torch.linalg.eigh(gram(rows_bnc))
    return _on_channels(rows_bnc, basis[..., -k:].flip(-1))


def svd(rows_bnc: Tensor, k: int) -> Tensor:
    """The whole decomposition."""
    right: Tensor
    _, _, right = torch.linalg.svd(rows_bnc, full_matrices=False)
    return right[:, :k]


def svd_lowrank(rows_bnc: Tensor, k: int) -> Tensor:
    """Randomised subspace iteration, with torch's default of two rounds."""
    columns = min(k + OVERSAMPLING, *rows_bnc.shape[1:])
    _, _, right = torch.svd_lowrank(rows_bnc, q=columns)
    return rearrange(right[..., :k], "b c k -> b k c")


def lobpcg(rows_bnc: Tensor, k: int) -> Tensor:
    """Conjugate gradients on the Gram matrix of the shorter side."""
    matrices = gram(rows_bnc)
    if matrices.shape[-1] < 3 * k:  # below that it is not defined
        return gram_eigh(rows_bnc, k)
    _, columns = torch.lobpcg(matrices, k)
    return _on_channels(rows_bnc, columns)


def _on_channels(rows_bnc: Tensor, columns_bsk: Tensor) -> Tensor:
    _, n, c = rows_bnc.shape
    if n < c:
        columns_bsk = torch.nn.functional.normalize(rows_bnc.mT @ columns_bsk, dim=1)
    return rearrange(columns_bsk, "b c k -> b k c")


DECOMPOSITIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "graph-kd": graph_kd,
    "Gram + eigh": gram_eigh,
    "linalg.svd": svd,
    "svd_lowrank": svd_lowrank,
    "lobpcg": lobpcg,
}
