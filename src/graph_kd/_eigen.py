"""Leading singular pairs, and systems shifted by them: what `SVDFeature` is made of in float32.

A whole decomposition costs ten times the Gram matrix; a few leading vectors cost a fraction of it:
subspace iteration with a Chebyshev filter (Zhou & Saad 2007) forward, conjugate gradients with the
same subspace as their preconditioner backward. Both are thin matrix products.

Axes: ``b`` sample, ``s`` and ``l`` shorter and longer side of a matrix, ``i`` wanted pair, ``p``
vector of the subspace, the wanted ones first. Vectors are rows.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

__all__ = ["LeadingPairs", "leading_pairs", "solve_shifted", "subspace_size"]

EXTRA = 4  # vectors beside the wanted ones: their gap to the rest is what convergence lives on
DIRECT = 16  # a Gram matrix up to this size, or 3 p, is decomposed whole: that is as fast
TOLERANCE = 4e-4  # angle left between a wanted vector and the leading subspace, radian
MARGIN = 10.0  # by which a filter aims below the tolerance
ROUNDING = 6e-8  # norm of the rounding errors of a Gram matrix relative to its own, about eps/2
ROUNDS = 5  # filters at most
DEGREE = 24  # of a filter at most
LOG_RANGE = 120.0  # of the growth in a filter, natural logarithm; float32 ends at ±87
DOMINATES = 4.0  # ratio of eigenvalues from which the larger one is kept out of a filtered vector
ITERATIONS = 48  # of the conjugate gradients at most
RESIDUAL = 1e-4  # of the conjugate gradients, relative


class LeadingPairs(NamedTuple):
    """Hold leading singular pairs of matrices A.

    Shape:
        - values: ``b p``, squared singular values, largest first
        - vectors: ``b p s``, orthonormal, on the shorter side
        - images: ``b i l``, Aᵀ u of the wanted vectors: orthogonal, of length σ
        - found: ``b``, whether the wanted vectors lie in the leading subspace, to `TOLERANCE`
    """

    values: Tensor
    vectors: Tensor
    images: Tensor
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
        # The largest value is as accurate in float32, smaller ones are not.
        values, vectors = _eigenpairs(gram if count == 1 else _gram_in_float64(matrix))
        found = values[:, count - 1] > TOLERANCE**2 * values[:, 0]
        return LeadingPairs(values, vectors, vectors[:, :count] @ matrix, found)

    block = repeat(_start(kept, size).to(gram), "p s -> b p s", b=len(gram))
    block = _orthonormal(block @ gram @ gram)
    if count == 1:  # mostly stands out so far that two more powers find it
        block = block @ gram @ gram
    else:
        values, rotation = _eigenpairs((block @ gram @ block.mT).double())
        vectors = rotation @ block
        angle, _ = _angles(values, vectors, gram, count)
        block = _filter(gram, values, vectors, angle)
    pairs, angle, worth_more = _rayleigh_ritz(matrix, gram, block, count)
    for _ in range(ROUNDS - 1):
        if not bool(worth_more.any()):
            break
        # The few samples that lag go on alone.
        lagging = worth_more.nonzero()[:, 0]
        part, part_gram = matrix[lagging], gram[lagging]
        block = _filter(part_gram, pairs.values[lagging], pairs.vectors[lagging], angle[lagging])
        again, angle[lagging], worth_more[lagging] = _rayleigh_ritz(part, part_gram, block, count)
        for whole, mended in zip(pairs, again, strict=True):
            whole[lagging] = mended
    return pairs


def solve_shifted(
    gram: Tensor, values: Tensor, vectors: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve (λ_i - G) w_i = r_i on the complement of the wanted vectors, eigenvectors of G.

    There λ_i - G is positive definite. Conjugate gradients, preconditioned by what the other
    vectors of the subspace know of it.

    Shape:
        - gram: ``b s s``
        - values: ``b p``, eigenvalues, largest first
        - vectors: ``b p s``, orthonormal; the first i are eigenvectors, the others nearly so
        - right: ``b i s``; its part along the wanted eigenvectors is ignored
        - returns: w ``b i s``; and whether the residual fell to `RESIDUAL`, ``b``
    """
    count = right.shape[1]
    value_i = rearrange(values[:, :count], "b i -> b i 1")
    ratio = rearrange(values, "b p -> b 1 p") / value_i
    wanted = torch.arange(values.shape[1], device=values.device) < count
    if values.shape[1] == gram.shape[-1]:  # all eigenpairs are known
        shifted = torch.where(wanted, 1, value_i * (1 - ratio))
        solution = ((right @ vectors.mT) * torch.where(wanted, 0, 1 / shifted)) @ vectors
        return solution, torch.ones_like(values[:, 0], dtype=torch.bool)
    # (1 - G/λ_i)⁻¹ - 1 on the subspace, and -1 on what is projected out.
    excess = torch.where(wanted, -1, 1 / torch.where(wanted, 1, 1 - ratio) - 1)

    def precondition(rows: Tensor) -> Tensor:
        return torch.baddbmm(rows, (rows @ vectors.mT) * excess, vectors)

    scale = torch.linalg.vector_norm(right, dim=-1, keepdim=True)
    residual = right / torch.where(scale > 0, scale, 1)
    known = vectors[:, :count]
    residual = torch.baddbmm(residual, residual @ known.mT, known, alpha=-1)
    solution = torch.zeros_like(residual)
    direction = precondition(residual)
    energy = _dot(residual, direction)
    # What rounding leaves of a right side that was all along the wanted vectors counts as zero.
    small = RESIDUAL**2 * energy + torch.finfo(gram.dtype).eps ** 2
    for _ in range(ITERATIONS):
        unsolved = energy > small
        if not bool(unsolved.any()):
            break
        image = torch.baddbmm(direction, direction / value_i, gram, alpha=-1)
        curvature = _dot(direction, image)
        step = torch.where(unsolved & (curvature > 0), energy / curvature, 0)
        solution = torch.addcmul(solution, step, direction)
        residual = torch.addcmul(residual, step, image, value=-1)
        conditioned = precondition(residual)
        before, energy = energy, _dot(residual, conditioned)
        turn = torch.where(unsolved, energy / before, 0)
        direction = torch.addcmul(conditioned, turn, direction)
    solved = rearrange((energy <= small).all(dim=1), "b 1 -> b")
    return solution * (scale / value_i), solved


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(dim=-1, keepdim=True)


