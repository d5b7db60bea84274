"""Leading singular pairs: what `SVDFeature` returns in float32.

A whole decomposition costs ten times the Gram matrix; a few leading vectors cost a fraction of it:
subspace iteration with a Chebyshev filter (Zhou & Saad 2007), all of it thin matrix products.

Axes: ``b`` sample, ``s`` and ``l`` shorter and longer side of a matrix, ``i`` wanted pair, ``p``
vector of the subspace, the wanted ones first. Vectors are rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from graph_kd._orthonormal import TINY, orthonormal

__all__ = ["LeadingPairs", "leading_pairs", "subspace_size"]

EXTRA = 4  # vectors beside the wanted ones: their gap to the rest is what convergence lives on
DIRECT = 16  # a Gram matrix up to this size, or 3 p, is decomposed whole: that is as fast
TOLERANCE = 3e-4  # radian, angle left to the leading subspace; a gradient errs by 2.5 times that
MARGIN = 10.0  # by which a filter aims below the tolerance
ROUNDING = 6e-8  # norm of the rounding errors of a Gram matrix relative to its own, about eps/2
ROUNDS = 5  # filters at most
DEGREE = 24  # of a filter at most
LOG_RANGE = 80.0  # of the growth in a filter, natural logarithm; float32 ends at 88
ROUGH = 1e-5  # part of a start vector independent of the others that is enough for a filter
DOMINATES = 4.0  # ratio of eigenvalues from which the larger one is kept out of a filtered vector
STEEP = 32.0  # ratio of eigenvalues from which the map itself is asked for the smaller one
LOG_SPREAD = 12.0  # of the growth in most first filters, below float32's 16: rows stay independent
LOG_LIMIT = 40.0  # of the growth in any first filter


class LeadingPairs(NamedTuple):
    """Hold leading singular pairs of matrices A.

    Shape:
        - values: ``b p``, squared singular values, largest first
        - vectors: ``b p s``, orthonormal, on the shorter side
        - found: ``b``, whether the wanted vectors lie in the leading subspace, to `TOLERANCE`
    """

    values: Tensor
    vectors: Tensor
    found: Tensor


def subspace_size(count: int, size: int) -> int:
    """Return how many vectors are kept to find ``count`` of those of a size: a few, or all."""
    kept = count + EXTRA
    return size if size <= max(DIRECT, 3 * kept) else kept


def leading_pairs(matrix: Tensor, gram: Tensor, count: int) -> LeadingPairs:
    """Find the singular vectors of the ``count`` largest singular values.

    Args:
        matrix: A, finite, float32, ``b s l`` with s ≤ l.
        gram: A Aᵀ, ``b s s``.
        count: Pairs wanted.
    """
    size = gram.shape[-1]
    kept = subspace_size(count, size)
    if kept == size:
        values, vectors = _eigenpairs(gram)
        if _steep(values, count):
            values, vectors = _eigenpairs(_gram_in_float64(matrix))
        vectors = torch.nn.functional.normalize(vectors, dim=-1)  # LAPACK leaves 1e-6 of length
        least = values[:, count - 1]
        return LeadingPairs(values, vectors, TOLERANCE * least > ROUNDING * values[:, 0])

    ritz = _ritz(gram, _first_block(gram, kept, count), count)
    for _ in range(ROUNDS - 1):
        lagging = int(ritz.worth_more.sum())
        if not lagging:
            break
        if 2 * lagging > len(gram):  # with the others, which spares the copy of their matrices
            ritz = _ritz(gram, _filter(gram, ritz), count)
            continue
        some = ritz.worth_more.nonzero()[:, 0]
        part = gram[some]
        again = _ritz(part, _filter(part, _Ritz(*(whole[some] for whole in ritz))), count)
        for whole, mended in zip(ritz, again, strict=True):
            whole[some] = mended
    values, vectors = ritz.values, ritz.vectors
    if _steep(values, count):
        values, rotation = _eigenpairs(_gram_in_float64(vectors @ matrix))
        vectors = rotation @ vectors
    return LeadingPairs(values, vectors, ritz.found)


@cache
def _start(count: int, size: int, device: torch.device) -> Tensor:
    """Return vectors that no Gram matrix is orthogonal to, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, size, generator=generator).to(device)


def _gram_in_float64(rows: Tensor) -> Tensor:
    wide = rows.double()
    return wide @ wide.mT


def _steep(values: Tensor, count: int) -> bool:
    """Tell whether the least wanted value is lost in the rounding of a Gram matrix in float32.

    In a matrix's own products in float64 it is not.
    """
    return count > 1 and bool((values[:, 0] > STEEP * values[:, count - 1]).any())


class _Ritz(NamedTuple):
    """Hold what a subspace tells of the leading pairs.

    Shape:
        - values: ``b p``, largest first
        - vectors: ``b p s``, orthonormal
        - image: ``b p s``, the vectors times the Gram matrix
        - angle: ``b i``, bound of the angle between a wanted vector and the leading subspace
        - found: ``b``, whether it is within `TOLERANCE` for all of them
        - worth_more: ``b``, whether a filter would improve them
    """

    values: Tensor
    vectors: Tensor
    image: Tensor
    angle: Tensor
    found: Tensor
    worth_more: Tensor


