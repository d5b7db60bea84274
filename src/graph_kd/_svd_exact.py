"""Top right singular vectors and their derivative from a whole eigendecomposition, in float64.

For float64 maps, and for the few others on which the subspace iteration of `graph_kd._leading`
gives up: close or repeated singular values, steep spectra, very large and very small maps.

Axes: ``b`` sample, ``n`` position, ``c`` channel, ``k`` singular vector, ``i`` and ``j`` the same
in sums, ``s`` eigenvector of the Gram matrix of the shorter side, min(n, c) of them.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor

__all__ = ["exact_gradient", "exact_vectors"]


def exact_vectors(rows: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the top singular vectors, which are null, and the eigenpairs behind them.

    Shape:
        - rows: maps, ``b n c``
        - returns: vectors ``b k c``; null ``b k``; values ``b s``, eigenvalues of the Gram matrix
          of the map scaled to a largest entry of one; basis ``b s s``, eigenvectors in columns
    """
    matrix, _ = _normalise(rows)
    _, n, c = matrix.shape
    gram = matrix.mT @ matrix if n >= c else matrix @ matrix.mT
    values, basis = torch.linalg.eigh(gram)
    values, basis = values.flip(-1).clamp_min(0), basis.flip(-1)  # largest first
    if n >= c:
        columns = basis[..., :k]
    else:
        # Columns σ_i v_i are orthogonal already; QR gives them unit length and completes those of
        # singular value zero.
        columns, _ = torch.linalg.qr(matrix.mT @ basis[..., :k])
    vectors = rearrange(columns, "b c k -> b k c")
    mean_cosine = einsum(vectors, matrix.mean(dim=1), "b k c, b c -> b k")
    vectors = torch.where(mean_cosine < 0, -1, 1).unsqueeze(-1) * vectors
    null = values[:, :k] <= _noise(values[:, :k], values[:, :1], n, c, rows.dtype)
    return vectors, null, values, basis


def exact_gradient(
    rows: Tensor, index: Tensor, chosen: Tensor, values: Tensor, basis: Tensor, grad: Tensor
) -> Tensor:
    """Pull the gradient ``b j c`` of chosen vectors back to the maps, ``b n c`` in their dtype."""
    matrix, scale = _normalise(rows)
    response = _response(matrix, index, chosen, values, basis, grad.double(), rows.dtype)
    # d<v_i, g_i> = <w_i, dG v_i> with dG = dMᵀ M + Mᵀ dM and w_i the response to g_i.
    projected_v, projected_w = matrix @ chosen.mT, matrix @ response.mT
    grad_rows = projected_w @ chosen + projected_v @ response
    return (grad_rows / rearrange(scale, "b -> b 1 1")).to(rows.dtype)


def _normalise(rows_bnc: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each map to a largest entry of one, in float64; return it and the scale.

    Neither very large nor very small maps overflow then. A null map becomes zero, its scale one.
    """
    peak = rows_bnc.abs().amax(dim=(1, 2))
    peak = peak.to(torch.promote_types(peak.dtype, torch.float32))  # half ends where maps may lie
    null = peak < torch.finfo(peak.dtype).tiny ** 0.5
    scale = torch.where(null, 1.0, peak.double())
    matrix = rows_bnc.double() / rearrange(scale, "b -> b 1 1")
    return torch.where(rearrange(null, "b -> b 1 1"), 0.0, matrix), scale


def _noise(value: Tensor, largest: Tensor, n: int, c: int, dtype: torch.dtype) -> Tensor:
    """Return what rounding can do to eigenvalues of the Gram matrix of maps that came in ``dtype``.

    Rounding the input: n · c errors of eps/4 of a typical entry make a matrix of norm
    eps/4 (√n + √c)/√(n c) σ_1; eight times that. Rounding the Gram matrix is added.
    """
    eps = torch.finfo(dtype).eps
    of_input: Tensor = 2 * eps * (n**0.5 + c**0.5) / (n * c) ** 0.5 * (largest * value).sqrt()
    return of_input + 4 * min(n, c) * torch.finfo(value.dtype).eps * largest


def _response(
    matrix: Tensor,
    index: Tensor,
    chosen: Tensor,
    values: Tensor,
    basis: Tensor,
    grad: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Return w_i = Σ_{j≠i} v_j (v_j · g_i) / (λ_i - λ_j) over all right singular vectors j.

    ``values`` are the eigenvalues λ of the Gram matrix, ``basis`` its eigenvectors, and ``index``
    says which of them the chosen vectors i are.
    """
    _, n, c = matrix.shape
    value_i = values.gather(1, index).unsqueeze(-1)
    value_j = values.unsqueeze(-2)
    gap = value_i - value_j
    noise = _noise(value_i, values[:, :1].unsqueeze(-1), n, c, dtype)
    isolated = gap.abs() > noise
    inverse_gap = torch.where(isolated, 1 / torch.where(isolated, gap, 1), 0)
    if n >= c:
        return ((grad @ basis) * inverse_gap) @ basis.mT
    # Wide maps: the eigenvectors known are those of M Mᵀ, on the left. From
    #   (λ_i - MᵀM)⁻¹ = (1 + Mᵀ (λ_i - M Mᵀ)⁻¹ M) / λ_i
    # the sum above is reached without the small v_j = Mᵀ u_j / σ_j and without the null space.
    # A repeated partner j is taken out of g_i by the coefficient -1/λ_j.
    itself = index.unsqueeze(-1) == torch.arange(values.shape[1], device=values.device)
    repeated = ~isolated & ~itself & (value_i > noise)
    inverse_gap = torch.where(repeated, -1 / torch.where(repeated, value_j, 1), inverse_gap)
    inner = ((grad @ matrix.mT) @ basis) * inverse_gap @ basis.mT
    along = (grad * chosen).sum(dim=-1, keepdim=True)
    response = grad - along * chosen + inner @ matrix
    positive = value_i > noise
    return torch.where(positive, response / torch.where(positive, value_i, 1), 0)