@cache
def _start(count: int, size: int) -> Tensor:
    """Return vectors that no Gram matrix is orthogonal to, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, size, generator=generator)


def _gram_in_float64(rows: Tensor) -> Tensor:
    wide = rows.double()
    return wide @ wide.mT


def _orthonormal(rows: Tensor) -> Tensor:
    """Orthonormalise ``b p s`` by a Cholesky factor of their Gram matrix."""
    wide = rows.double()
    wide = wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-300)
    gram = wide @ wide.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(1e-13)  # of dependent rows a factor exists too
    factor, _ = torch.linalg.cholesky_ex(gram)
    orthonormal: Tensor = torch.linalg.solve_triangular(factor, wide, upper=False)
    return orthonormal.to(rows.dtype)


def _eigenpairs(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, largest first, and eigenvectors in rows, in float32."""
    values, basis = torch.linalg.eigh(gram)
    vectors = rearrange(basis.flip(-1), "b q p -> b p q")
    return values.flip(-1).clamp_min(0).float(), vectors.float()


def _rayleigh_ritz(
    matrix: Tensor, gram: Tensor, block: Tensor, count: int
) -> tuple[LeadingPairs, Tensor, Tensor]:
    """Return the pairs of a subspace, their angles, and whether a filter would improve them."""
    block = _orthonormal(block)
    if count == 1:  # the Gram matrix is as accurate for the largest value
        values, rotation = _eigenpairs((block @ gram @ block.mT).double())
        vectors = rotation @ block
        images = vectors[:, :1] @ matrix
    else:  # on the matrix itself small values are as accurate as in a whole decomposition
        images = block @ matrix
        values, rotation = _eigenpairs(_gram_in_float64(images))
        vectors, images = rotation @ block, rotation[:, :count] @ images
    angle, noise = _angles(values, vectors, gram, count)
    found = (torch.maximum(angle, noise) <= TOLERANCE).all(dim=1)
    worth_more = ~found & (noise <= TOLERANCE).all(dim=1)
    return LeadingPairs(values, vectors, images, found), angle, worth_more


def _angles(values: Tensor, vectors: Tensor, gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Bound the angles between wanted vectors and the leading subspace, ``b i``.

    By the residual over the gap to what lies outside the subspace; and the same of rounding errors.
    """
    wanted = vectors[:, :count]
    value = rearrange(values[:, :count], "b i -> b i 1")
    residual = torch.linalg.vector_norm(wanted @ gram - value * wanted, dim=-1)
    noise = ROUNDING * values[:, :1]
    gap = values[:, :count] - _edge(values)
    gap = torch.where(gap > 0, gap, 0)
    return residual / gap, noise / gap


def _edge(values: Tensor) -> Tensor:
    """Return the least value of the subspace, or what rounding makes of a smaller one, ``b 1``."""
    return torch.maximum(values[:, -1:], 16 * ROUNDING * values[:, :1])


def _filter(gram: Tensor, values: Tensor, vectors: Tensor, angle: Tensor) -> Tensor:
    """Amplify in the subspace what lies above its edge by a Chebyshev polynomial of ``gram``.

    T_m(2 G/edge - 1) is at most one below the edge and grows like ρ^m above, ρ = x + √(x² - 1).
    Vectors of far larger values would grow in a row out of rounding errors, and are projected out.
    """
    edge = _edge(values)
    point = (2 * values / edge - 1).clamp_min(1)
    growth = torch.log(point + (point.square() - 1).sqrt()).clamp_min(1e-3)
    needed = torch.log((angle * MARGIN / TOLERANCE).clamp_min(1)) / growth[:, : angle.shape[1]]
    degree = min(float(needed.max()), float(LOG_RANGE / growth.max()), DEGREE)
    degree = max(1, math.ceil(degree))
    dominates = rearrange(values, "b q -> b 1 q") > DOMINATES * rearrange(values, "b p -> b p 1")
    some_dominate, dominates = bool(dominates.any()), dominates.to(gram.dtype)

    slope = rearrange(2 / edge, "b 1 -> b 1 1")
    # Half of the growth to come is taken off, so that neither end leaves the range of float32.
    before = vectors * torch.exp(growth * (-degree / 2)).unsqueeze(-1)
    rows = torch.baddbmm(before, before * slope, gram, beta=-1)
    slope = 2 * slope
    for m in range(1, degree + 1):
        if some_dominate and (m % 2 == 0 or m == degree):
            rows = torch.baddbmm(rows, (rows @ vectors.mT) * dominates, vectors, alpha=-1)
        if m < degree:  # T_m+1 = 2 x T_m - T_m-1
            rest = torch.add(before, rows, alpha=2)
            rows, before = torch.baddbmm(rest, rows * slope, gram, beta=-1), rows
    return rows
