"""Top right singular vectors of many maps at once, by subspace iteration in float32.

A whole decomposition costs ten times the Gram matrix; a few leading vectors cost a fraction of it.
A Chebyshev filter amplifies the vectors whose eigenvalues lie above the smallest one of a subspace
(Zhou & Saad 2007). A Rayleigh-Ritz step finds the eigenvectors within the subspace. Both are thin
matrix products.

There are two forms. On the CPU the host can read numbers at no cost: each map is solved alone and
filtered as often as it needs. Elsewhere, and where ``capturable``, the number of filters is fixed,
and maps whose Gram matrices have one size are solved together.

Axes: ``b`` sample of a map, ``n`` sample of all maps of a size, ``s`` and ``l`` shorter and longer
side of a map, ``k`` wanted vector, ``p`` vector of the subspace, a row of length s.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Generator
from functools import cache
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from graph_kd._svd_exact import are_null

__all__ = ["fast_gradient", "fast_vectors"]

# Vectors beside the wanted ones: the gap to the last one decides the convergence. With two, 95 % of
# maps with gaps of 1.5 % take the exact path in the fixed form; with four 7 %.
EXTRA = 4
DIRECT = 16  # rows of the largest Gram matrix that is decomposed whole: that is as fast
DEGREE, MOST = 10, 24  # of a filter: of the fixed form, and at most on the CPU
FILTERS, FILTERS_CPU = 2, 5  # of the fixed form, and at most on the CPU after the first one
TOLERANCE = 3e-4  # radian, angle to the leading subspace; a gradient's error is 2.5 times that
LOST = 1e-2  # radian; beyond, a vector is as arbitrary as one of value zero
ROUNDING = 6e-8  # norm of the rounding errors of a Gram matrix relative to its own, about eps/2
# Gaps of eigenvalues below which the derivative needs float64, relative to the larger one and to
# the largest of all: its error is the rounding errors of the Gram matrix over the gap.
CLOSE, CLOSE_OF_LARGEST = 1e-3, 3e-5
SMALLEST, LARGEST = 1e-12, 1e15  # of a Gram diagonal: its rounding errors squared fit float32
LOG_RANGE = 80.0  # of the growth in a filter, natural logarithm; float32 ends at 88
LOG_SPREAD = 15.0  # of the growth in the first filter: below 16, rows stay independent
# Ratio of eigenvalues above which the larger vector is projected out. Without that, 3 % of the maps
# of a trained VGG take the exact path in the fixed form, and all with one value ten times the next.
DOMINATES = 4.0
CLEAR_EVERY = 3  # degrees between two such projections: it grows from rounding errors
# Ratio of eigenvalues above which the smaller one is computed from the map itself. Without that,
# the error of its gradient is 2 to 4 times as large.
STEEP = 32.0
RIDGE = 1e-14  # relative, added to the diagonal: a Cholesky factor of dependent rows is finite
TINY = 1e-38  # least norm of a row; filtered rows of maps with few live channels can be zero


def fast_vectors(
    maps: list[Tensor], counts: list[int], capturable: bool
) -> list[tuple[Tensor, ...]]:
    """Return for each map the first five entries of `graph_kd._svd.TopVectors`."""
    fixed = capturable or maps[0].device.type != "cpu"
    if not fixed and len(maps) > 1:
        return [fast_vectors([m], [k], False)[0] for m, k in zip(maps, counts, strict=True)]
    kept = max(counts) + EXTRA
    kept += fixed and kept % 2  # Jacobi's rotations are of pairs
    direct = kept if capturable else max(DIRECT, kept)
    matrices = [rows.float() for rows in maps]
    sides = [m.mT if m.shape[1] >= m.shape[2] else m for m in matrices]
    grams = [side @ side.mT for side in sides]
    groups = defaultdict(list)
    for i, side in enumerate(sides):
        groups[max(direct, side.shape[1]) if fixed else side.shape[1]].append(i)
    searches = [
        _search(
            [sides[i] for i in group],
            _stack([grams[i] for i in group], size),
            _last(tuple((len(maps[i]), counts[i]) for i in group), maps[0].device),
            kept if size > direct else size,
            fixed,
        )
        for size, group in groups.items()
    ]
    results: list[tuple[Tensor, ...]] = [()] * len(maps)
    found = _together(searches, _jacobi if capturable else torch.linalg.eigh)
    for group, answer in zip(groups.values(), found, strict=True):
        parts = (torch.split(tensor, [len(maps[i]) for i in group]) for tensor in answer)
        for i, vectors, values, null, doubtful in zip(group, *parts, strict=True):
            k, matrix = counts[i], matrices[i]
            right = vectors[:, :k, : sides[i].shape[1]]
            length = torch.ones_like(values[:, :k])
            if matrix.shape[1] < matrix.shape[2]:
                right = right @ matrix  # Mᵀu = σv
                length = torch.linalg.vector_norm(right, dim=-1).clamp_min(TINY)
            along = right @ rearrange(matrix.sum(dim=1), "b c -> b c 1")
            right = right / torch.copysign(rearrange(length, "b k -> b k 1"), along)
            null, values = null[:, :k].clone(), values[:, :k].clone()
            if maps[i].dtype != torch.float32:  # half precision hides larger values
                null |= are_null(values.double(), maps[i])
            # Operators return no views, and rows of the layout that compiled graphs expect.
            own = (null, values, grams[i], doubtful.clone())
            results[i] = (right.contiguous(), *own)
    return results


def fast_gradient(
    rows: Tensor,
    index: Tensor,
    chosen: Tensor,
    values: Tensor,
    gram: Tensor,
    grad: Tensor,
    *,
    capturable: bool,
) -> Tensor:
    """Pull the gradient of chosen vectors ``b k c`` back to the maps, ``b n c`` in float32.

    d<v, g> = <w, dG v> with dG = dMᵀ M + Mᵀ dM and (λ - G) w = g on the complement of v. Along the
    eigenvector x the system is made regular by λ x xᵀ. Where ``capturable``, w is at most as long
    as a relative gap of `CLOSE` could make it.
    """
    # Alignment uses one of k vectors. The CPU can read which, and solve for these alone.
    if rows.device.type == "cpu" and len(rows) and grad.shape[1] > 1:
        used = grad.any(dim=-1)
        order = used.byte().topk(int(used.sum(dim=1).amax()), dim=1).indices
        index, at = index.gather(1, order), repeat(order, "b k -> b k c", c=grad.shape[2])
        chosen, grad = chosen.gather(1, at), grad.gather(1, at)
    matrix = rows.float()
    tall = matrix.shape[1] >= matrix.shape[2]
    value = rearrange(values.gather(1, index), "b k -> b k 1")
    grad = torch.addcmul(grad, (grad * chosen).sum(dim=-1, keepdim=True), chosen, value=-1)
    if tall:
        w = _solve(gram, value, chosen * value.sqrt(), grad, capturable)
        left_w, left = (torch.cat([w, chosen], dim=1) @ matrix.mT).chunk(2, dim=1)
    else:  # (λ - MᵀM)⁻¹ = (1 + Mᵀ (λ - M Mᵀ)⁻¹ M) / λ, and M v = √λ x
        right, left = (torch.cat([grad, chosen], dim=1) @ matrix.mT).chunk(2, dim=1)
        w = _solve(gram, value, left, right, capturable)
        w, left_w = (grad + w @ matrix) / value, (right + w @ gram) / value
    if capturable:
        most = torch.linalg.vector_norm(grad, dim=-1, keepdim=True) / (CLOSE * value)
        factor = (most / torch.linalg.vector_norm(w, dim=-1, keepdim=True)).clamp_max(1)
        w, left_w = torch.nan_to_num(w * factor), torch.nan_to_num(left_w * factor)
    first, second = torch.cat([left_w, left], dim=1), torch.cat([chosen, w], dim=1)
    # Laid out as the map is.
    grad_rows: Tensor = first.mT @ second if rows.stride(-1) == 1 else (second.mT @ first).mT
    return grad_rows


def _solve(gram: Tensor, value: Tensor, x: Tensor, right: Tensor, capturable: bool) -> Tensor:
    """Solve (λ - G + x xᵀ) w = right for each vector, ``b k s``; λ is the value, ``b k 1``."""
    system = repeat(gram, "b s r -> (b k) s r", k=x.shape[1])
    x = rearrange(x, "b k s -> (b k) s 1")
    system = torch.baddbmm(system, x, x.mT, beta=-1)
    system.diagonal(dim1=-2, dim2=-1).add_(rearrange(value, "b k 1 -> (b k) 1"))
    known = rearrange(right, "b k s -> (b k) s 1")
    solution: Tensor
    if capturable:  # normal equations in float64: an LU factorisation of many maps syncs on a GPU
        system = system.double()
        factor, _ = torch.linalg.cholesky_ex(system.mT @ system)
        known = system.mT @ known.double()
        known = torch.linalg.solve_triangular(factor, known, upper=False)
        solution = torch.linalg.solve_triangular(factor.mT, known, upper=True).float()
    else:  # symmetric: LAPACK's order of its entries spares a copy
        solution = torch.linalg.solve_ex(system.mT, known)[0]
    return solution.view_as(right)


class _Ritz(NamedTuple):
    """Hold the eigenpairs in a subspace: values ``n p``, vectors and their images ``n p s``."""

    values: Tensor
    vectors: Tensor
    images: Tensor


Search = Generator[Tensor, list[Tensor], tuple[Tensor, ...]]
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


def _search(sides: list[Tensor], gram: Tensor, last: Tensor, kept: int, fixed: bool) -> Search:
    """Find the ``kept`` leading eigenvectors, of which those up to ``last``, ``n 1``, are wanted.

    Return vectors, values, which vectors are arbitrary, ``n p``, and which samples float32 is not
    accurate for, ``n``.
    """
    peak = gram.diagonal(dim1=-2, dim2=-1).amax(dim=-1)
    outside = ~((peak >= SMALLEST) & (peak <= LARGEST))  # NaN is outside too
    if fixed or bool(outside.any()):
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        gram = torch.where(rearrange(outside, "n -> n 1 1"), identity, gram)
        peak = torch.where(outside, 1, peak)
    if kept == gram.shape[-1]:
        ritz = yield from _ritz(gram, None, sides if fixed else None)
    else:
        block = _start(kept, gram.shape[-1], gram.device) @ gram
        block = _orthonormal((block / rearrange(peak, "n -> n 1 1")) @ gram @ gram)
        if fixed:
            ritz = yield from _ritz(gram, block)
            for i in range(FILTERS):
                block = _orthonormal(_filter(gram, ritz, ritz.values[:, -1:], DEGREE))
                ritz = yield from _ritz(gram, block, sides if i == FILTERS - 1 else None)
        else:
            ritz = yield from _until_converged(gram, block, last)
    angles = _angles(ritz, last)
    if not fixed and bool((ritz.values[:, :1] > STEEP * ritz.values.gather(1, last)).any()):
        ritz = yield from _ritz(gram, ritz.vectors, sides)
    values, less = ritz.values, (1 - CLOSE) * ritz.values[:, :-1]
    close = torch.add(values[:, 1:], values[:, :1], alpha=CLOSE_OF_LARGEST) >= less
    close &= torch.arange(kept - 1, device=last.device) <= last
    doubtful = outside | close.any(dim=1) | (angles.amax(dim=1) > TOLERANCE)
    null = (ritz.values <= ROUNDING * ritz.values[:, :1]) | (angles > LOST)
    return ritz.vectors, ritz.values, null, doubtful


def _until_converged(gram: Tensor, block: Tensor, last: Tensor) -> Step:
    """Filter orthonormal rows until they have converged, each time by the degree that they need.

    On a CPU that takes a sixth less time than a fixed number of filters. The first filter comes
    without a Ritz step before it: its degree is low enough for most rows to stay independent.
    """
    images = block @ gram
    lengths = torch.linalg.vector_norm(images, dim=-1)
    lengths = lengths.sort(dim=1, descending=True).values
    # The last rows have not converged: their lengths are far below their values. So the edge comes
    # from a row before them, unless values fall fast: the smallest wanted one must stay above it.
    top, edge = lengths[:, :1], lengths[:, -1 - EXTRA // 2, None]
    edge = torch.where(top > STEEP * edge, lengths[:, -1:], edge)
    degree = int((LOG_SPREAD / _growth(top, edge)).median().clamp(2, MOST))
    block = _filter(gram, _Ritz(top.expand_as(lengths), block, images), edge, degree)
    ritz = yield from _ritz(gram, _orthonormal(block))
    for _ in range(FILTERS_CPU):
        angle = _angles(ritz, last).amax(dim=1)
        rest = ((angle > TOLERANCE) & angle.isfinite()).nonzero()[:, 0]
        if not len(rest):
            break
        # Where more than half need it, all are filtered: no Gram matrix is copied.
        some = rest if 2 * len(rest) <= len(gram) else slice(None)
        part, matrix = _Ritz(*(whole[some] for whole in ritz)), gram[some]
        edge = part.values[:, -1:]
        growth = _growth(part.values, edge)
        # Down to a tenth of the tolerance, within the range of float32.
        needed = torch.log(angle[some] * 10 / TOLERANCE) / growth.gather(1, last[some])[:, 0]
        degree = int(torch.minimum(needed.max(), LOG_RANGE / growth.max()).clamp(1, MOST))
        part = yield from _ritz(matrix, _orthonormal(_filter(matrix, part, edge, degree)))
        for whole, better in zip(ritz, part, strict=True):
            whole[some] = better
    return ritz


def _ritz(gram: Tensor, rows: Tensor | None, sides: list[Tensor] | None = None) -> Step:
    """Return the eigenpairs in the span of orthonormal rows, by default in the whole space.

    Given the maps, inner products are those of the maps in float64: a float32 Gram matrix loses a
    value far below the largest.
    """
    images = gram if rows is None else rows @ gram
    if sides is None:
        inner = gram if rows is None else (images @ rows.mT).double()
    else:
        spans = sides
        if rows is not None:
            parts = zip(torch.split(rows, [len(side) for side in sides]), sides, strict=True)
            spans = [part[..., : side.shape[1]] @ side for part, side in parts]
        inner = _stack([x @ x.mT for x in map(Tensor.double, spans)], images.shape[1])
    # eigh raises an error on what is not finite; such samples are reported later, by name.
    values, basis = yield torch.nan_to_num(inner, 0.0, 0.0, 0.0)
    rotation = basis.flip(-1).mT.float()
    values = values.flip(-1).float()
    values = torch.maximum(values, ROUNDING * values[:, :1])  # smaller is rounding
    if rows is None:
        return _Ritz(values, torch.nn.functional.normalize(rotation, dim=-1), images)
    return _Ritz(values, rotation @ rows, rotation @ images)


def _angles(ritz: _Ritz, last: Tensor) -> Tensor:
    """Bound the angle, in radian, between each wanted vector and the leading subspace, ``n p``.

    It is at most the residual over the gap to what lies outside the subspace. Where float32 does
    not resolve that gap the bound is infinite.
    """
    values, vectors, images = ritz
    whole = vectors.shape[1] == vectors.shape[2]  # nothing lies outside
    gap = values if whole else values - values[:, -1:]
    resolved = TOLERANCE * gap > ROUNDING * values[:, :1]
    wanted = torch.arange(values.shape[1], device=last.device) <= last
    if whole:
        return torch.where(resolved | ~wanted, 0.0, torch.inf)
    residual = torch.addcmul(images, rearrange(values, "n p -> n p 1"), vectors, value=-1)
    residual = torch.linalg.vector_norm(residual, dim=-1)
    # A larger value may hide in an unwanted vector, at most its residual above that one's.
    hides = values + residual > values.gather(1, last)
    return torch.where(wanted, torch.where(resolved, residual / gap, torch.inf), hides.float())


def _growth(values: Tensor, edge: Tensor) -> Tensor:
    """Return by how much a degree more lets T_m(2 value/edge - 1) grow, natural logarithm."""
    return torch.acosh((2 * values / edge - 1).clamp_min(1))


def _filter(gram: Tensor, ritz: _Ritz, edge: Tensor, degree: int) -> Tensor:
    """Return the vectors times T_m(2 G/edge - 1), m the degree, ``n p s``.

    T_m is at most one below the edge and grows like exp(m acosh(x)) above. Vectors are divided by
    the root of their growth first, so that they stay in the range of float32. Where that is not
    enough the edge is raised.
    """
    values, vectors, images = ritz
    edge = torch.maximum(edge, values[:, :1] / math.cosh(LOG_RANGE / degree / 2) ** 2)
    scale = torch.exp(_growth(values, edge) * (-degree / 2)).unsqueeze(-1)
    ratio = rearrange(values, "n q -> n 1 q") > DOMINATES * rearrange(values, "n p -> n p 1")
    dominates, slope = ratio.float(), rearrange(2 / edge, "n 1 -> n 1 1")
    before = vectors * scale
    rows = torch.addcmul(-before, images * scale, slope)
    twice = gram * (2 * slope)  # 2 x, with x = 2 G/edge - 1
    twice.diagonal(dim1=-2, dim2=-1).sub_(2)
    on_cpu = gram.device.type == "cpu"
    clear_every = MOST + 1 if on_cpu and not bool(dominates.any()) else CLEAR_EVERY
    for m in range(2, degree + 1):  # T_m = 2 x T_m-1 - T_m-2, in the place of T_m-2
        rows, before = before.baddbmm_(rows, twice, beta=-1), rows
        if m % clear_every == 0:
            rows = torch.baddbmm(rows, (rows @ vectors.mT) * dominates, vectors, alpha=-1)
    return rows


def _stack(grams: list[Tensor], size: int) -> Tensor:
    """Put Gram matrices together, padded to a size by zeros."""
    if len(grams) == 1 and grams[0].shape[-1] == size:
        return grams[0]
    more = [size - gram.shape[-1] for gram in grams]
    pad = torch.nn.functional.pad
    return torch.cat([pad(g, (0, m, 0, m)) if m else g for g, m in zip(grams, more, strict=True)])


@cache  # never dropped: a captured graph reads it again
def _last(batches: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return the index of the last wanted vector of each sample, ``n 1``."""
    return torch.cat([torch.full((b, 1), k - 1, device=device) for b, k in batches])


