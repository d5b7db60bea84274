"""Orthonormal rows by a Cholesky factor: two thin products where a QR factorisation takes many.

Axes: ``b`` sample, ``p`` row, ``s`` its entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TINY", "inverse_factor", "orthonormal"]

SHORT = 3e-4  # part of a row independent of those before it that one Cholesky factor can resolve
RIDGE = 1e-14  # on the diagonal of a Gram matrix of unit rows in float64
PASSES = 4  # Cholesky factors at most
TINY = torch.finfo(torch.float32).tiny  # stands in for zero under a fraction


def orthonormal(rows: Tensor, short: float = SHORT) -> tuple[Tensor, Tensor]:
    """Orthonormalise rows ``b p s``; return them and whether that was possible, ``b``.

    Rows that a filter has left all but dependent come out of a Cholesky factor too short, and their
    values too small: what lies outside the subspace would seem farther away than it is. They take
    another one.
    """
    wide = rows.double()
    for _ in range(PASSES):
        inverse, least = inverse_factor(wide, RIDGE)
        wide = inverse @ wide
        independent = least > short
        if bool(independent.all()):
            break
    return wide.to(rows.dtype), independent


def inverse_factor(rows: Tensor, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return what orthonormalises rows ``b p s`` when multiplied with them, ``b p p``.

    It is L⁻¹, with L the Cholesky factor of their own Gram matrix; with a ridge of relative height,
    that of dependent rows exists too. Also return the least part of its length that the rows
    before leave of one, ``b``.
    """
    gram = rows @ rows.mT
    length = gram.diagonal(dim1=-2, dim2=-1).sqrt().clamp_min(TINY).unsqueeze(-1)
    gram = gram / length / length.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge)
    factor, _ = torch.linalg.cholesky_ex(gram)
    # To invert the small factor is faster than to solve for the long rows.
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse / length.mT, factor.diagonal(dim1=-2, dim2=-1).amin(dim=-1)
