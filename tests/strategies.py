"""Inputs with known answers: matrices built from chosen singular values."""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from hypothesis import strategies as st
from torch import Tensor

seeds = st.integers(0, 2**31 - 1)


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return `rows` orthonormal vectors of length `columns`, float64."""
    square = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square)[0][:rows]


def matrix_of(singular_values: list[float], n: int, c: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a matrix ``1 n c`` of the given singular values, and its right vectors ``1 r c``."""
    generator = torch.Generator().manual_seed(seed)
    rank = len(singular_values)
    left = orthonormal(rank, n, generator)
    right = orthonormal(rank, c, generator)
    sigma = torch.tensor(singular_values, dtype=torch.float64)
    matrix = einsum(left, sigma, right, "r n, r, r c -> n c")
    return rearrange(matrix, "n c -> 1 n c"), rearrange(right, "r c -> 1 r c")


def as_map(rows_bnc: Tensor, h: int, w: int) -> Tensor:
    """Arrange rows as a map ``b c h w``."""
    return rearrange(rows_bnc, "b (h w) c -> b c h w", h=h, w=w)


@st.composite
def feature_lists(
    draw: st.DrawFn, channels: tuple[int, ...] = (6, 8, 10), batch: int = 6
) -> list[Tensor]:
    """Draw float64 feature maps ``b c h w`` of a network with the given channels."""
    generator = torch.Generator().manual_seed(draw(seeds))
    size = draw(st.sampled_from([4, 5, 6]))
    return [
        torch.randn(batch, c, size, size, generator=generator, dtype=torch.float64)
        + draw(st.sampled_from([0.0, 1.0]))
        for c in channels
    ]