@cache
def _start(kept: int, size: int, device: torch.device) -> Tensor:
    """Return vectors that no Gram matrix is orthogonal to, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(kept, size, generator=generator, dtype=torch.float32).to(device)


def _orthonormal(block: Tensor) -> Tensor:
    """Orthonormalise rows by their Cholesky factor, in float64: filtered rows are near parallel."""
    rows = block.double()
    gram = rows @ rows.mT
    gram.diagonal(dim1=-2, dim2=-1).mul_(1 + RIDGE).add_(TINY**2)
    factor, _ = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # To invert the small factor is faster than to solve for the long rows.
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    orthonormal: Tensor = (inverse @ rows).float()
    return orthonormal


def _jacobi(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `torch.linalg.eigh` does, to small matrices ``n p p``, without a sync.

    A fixed number of sweeps of rotations of disjoint pairs (Brent & Luk 1985); p is even.
    """
    size = matrix.shape[-1]
    sweeps = math.ceil(2 * math.log2(size)) - 1  # by trial: enough for the steepest matrices
    turns = _turns(size, matrix.dtype, matrix.device)
    basis = torch.eye(size, dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    for _ in range(sweeps * (size - 1)):
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        coupling = matrix.diagonal(offset=1, dim1=-2, dim2=-1)[:, 0::2]
        tangent = 2 * coupling / (diagonal[:, 0::2] - diagonal[:, 1::2])
        angle = torch.nan_to_num(tangent.atan()) / 2  # 0/0 needs no rotation
        rotation = torch.cat([angle.cos(), angle.sin()], dim=1) @ turns
        rotation = rearrange(rotation, "n (p q) -> n p q", p=size)
        matrix, basis = rotation.mT @ matrix @ rotation, basis @ rotation
    values, order = matrix.diagonal(dim1=-2, dim2=-1).sort(dim=-1)
    return values, basis.gather(2, repeat(order, "n q -> n p q", p=size))


@cache
def _turns(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the tensor that makes rotations of cosines and sines, then permutes the indices.

    All but the first index move along a ring, so that each pair meets once in a sweep.
    """
    ring = [*range(2, size, 2), *range(size - 1, 0, -2)]
    to = {0: 0, **dict(zip(ring, ring[1:] + ring[:1], strict=True))}
    turns = torch.zeros(2, size // 2, size, size, dtype=dtype)
    for p in range(0, size, 2):
        turns[0, p // 2, p, to[p]] = turns[0, p // 2, p + 1, to[p + 1]] = 1
        turns[1, p // 2, p + 1, to[p]], turns[1, p // 2, p, to[p + 1]] = 1, -1
    return rearrange(turns, "t h p q -> (t h) (p q)").to(device)
