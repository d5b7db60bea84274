"""Top right singular vectors of many maps at once, by subspace iteration in float32.

A whole decomposition costs ten times the Gram matrix. A few leading vectors cost a fraction of it:
a Chebyshev filter amplifies what lies above the smallest value of a subspace (Zhou & Saad 2007), a
Rayleigh-Ritz step sorts the result, and both are thin matrix products. Only the CPU, whose numbers
can be looked at for free, stops early. Maps whose Gram matrices have one size go together.

Axes: ``b`` sample of a map, ``n`` sample of all maps of a size, ``s`` and ``l`` shorter and longer
side of a map, ``k`` wanted vector, ``p`` vector of the subspace, a row of length s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

__all__ = ["fast_gradient", "fast_vectors"]

EXTRA = 4  # vectors beside the wanted ones: their gap to the rest is what convergence lives on
DIRECT = 16  # a Gram matrix up to this size, or 3 p, is decomposed whole: that is as fast
DEGREE = 10  # of a filter
FILTERS, FILTERS_CPU = 2, 5  # all converge on trained VGG and WRN maps with two
TOLERANCE = 3e-4  # radian, angle left to the leading subspace; a gradient errs by 2.5 times that
ROUNDING = 6e-8  # norm of the rounding errors of a Gram matrix relative to its own, about eps/2
CLOSE = 1e-3  # relative gap of eigenvalues below which the derivative wants float64
SMALLEST, LARGEST = 1e-12, 1e15  # of a Gram matrix's diagonal: float32 holds squares of errors
LOG_RANGE = 80.0  # of the growth in a filter, natural logarithm; float32 ends at 88
DOMINATES = 4.0  # ratio of eigenvalues from which the larger one is kept out of a filtered vector
CLEAR_EVERY = 3  # degrees after which it is taken out again: it grows from rounding errors
STEEP = 32.0  # ratio of eigenvalues from which the map itself is asked for the smaller one
RIDGE = 1e-14  # relative, on the diagonal of a float64 Gram matrix: dependent rows stay finite
SWEEPS = 5  # of Jacobi rotations
TINY = torch.finfo(torch.float32).tiny  # stands in for zero under a fraction


def fast_vectors(
    maps: list[Tensor], counts: list[int], capturable: bool
) -> list[tuple[Tensor, ...]]:
    """Return for each map the first five entries of `graph_kd._svd.TopVectors`."""
    kept = max(counts) + EXTRA
    least, direct = (kept, kept) if capturable else (DIRECT, max(DIRECT, 3 * kept))
    matrices = [rows.float() for rows in maps]
    sides = [m.mT if m.shape[1] >= m.shape[2] else m for m in matrices]
    grams = [side @ side.mT for side in sides]
    sizes = [max(least, side.shape[1]) for side in sides]
    groups = [[i for i, s in enumerate(sizes) if s == size] for size in sorted(set(sizes))]
    searches = [
        _search(
            [sides[i] for i in group],
            _stack([grams[i] for i in group], sizes[group[0]]),
            _last(tuple((len(maps[i]), counts[i]) for i in group), maps[0].device),
            sizes[group[0]] if sizes[group[0]] <= direct else kept,
        )
        for group in groups
    ]
    results: list[tuple[Tensor, ...]] = [()] * len(maps)
    eigh = _jacobi if capturable else torch.linalg.eigh
    for group, found in zip(groups, _together(searches, eigh), strict=True):
        parts = (torch.split(tensor, [len(maps[i]) for i in group]) for tensor in found)
        for i, vectors, null, values, doubtful in zip(group, *parts, strict=True):
            k, matrix = counts[i], matrices[i]
            right = vectors[:, :k, : sides[i].shape[1]]
            if matrix.shape[1] < matrix.shape[2]:
                right = torch.nn.functional.normalize(right @ matrix, dim=-1)  # Mᵀu = σv
            along = right @ rearrange(matrix.sum(dim=1), "b c -> b c 1")
            right = right * torch.copysign(torch.ones_like(along), along)
            results[i] = (right, null[:, :k].clone(), values[:, :k].clone(), grams[i], doubtful)
    return results


def fast_gradient(
    rows: Tensor,
    index: Tensor,
    chosen: Tensor,
    values: Tensor,
    gram: Tensor,
    grad: Tensor,
    *,
    bounded: bool,
) -> Tensor:
    """Pull the gradient of chosen vectors ``b k c`` back to the maps, ``b n c`` in their dtype.

    d<v, g> = <w, dG v> with dG = dMᵀ M + Mᵀ dM and (λ - G) w = g on the complement of v. Along the
    eigenvector x the system is made regular by λ x xᵀ. ``bounded`` takes from w what only a gap
    below `CLOSE` could have made.
    """
    # Alignment uses one of k vectors, and the CPU can look which.
    if rows.device.type == "cpu" and len(rows) and grad.shape[1] > 1:
        used = grad.any(dim=-1)
        order = used.byte().topk(max(1, int(used.sum(dim=1).amax())), dim=1).indices
        index, at = index.gather(1, order), repeat(order, "b k -> b k c", c=grad.shape[2])
        chosen, grad = chosen.gather(1, at), grad.gather(1, at)
    matrix = rows.float()
    tall = matrix.shape[1] >= matrix.shape[2]
    value = rearrange(values.gather(1, index), "b k -> b k 1")
    grad = torch.addcmul(grad, (grad * chosen).sum(dim=-1, keepdim=True), chosen, value=-1)
    if tall:
        system = _system(gram, chosen * value.sqrt(), value)
        w = _solve(system, grad)
        left_w, left = (torch.cat([w, chosen], dim=1) @ matrix.mT).chunk(2, dim=1)
    else:  # (λ - MᵀM)⁻¹ = (1 + Mᵀ (λ - M Mᵀ)⁻¹ M) / λ, and M v = √λ x
        right, left = (torch.cat([grad, chosen], dim=1) @ matrix.mT).chunk(2, dim=1)
        w = _solve(_system(gram, left, value), right)
        w, left_w = (grad + w @ matrix) / value, (right + w @ gram) / value
    if bounded:
        most = torch.linalg.vector_norm(grad, dim=-1, keepdim=True) / (CLOSE * value)
        factor = (most / torch.linalg.vector_norm(w, dim=-1, keepdim=True)).clamp_max(1)
        w, left_w = torch.nan_to_num(w * factor), torch.nan_to_num(left_w * factor)
    first, second = torch.cat([left_w, left], dim=1), torch.cat([chosen, w], dim=1)
    # Laid out as the map is.
    grad_rows = first.mT @ second if rows.stride(-1) == 1 else (second.mT @ first).mT
    gradient: Tensor = grad_rows.to(rows.dtype)
    return gradient


def _system(gram: Tensor, x: Tensor, value: Tensor) -> Tensor:
    """Return λ - G + x xᵀ for each vector, ``b k s s``."""
    system = rearrange(x, "b k s -> b k s 1") * rearrange(x, "b k s -> b k 1 s")
    system = system - rearrange(gram, "b s r -> b 1 s r")
    system.diagonal(dim1=-2, dim2=-1).add_(value)
    return system


def _solve(system: Tensor, right: Tensor) -> Tensor:
    solution: Tensor = torch.linalg.solve_ex(system, right.unsqueeze(-1))[0]
    return solution.squeeze(-1)


class _Ritz(NamedTuple):
    """Hold the eigenpairs in a subspace: values ``n p``, vectors and their images ``n p s``."""

    values: Tensor
    vectors: Tensor
    images: Tensor


Search = Generator[Tensor, list[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
Step = Generator[Tensor, list[Tensor], _Ritz]


def _together(searches: list[Search], eigh: Callable[..., Any]) -> list[Any]:
    """Run searches side by side: small matrices of one size are decomposed by one call."""
    results: list[Any] = [None] * len(searches)
    asked = {i: next(search) for i, search in enumerate(searches)}
    while asked:
        size = min(matrix.shape[-1] for matrix in asked.values())
        some = {i: m for i, m in asked.items() if m.shape[-1] == size}
        pairs = eigh(torch.cat([*some.values()]))
        lengths = [len(m) for m in some.values()]
        for i, *answer in zip(some, *(torch.split(t, lengths) for t in pairs), strict=True):
            try:
                asked[i] = searches[i].send(answer)
            except StopIteration as end:  # noqa: PERF203 # that is how a generator returns
                results[i] = end.value
                del asked[i]
    return results


def _search(sides: list[Tensor], gram: Tensor, last: Tensor, kept: int) -> Search:
    """Find the ``kept`` leading eigenvectors, of which those up to ``last``, ``n 1``, are wanted.

    Return vectors, which are null, values, and which samples float32 is not accurate for, ``n``.
    """
    peak = gram.diagonal(dim1=-2, dim2=-1).amax(dim=-1)
    outside = ~((peak >= SMALLEST) & (peak <= LARGEST))  # NaN is outside too
    identity = torch.eye(gram.shape[-1], device=gram.device)
    on_cpu = gram.device.type == "cpu"
    if not on_cpu or bool(outside.any()):
        gram = torch.where(rearrange(outside, "n -> n 1 1"), identity, gram)
    if kept == gram.shape[-1]:
        ritz = yield from _ritz(gram, identity.expand_as(gram), None if on_cpu else sides)
    else:
        block = _start(kept, gram.shape[-1], gram.device) @ gram @ gram
        ritz = yield from _ritz(gram, _orthonormal(block))
        filters = FILTERS_CPU if on_cpu else FILTERS
        for i in range(filters):
            if on_cpu and bool(_converged(ritz, last).all()):
                break
            precise = not on_cpu and i == filters - 1
            block = _orthonormal(_filter(gram, ritz))
            ritz = yield from _ritz(gram, block, sides if precise else None)
    converged = _converged(ritz, last)
    if on_cpu and bool((ritz.values[:, :1] > STEEP * ritz.values.gather(1, last)).any()):
        ritz = yield from _ritz(gram, ritz.vectors, sides)
    close = ritz.values[:, 1:] >= (1 - CLOSE) * ritz.values[:, :-1]
    close &= torch.arange(kept - 1, device=last.device) <= last
    doubtful = outside | close.any(dim=1) | ~converged
    return ritz.vectors, ritz.values <= ROUNDING * ritz.values[:, :1], ritz.values, doubtful


def _ritz(gram: Tensor, rows: Tensor, sides: list[Tensor] | None = None) -> Step:
    """Return the eigenpairs in the span of orthonormal rows.

    Given the maps it takes their own products in float64: a value far below the largest is lost in
    a Gram matrix in float32.
    """
    images = rows @ gram
    if sides is None:
        inner = images.double() @ rows.double().mT
    else:
        parts = zip(torch.split(rows, [len(side) for side in sides]), sides, strict=True)
        wide = [(part[..., : side.shape[1]] @ side).double() for part, side in parts]
        inner = torch.cat([x @ x.mT for x in wide])
    # What has left the range of float32 becomes zero, which does not count as converged.
    values, basis = yield torch.nan_to_num(inner, nan=0.0, posinf=0.0, neginf=0.0)
    rotation = basis.flip(-1).mT.float()
    return _Ritz(values.flip(-1).clamp_min(0).float(), rotation @ rows, rotation @ images)


def _converged(ritz: _Ritz, last: Tensor) -> Tensor:
    """Say for which samples all wanted vectors lie in the leading subspace, to `TOLERANCE`, ``n``.

    The angle is bounded by the residual over the gap to what lies outside the subspace; what
    rounding makes of it is bounded likewise.
    """
    values, vectors, images = ritz
    least = values.gather(1, last)
    if vectors.shape[1] == vectors.shape[2]:  # nothing lies outside
        whole: Tensor = TOLERANCE * least > ROUNDING * values[:, :1]
        return whole[:, 0]
    residual = torch.addcmul(images, rearrange(values, "n p -> n p 1"), vectors, value=-1)
    residual = torch.linalg.vector_norm(residual, dim=-1)
    gap = (values - _edge(values)).clamp_min(TINY)
    wanted = torch.arange(values.shape[1], device=last.device) <= last
    within = ~wanted | (residual <= TOLERANCE * gap)
    within &= TOLERANCE * gap.gather(1, last) > ROUNDING * values[:, :1]
    # A larger value may hide in a vector that has not converged, at most its residual above it.
    found: Tensor = within & (wanted | (values + residual <= least))
    return found.all(dim=1)


def _edge(values: Tensor) -> Tensor:
    """Return the least value of the subspace, or what rounding makes of a smaller one, ``n 1``."""
    edge: Tensor = torch.maximum(values[:, -1:], 16 * ROUNDING * values[:, :1]).clamp_min(TINY)
    return edge


def _filter(gram: Tensor, ritz: _Ritz) -> Tensor:
    """Return the vectors times T_m(2 G/edge - 1), m the degree, ``n p s``.

    T_m is at most one below the edge and grows like exp(m acosh(x)) above. Half of that is taken
    off before, so that neither end leaves the range of float32. On the CPU a steep sample lowers
    the degree, elsewhere it takes a higher edge, and may want float64.
    """
    values, vectors, images = ritz
    edge, degree = _edge(values), DEGREE
    if values.device.type == "cpu":
        most = torch.acosh((2 * values[:, 0] / edge[:, 0] - 1).clamp_min(1)).max()
        degree = max(1, min(DEGREE, int(LOG_RANGE / most.clamp_min(1))))
    edge = torch.maximum(edge, values[:, :1] / math.cosh(LOG_RANGE / degree / 2) ** 2)
    growth = torch.acosh((2 * values / edge - 1).clamp_min(1))
    scale = torch.exp(growth * (-degree / 2)).unsqueeze(-1)
    ratio = rearrange(values, "n q -> n 1 q") > DOMINATES * rearrange(values, "n p -> n p 1")
    dominates, slope = ratio.float(), rearrange(2 / edge, "n 1 -> n 1 1")
    before = vectors * scale
    rows = torch.addcmul(-before, images * scale, slope)
    twice = gram * (2 * slope)  # 2 x, with x = 2 G/edge - 1
    twice.diagonal(dim1=-2, dim2=-1).sub_(2)
    for m in range(2, degree + 1):  # T_m = 2 x T_m-1 - T_m-2, in the place of T_m-2
        rows, before = before.baddbmm_(rows, twice, beta=-1), rows
        if m % CLEAR_EVERY == 0:
            rows = torch.baddbmm(rows, (rows @ vectors.mT) * dominates, vectors, alpha=-1)
    return rows


def _stack(grams: list[Tensor], size: int) -> Tensor:
    """Put Gram matrices together, padded to a size by zeros."""
    more = [size - gram.shape[-1] for gram in grams]
    pad = torch.nn.functional.pad
    return torch.cat([pad(g, (0, m, 0, m)) if m else g for g, m in zip(grams, more, strict=True)])


@lru_cache(maxsize=64)
def _last(batches: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return the index of the last wanted vector of each sample, ``n 1``."""
    return torch.cat([torch.full((b, 1), k - 1) for b, k in batches]).to(device)


