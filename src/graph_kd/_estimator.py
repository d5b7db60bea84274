"""Attention heads that predict a later layer's vectors from an earlier layer's.

Axes: ``b`` sample, ``c`` channel, ``m`` head, ``d`` head width, ``i`` graph row (sample at the
back), ``j`` graph column (sample at the front).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from graph_kd._checks import check_bool
from graph_kd._heads import AttentionHeads, apply_branch, full_precision, linear

__all__ = ["MultiHeadGraphEstimator"]


class MultiHeadGraphEstimator(AttentionHeads):
    """Predict vectors at the later (back) layer of a pair from those at the earlier (front) one.

    Each head compares every sample at the back with every sample at the front. The row-wise softmax
    of its logits is a batch × batch graph. The heads are trained on the teacher; the transfer
    loss compares the student's graphs with the teacher's.

    Equation: Lee & Song 2019, L_MHAN; S_m = θ_m(V_B) φ_m(V_F)ᵀ, G_m = softmax_j(S_m),
    V̄_B = f2([G_m f1(V_F)]_m) with unit rows, loss = mean_i (1 - V_B,i · V̄_B,i). θ, φ, f1 and f2 are
    the submodules `theta`, `phi`, `f1` and `f2`.

    Differs from the source: the loss is the authors' 1 - cosine, where the paper's poster prints
    the cosine alone. Their random dropping of heads during training is kept; a single head is never
    dropped. Weights start from a normal distribution of variance 2 / fan_out, theirs from the
    truncated one.

    Gradient reaches every parameter and both inputs. Autocast has no effect, and parameters in half
    precision are used in float32. Batch norms act as in torch: by the statistics of the batch in
    training mode, by the running ones in evaluation mode.

    Args:
        front_channels: Length of a front vector, ≥ 1.
        back_channels: Length of a back vector, ≥ 1.
        num_heads: Attention heads, ≥ 1.
        head_channels: Width of a head, ≥ 1; by default (front_channels + back_channels) // 2.
        drop_heads: In training, drop about half of the heads at random, anew for each row: a
            head stays if its standard normal draw is above the mean of all heads' draws.

    Shape:
        - front: ``j c_front``, in the parameters' dtype, or float32 if that is half precision
        - back: ``i c_back``, likewise
        - returns: ``i c_back``, unit rows

    Raises:
        TypeError: vectors are no tensors, or of another dtype or device, ``drop_heads`` is no bool,
            or a size is no int.
        ValueError: a size is below 1, the length of vectors is wrong, or there are fewer than two.

    Example:
        >>> import torch
        >>> from graph_kd import MultiHeadGraphEstimator
        >>> estimator = MultiHeadGraphEstimator(front_channels=16, back_channels=32)
        >>> estimator(torch.randn(10, 16), torch.randn(10, 32)).shape
        torch.Size([10, 32])
    """

    def __init__(
        self,
        front_channels: int,
        back_channels: int,
        num_heads: int = 8,
        *,
        head_channels: int | None = None,
        drop_heads: bool = True,
    ) -> None:
        super().__init__(front_channels, back_channels, num_heads, head_channels)
        self.drop_heads = check_bool("drop_heads", drop_heads)
        width = self.head_channels
        self.f1 = nn.Sequential(linear(front_channels, width), nn.BatchNorm1d(width), nn.ReLU())
        self.f2 = linear(self.num_heads * width, back_channels, bias=True)

    def forward(self, front: Tensor, back: Tensor, *, kept_heads: Tensor | None = None) -> Tensor:
        """Return the estimate of ``back``, ``i c``, unit rows.

        ``kept_heads``, ``m i`` of zeros and ones, replaces the random choice of `draw_kept_heads`.
        """
        graphs_mij = self.attention_logits(front, back).softmax(dim=-1)
        if kept_heads is None:
            kept_heads = self.draw_kept_heads(back)
        if kept_heads is not None:
            if kept_heads.shape != graphs_mij.shape[:2]:
                raise ValueError(
                    f"`kept_heads` must have shape (heads, samples) = "
                    f"{tuple(graphs_mij.shape[:2])}; got {tuple(kept_heads.shape)}."
                )
            graphs_mij = graphs_mij * rearrange(kept_heads, "m i -> m i 1")
        values_jd = apply_branch(self.f1, front.to(self.dtype))
        with full_precision(front):
            gathered = einsum(graphs_mij, values_jd, "m i j, j d -> m i d")
        return F.normalize(apply_branch(self.f2, rearrange(gathered, "m i d -> i (m d)")), dim=-1)

    def loss(self, front: Tensor, back: Tensor, *, kept_heads: Tensor | None = None) -> Tensor:
        """Return L_MHAN of this pair, the mean of 1 - cosine; rows of ``back`` need norm 1."""
        estimate = self(front, back, kept_heads=kept_heads)
        cosine: Tensor = (estimate * back).sum(dim=-1)
        return (1 - cosine).mean()

    def draw_kept_heads(self, back: Tensor) -> Tensor | None:
        """Choose which head stays for which row, ``m i`` of zeros and ones; None where all do."""
        if not (self.training and self.drop_heads and self.num_heads > 1):
            return None
        noise = torch.randn(self.num_heads, len(back), device=back.device, dtype=back.dtype)
        return (noise > noise.mean(dim=0)).to(back.dtype)

    def extra_repr(self) -> str:
        """Name the settings in ``print(module)``."""
        return f"{super().extra_repr()}, drop_heads={self.drop_heads}"
