"""Top right singular vectors and their derivative from a whole decomposition, in float64.

For float64 maps, and for the few samples that the subspace iteration of `graph_kd._leading` does
not resolve: close or repeated singular values, steep spectra, very large and very small maps.

Axes: ``b`` sample, ``n`` position, ``c`` channel, ``k`` wanted vector, ``i`` and ``j`` vectors of a
sum, ``s`` any of the min(n, c) right singular vectors.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["are_null", "exact_gradient", "exact_vectors"]


def exact_vectors(rows: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return vectors ``b k c``, which are null ``b k``, all values ``b s`` and vectors ``b s c``.

    A map that is too small for its squares to be normal numbers has values of zero.
    """
    matrix = rows.double()
    _, values, basis = torch.linalg.svd(matrix, full_matrices=False)
    own = torch.promote_types(rows.dtype, torch.float32)  # float16's limit is too large
    values = torch.where(values[:, :1] < torch.finfo(own).tiny ** 0.5, 0, values)
    along = basis @ rearrange(matrix.mean(dim=1), "b c -> b c 1")
    basis = torch.where(along < 0, -basis, basis).contiguous()  # as compiled graphs expect
    null = are_null((values / _scale(values))[:, :k] ** 2, rows)
    return basis[:, :k].clone(), null, values, basis


def are_null(squares: Tensor, rows: Tensor) -> Tensor:
    """Return which squared values, ``b k``, are zero up to the rounding of the maps."""
    squares = squares / _scale(squares)
    return squares <= _noise(squares, rows)


def exact_gradient(
    rows: Tensor, index: Tensor, chosen: Tensor, values: Tensor, basis: Tensor, grad: Tensor
) -> Tensor:
    """Pull the gradient ``b i c`` of chosen vectors back to the maps, ``b n c`` in float64.

    d<v_i, g_i> = <w_i, dG v_i> with dG = dMᵀ M + Mᵀ dM and w_i = Σ_j v_j (v_j · g_i) / (λ_i - λ_j)
    over all other vectors j, those of value zero included. λ is a squared singular value.
    """
    _, n, c = rows.shape
    scale = rearrange(_scale(values), "b 1 -> b 1 1")
    matrix, squares = rows.double() / scale, (values / scale[:, 0]) ** 2
    value_i = rearrange(squares.gather(1, index), "b i -> b i 1")
    gap = value_i - rearrange(squares, "b j -> b 1 j")
    noise = _noise(value_i, rows)
    apart = gap.abs() > noise  # not for i itself, and not for what rounding could exchange with it
    along = grad.double() @ basis.mT
    response = torch.where(apart, along / gap, 0) @ basis
    if n < c:  # the others of value zero; a null vector is one of them, and has no derivative
        outside = grad.double() - along @ basis
        positive = value_i > noise
        response = torch.where(positive, response + outside / value_i, 0)
    grad_rows = (matrix @ response.mT) @ chosen + (matrix @ chosen.mT) @ response
    pulled: Tensor = grad_rows / scale
    return pulled


def _scale(values: Tensor) -> Tensor:
    """Return the largest value, or one for a null map, ``b 1``: squares of no size overflow."""
    largest = values[:, :1]
    return torch.where(largest > 0, largest, 1)


def _noise(squares: Tensor, rows: Tensor) -> Tensor:
    """Return what rounding can do to squared singular values, the largest of which is one.

    Of the input: n · c errors of eps/4 of a typical entry make a matrix of norm
    eps/4 (√n + √c)/√(n c) σ_1; four times that is taken. Of the decomposition: 2 min(n, c) eps.
    """
    _, n, c = rows.shape
    of_input = torch.finfo(rows.dtype).eps * (n**0.5 + c**0.5) / (n * c) ** 0.5
    relative = 2 * (of_input + 2 * min(n, c) * torch.finfo(squares.dtype).eps)
    noise: Tensor = relative * squares.sqrt() + relative**2
    return noise
