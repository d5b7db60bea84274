"""Compress feature maps to their top right singular vectors (Lee & Song 2019).

Axes: ``b`` sample, ``c`` channel, ``h w`` space, ``t`` time, ``n`` position or token, ``k``
singular vector.
"""

from __future__ import annotations

from torch import Tensor, nn

from graph_kd._checks import check_count, check_floating
from graph_kd._features import channel_axis, to_rows
from graph_kd._svd import top_singular_vectors

__all__ = ["SVDFeature"]


class SVDFeature(nn.Module):
    """Compress each sample to the top-k right singular vectors of its position × channel matrix.

    A vector has one entry per channel. It does not change if positions are permuted or the map is
    scaled by a positive number. Networks of different spatial size can be compared.

    Equation: Lee & Song 2019, step "compress"; V_p in M_p = U_p Σ_p V_pᵀ.

    Differs from the source: the authors' program gives vectors of an arbitrary sign, and a gradient
    that is doubled if positions ≥ channels, else of a wrong direction. Here both are correct:

    - Sign: the mean over positions has a non-negative inner product with every vector; where that
      product is zero, rounding decides.
    - Gradient: the derivative of the returned vectors, wherever their singular values are distinct
      from all others. Dead channels, or repeated singular values among those that are not returned,
      do no harm. Two values closer than the rounding error of the input count as repeated: no
      gradient rotates their vectors into each other. A vector of singular value zero is an
      arbitrary unit vector orthogonal to the others; an all-zero map gives such vectors and zero
      gradient, and so does a map whose largest singular value is below 1e-19 (float64: 1e-154). The
      gradient can not be differentiated again.
    - Precision: float32 and half-precision maps are solved in float32, whatever autocast or TF32
      allow. If neighbouring singular values differ by 1 %, 1 - |cos| between a vector and the true
      one is below 1e-6, and the relative error of the gradient below 1e-3. Samples that float32 can
      not resolve are decomposed in float64, as float64 maps are. On a device without float64 the
      CPU does the work.

    Args:
        k: Singular vectors kept, largest value first; 1 ≤ k ≤ min(positions, channels).
        channel_dim: Axis of the channels. By default 1 for maps of rank 4 and 5, the last one for
            tokens (rank 3) and vectors (rank 2, one position: the vector itself, normalised).

    Shape:
        - features: ``b c h w``, ``b c t h w``, ``b n c`` or ``b c``, floating
        - returns: ``b k c``, unit rows; float64 for float64, float32 for anything else

    Raises:
        TypeError: ``k`` or ``channel_dim`` is no integer, or ``features`` no floating-point tensor.
        ValueError: a setting is out of range; or the rank of ``features`` does not fit, it holds
            NaN or infinity, or ``k`` is too large for it.

    Example:
        >>> import torch
        >>> from graph_kd import SVDFeature
        >>> SVDFeature(k=4)(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 4, 16])
    """

    def __init__(self, k: int = 1, *, channel_dim: int | None = None) -> None:
        super().__init__()
        self.k = check_count("k", k)
        if channel_dim is not None:
            check_count("channel_dim", channel_dim, minimum=-4)
        self.channel_dim = channel_dim

    def forward(self, features: Tensor) -> Tensor:
        """Return the top-k right singular vectors, ``b k c``."""
        check_floating("features", features)
        axis = channel_axis(features, "features", self.channel_dim)
        rows_bnc = to_rows(features, "features", axis)
        (found,) = top_singular_vectors([rows_bnc], [self.k], ["features"])
        return found.vectors()

    def extra_repr(self) -> str:
        """Name the settings in ``print(module)``."""
        return f"k={self.k}, channel_dim={self.channel_dim}"