def _first_block(gram: Tensor, kept: int, count: int) -> Tensor:
    """Return vectors in which the large eigenvalues prevail, ``b p s``.

    By a filter of as high a degree as leaves them independent: a flat spectrum takes more than one
    in which few values dominate. The factor of Cholesky orders the rows, so that the one after the
    wanted ones tells where the filter may begin. An edge too low slows it down; one too high could
    put a wanted value on a root of the polynomial, where all trace of its vector would be lost:
    two rows take the degree before, which has no root in common with it.
    """
    start = _start(kept, gram.shape[-1], gram.device).expand(len(gram), -1, -1)
    block, _ = orthonormal(start @ gram @ gram, ROUGH)
    image = block @ gram
    lengths = torch.linalg.vector_norm(image, dim=-1)
    largest = lengths.topk(count + 1, dim=1).values
    top, edge = largest[:, :1], largest[:, -1:]
    degree = int((LOG_SPREAD / _growth(top / edge)).median().clamp(2, DEGREE))
    # The ratio that grows by x a degree is cosh²(x/2): steeper samples take a higher edge.
    edge = torch.maximum(edge, top / math.cosh(LOG_LIMIT / degree / 2) ** 2)
    rows, before = _chebyshev(gram, block, image, edge, degree)
    rows[:, -EXTRA // 2 :] = before[:, -EXTRA // 2 :]
    return rows


def _eigenpairs(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, largest first, and eigenvectors in rows, in float32."""
    values, basis = torch.linalg.eigh(gram)
    vectors = rearrange(basis.flip(-1), "b q p -> b p q")
    return values.flip(-1).clamp_min(0).float(), vectors.float()


def _ritz(gram: Tensor, block: Tensor, count: int) -> _Ritz:
    """Return the pairs of a subspace, and how good the wanted ones are.

    The angle is bounded by the residual over the gap to what lies outside the subspace; what
    rounding makes of it is bounded likewise.
    """
    block, independent = orthonormal(block)
    image = block @ gram
    # What has left the range of float32 becomes zero, which counts as not found.
    inner = torch.nan_to_num(image @ block.mT, nan=0.0, posinf=0.0, neginf=0.0)
    values, rotation = _eigenpairs(inner.double())
    vectors, image = rotation @ block, rotation @ image
    difference = torch.addcmul(image, rearrange(values, "b p -> b p 1"), vectors, value=-1)
    residual = torch.linalg.vector_norm(difference, dim=-1)
    gap = (values[:, :count] - _edge(values)).clamp_min(TINY)
    angle = residual[:, :count] / gap
    resolved = TOLERANCE * gap[:, -1:] > ROUNDING * values[:, :1]
    resolved &= rearrange(independent, "b -> b 1")
    # A larger value may hide in a vector that has not converged, at most its residual above it.
    most = (values + residual)[:, count:].amax(dim=1, keepdim=True)
    hidden = most > values[:, count - 1 : count]
    angle = torch.where(hidden, 1, angle)
    within = (angle <= TOLERANCE).all(dim=1, keepdim=True)
    found, worth_more = within & resolved, ~within & resolved
    return _Ritz(values, vectors, image, angle, found[:, 0], worth_more[:, 0])


def _edge(values: Tensor) -> Tensor:
    """Return the least value of the subspace, or what rounding makes of a smaller one, ``b 1``."""
    return torch.maximum(values[:, -1:], 16 * ROUNDING * values[:, :1]).clamp_min(TINY)


def _growth(ratio: Tensor) -> Tensor:
    """Return by how much a degree more lets T_m(2 ratio - 1) grow, natural logarithm."""
    return torch.acosh((2 * ratio - 1).clamp_min(1)).clamp_min(1e-3)


def _filter(gram: Tensor, ritz: _Ritz) -> Tensor:
    """Amplify in the subspace what lies above its edge, enough for the angles to vanish."""
    values, vectors, image, angle, *_ = ritz
    edge = _edge(values)
    growth = _growth(values / edge)
    needed = torch.log((angle * MARGIN / TOLERANCE).clamp_min(1)) / growth[:, : angle.shape[1]]
    needed = torch.where(rearrange(ritz.worth_more, "b -> b 1"), needed, 0)
    most = (LOG_RANGE / growth.max()).floor()
    degree = int(torch.minimum(needed.max().ceil(), most).clamp(1, DEGREE))
    dominates = rearrange(values, "b q -> b 1 q") > DOMINATES * rearrange(values, "b p -> b p 1")
    # Half of the growth to come is taken off, so that neither end leaves the range of float32.
    scale = torch.exp(growth * (-degree / 2)).unsqueeze(-1)
    rows, image = vectors * scale, image * scale
    if not bool(dominates.any()):
        return _chebyshev(gram, rows, image, edge, degree)[0]
    dominates = dominates.to(gram.dtype)

    def cleared(rows: Tensor) -> Tensor:
        return torch.baddbmm(rows, (rows @ vectors.mT) * dominates, vectors, alpha=-1)

    return cleared(_chebyshev(gram, rows, image, edge, degree, cleared)[0])


def _chebyshev(
    gram: Tensor,
    rows: Tensor,
    image: Tensor,
    edge: Tensor,
    degree: int,
    cleared: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> tuple[Tensor, Tensor]:
    """Return T_m(2 G/edge - 1) of the rows, ``b p s``, for m the degree and the one before.

    G is the Gram matrix, ``image`` the rows times it. T_m is at most one below the edge and grows
    like ρ^m above, with ρ = x + √(x² - 1). Vectors of far larger values would grow in a row out of
    rounding errors, and must be cleared from it.
    """
    slope = rearrange(2 / edge, "b 1 -> b 1 1")
    before, rows = rows.clone(), torch.addcmul(-rows, image, slope)
    twice = gram * (2 * slope)  # 2 x, with x = 2 G/edge - 1
    twice.diagonal(dim1=-2, dim2=-1).sub_(2)
    for m in range(2, degree + 1):  # T_m = 2 x T_m-1 - T_m-2, in the place of T_m-2
        rows, before = before.baddbmm_(rows, twice, beta=-1), rows
        if m % 2 == 0:
            rows = cleared(rows)
    return rows, before