@cache
def _start(kept: int, size: int, device: torch.device) -> Tensor:
    """Return vectors that no Gram matrix is orthogonal to, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(kept, size, generator=generator).to(device)


def _orthonormal(block: Tensor) -> Tensor:
    """Orthonormalise rows by their Cholesky factor, in float64: a filter leaves them dependent."""
    rows = block.double()
    gram = rows @ rows.mT
    ridge = torch.diag_embed(RIDGE * gram.diagonal(dim1=-2, dim2=-1) + TINY)
    factor, _ = torch.linalg.cholesky_ex(gram + ridge)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # To invert the small factor is faster than to solve for the long rows.
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    orthonormal: Tensor = (inverse @ rows).float()
    return orthonormal


def _jacobi(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `torch.linalg.eigh` does, to small matrices ``n p p``, without asking the host.

    A fixed number of sweeps of rotations of disjoint pairs (Brent & Luk 1985).
    """
    size = matrix.shape[-1]
    odd = size % 2
    matrix = torch.nn.functional.pad(matrix, (0, odd, 0, odd))
    turns = _turns((size + odd) // 2, matrix.dtype, matrix.device)
    basis = torch.eye(size + odd, dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    for _ in range(SWEEPS * (size + odd - 1)):
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        coupling = matrix.diagonal(offset=1, dim1=-2, dim2=-1)[:, 0::2]
        tangent = 2 * coupling / (diagonal[:, 0::2] - diagonal[:, 1::2])
        angle = torch.nan_to_num(tangent.atan()) / 2  # 0/0 needs no rotation
        rotation = torch.cat([angle.cos(), angle.sin()], dim=1) @ turns
        rotation = rearrange(rotation, "n (p q) -> n p q", p=size + odd)
        matrix, basis = rotation.mT @ matrix @ rotation, basis @ rotation
    values, order = matrix.diagonal(dim1=-2, dim2=-1).sort(dim=-1)
    order = rearrange(order, "n p -> n 1 p").expand(-1, size + odd, -1)
    return values[:, odd:], basis.gather(2, order)[:, :size, odd:]


@cache
def _turns(half: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what makes rotations of cosines and sines, and moves all but one index on a ring."""
    size = 2 * half
    ring = [*range(2, size, 2), *range(size - 1, 0, -2)]
    to = {0: 0, **dict(zip(ring, ring[1:] + ring[:1], strict=True))}  # so that each meets each
    turns = torch.zeros(2, half, size, size, dtype=dtype)
    for pair in range(half):
        p, q = 2 * pair, 2 * pair + 1
        turns[0, pair, p, to[p]] = turns[0, pair, q, to[q]] = 1
        turns[1, pair, q, to[p]], turns[1, pair, p, to[q]] = 1, -1
    return rearrange(turns, "t h p q -> (t h) (p q)").to(device)
