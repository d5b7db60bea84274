"""What the subspace iteration would cost, were it told the spectrum: how far it can be improved.

Between the Gram matrix and the vectors, `SVDFeature` spends its time on finding out how the
spectrum lies and on filters that this makes too long or too short. Here the exact eigenvalues are
known beforehand, and for each map the size of the subspace and the degree of the one filter that
take the least time. All else is the package's own, so this reaches into it.

Axes: ``b`` sample, ``n`` position, ``c`` channel, ``p`` vector of the subspace, ``s`` row of the
Gram matrix of the shorter side.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from einops import repeat
from parts.decompositions import gram, graph_kd
from parts.timing import paired_seconds
from torch import Tensor

from graph_kd import _eigen

__all__ = ["ToldTheSpectrum"]

SUBSPACES = (4, 8, 12)  # vectors; products of other sizes take as long as the next of these
LAGGING = 0.04  # share of samples that may take a second filter
ROUNDS = 5  # of timing, to choose by


@dataclass(frozen=True)
class Filter:
    """The one filter of a map: vectors of the subspace, edge ``b 1`` and degree."""

    kept: int
    edge: Tensor
    degree: int

    def first_block(self, gram: Tensor, kept: int, _count: int) -> Tensor:
        """Take the place of the package's own first filter."""
        start = _eigen._start(kept, gram.shape[-1], gram.device)
        start = repeat(start, "p s -> b p s", b=len(gram))
        return _eigen._chebyshev(gram, start, start @ gram, self.edge, self.degree)[0]


class ToldTheSpectrum:
    """Find vectors as the package does, with what was learnt of each map from `learn`."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], Filter | None] = {}

    def learn(self, rows_bnc: Tensor, k: int) -> None:
        """Choose subspace and degree; none where the package knows all eigenpairs anyway."""
        matrices = gram(rows_bnc)
        values = torch.linalg.eigvalsh(matrices.double()).flip(-1).float()
        found: list[Filter | None] = [None]  # the package's own
        if _eigen.subspace_size(k, matrices.shape[-1]) < matrices.shape[-1]:
            sizes = [kept for kept in SUBSPACES if kept > k]
            found += [f for kept in sizes if (f := _least(matrices, values, kept, k)) is not None]
        tasks = {str(i): partial(self._run, rows_bnc, k, f) for i, f in enumerate(found)}
        seconds = paired_seconds(tasks, ROUNDS, rows_bnc.device)
        best = min(range(len(found)), key=lambda i: statistics.median(seconds[str(i)]))
        self._known[_key(rows_bnc, k)] = found[best]

    def __call__(self, rows_bnc: Tensor, k: int) -> Tensor:
        """Return the vectors of a map that was learnt, ``b k c``."""
        return self._run(rows_bnc, k, self._known[_key(rows_bnc, k)])

    def _run(self, rows_bnc: Tensor, k: int, known: Filter | None) -> Tensor:
        if known is None:
            return graph_kd(rows_bnc, k)
        with _used(known):
            return graph_kd(rows_bnc, k)


@contextmanager
def _used(known: Filter) -> Iterator[None]:
    def subspace_size(_count: int, _size: int) -> int:
        return known.kept

    with (
        patch.object(_eigen, "_first_block", known.first_block),
        patch.object(_eigen, "subspace_size", subspace_size),
    ):
        yield


def _least(matrices: Tensor, values: Tensor, kept: int, k: int) -> Filter | None:
    """Return the filter of least degree after which almost all samples have converged."""
    for degree in range(2, _eigen.DEGREE + 1):
        one = Filter(kept, values[:, kept : kept + 1], degree)
        ritz = _eigen._ritz(matrices, one.first_block(matrices, kept, k), k)
        if float((~ritz.found).float().mean()) <= LAGGING:
            return one
    return None


def _key(rows_bnc: Tensor, k: int) -> tuple[int, ...]:
    return (*rows_bnc.shape, k)
