"""Attention heads that predict a later layer's vectors from an earlier layer's (step 3).

Axes: ``b`` sample, ``c`` channel, ``m`` head, ``d`` head width, ``i`` graph row (back-end sample),
``j`` graph column (front-end sample).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from graph_kd._checks import check_count, check_floating

__all__ = ["MultiHeadGraphEstimator"]


class MultiHeadGraphEstimator(nn.Module):
    """Estimate the back-end vectors of a batch from its front-end vectors, through graphs.

    Each head compares every back-end sample with every front-end sample; the row-wise softmax of
    these logits is a batch × batch graph of how the data move between the two layers. Trained on
    the teacher, the graphs become what the student is asked to reproduce.

    Equation: Lee & Song 2019, L_MHAN; S_a = θ_a(V_B) φ_a(V_F)ᵀ, G_a = softmax_j(S_a),
    V̄_B = f2([G_a f1(V_F)]_a) with unit rows, loss = mean_n (1 - V_B,n · V̄_B,n).

    Differs from the source: the loss is the authors' 1 - cosine, where the poster prints the cosine
    alone. Their random dropping of heads during training is kept; a single head is never dropped.
    Weights start from a normal distribution of variance 2 / fan_out, theirs from the truncated one.

    Gradient reaches every parameter and both inputs; autocast has no effect. Training mode uses
    (and moves) the statistics of the batch, so it needs at least two samples; evaluation mode uses
    the running ones.

    Args:
        front_channels: Length of a front-end vector. Count.
        back_channels: Length of a back-end vector. Count.
        num_heads: Attention heads. Count.
        head_channels: Width of a head; by default (front_channels + back_channels) // 2. Count.
        drop_heads: In training, drop heads at random per row: a head stays where its standard
            normal draw lies above the mean of the draws of all heads for that row (about half).

    Shape:
        - front: ``j c_front``, floating, the parameters' dtype
        - back: ``i c_back``, likewise
        - returns: ``i c_back``, unit rows

    Raises:
        TypeError: vectors are no floating-point tensors of the parameters' dtype and device, or
            ``drop_heads`` is no bool.
        ValueError: a size is no count, vectors do not have their channels, or are fewer than two.

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
        super().__init__()
        self.front_channels = check_count("front_channels", front_channels)
        self.back_channels = check_count("back_channels", back_channels)
        self.num_heads = check_count("num_heads", num_heads)
        if head_channels is None:
            head_channels = max(1, (front_channels + back_channels) // 2)
        self.head_channels = check_count("head_channels", head_channels)
        if not isinstance(drop_heads, bool):
            raise TypeError(f"`drop_heads` must be a bool; got {drop_heads!r}.")
        self.drop_heads = drop_heads

        width = num_heads * head_channels  # head-major: (m d)
        self.theta = nn.Sequential(_linear(back_channels, width), nn.BatchNorm1d(width))
        self.phi = nn.Sequential(_linear(front_channels, width), nn.BatchNorm1d(width))
        self.f1 = nn.Sequential(
            _linear(front_channels, head_channels), nn.BatchNorm1d(head_channels), nn.ReLU()
        )
        self.f2 = _linear(width, back_channels, bias=True)

    def attention_logits(self, front: Tensor, back: Tensor) -> Tensor:
        """Return the attention logits S before any softmax, ``m i j``."""
        self._check_rows(front, back, training=self.training)
        with _full_precision(front):
            theta, phi = self._by_head(self.theta(back)), self._by_head(self.phi(front))
            logits: Tensor = einsum(theta, phi, "m i d, m j d -> m i j")
        return logits

    def frozen_embeddings(self, front: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
        """Return θ(back), ``m i d``, and φ(front), ``m j d``, in inference mode.

        Their products are the logits of the graphs that are transferred. Running statistics are
        used and stay as they are, whatever `train` says; gradient flows to the two inputs, and none
        to the parameters.
        """
        self._check_rows(front, back, training=False)
        with _full_precision(front):
            theta, phi = _inference(self.theta, back), _inference(self.phi, front)
        return self._by_head(theta), self._by_head(phi)

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
        with _full_precision(front):
            values_jd = self.f1(front)
            gathered = einsum(graphs_mij, values_jd, "m i j, j d -> m i d")
            return F.normalize(self.f2(rearrange(gathered, "m i d -> i (m d)")), dim=-1)

    def loss(self, front: Tensor, back: Tensor, *, kept_heads: Tensor | None = None) -> Tensor:
        """Return L_MHAN of this pair, the mean over samples of 1 - cosine, for unit ``back``."""
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
        return (
            f"{self.front_channels}, {self.back_channels}, num_heads={self.num_heads}, "
            f"head_channels={self.head_channels}, drop_heads={self.drop_heads}"
        )

    def _by_head(self, embedding: Tensor) -> Tensor:
        by_head: Tensor = rearrange(embedding, "n (m d) -> m n d", m=self.num_heads)
        return by_head

    def _check_rows(self, front: Tensor, back: Tensor, *, training: bool) -> None:
        for name, rows, channels in (
            ("front", front, self.front_channels),
            ("back", back, self.back_channels),
        ):
            check_floating(name, rows)
            if rows.ndim != 2 or rows.shape[1] != channels:
                raise ValueError(
                    f"`{name}` must have shape (samples, {channels}); got {tuple(rows.shape)}."
                )
            if rows.dtype != self.f2.weight.dtype or rows.device != self.f2.weight.device:
                raise TypeError(
                    f"`{name}` must be {self.f2.weight.dtype} on {self.f2.weight.device}, as the "
                    f"parameters are; got {rows.dtype} on {rows.device}. Convert it with `.to()`."
                )
        fewest = min(len(front), len(back)) if training else len(front)
        if fewest < 2:
            raise ValueError(
                "`front` and `back` must hold at least 2 samples: a graph relates samples to each "
                f"other, and batch norm needs two; got {len(front)} and {len(back)}. Drop the last "
                "incomplete batch of an epoch."
            )


def _full_precision(rows: Tensor) -> torch.autocast:
    """Switch autocast off: unit vectors and their small differences need more than half."""
    return torch.autocast(rows.device.type, enabled=False)


def _linear(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=bias)
    nn.init.kaiming_normal_(linear.weight, mode="fan_out")
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def _inference(branch: nn.Sequential, rows: Tensor) -> Tensor:
    """Linear + batch norm with running statistics and constant weights."""
    linear, norm = cast(nn.Linear, branch[0]), cast(nn.BatchNorm1d, branch[1])
    running_mean, running_var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    centred = F.linear(rows, linear.weight.detach(), -running_mean)
    scale = norm.weight.detach() * torch.rsqrt(running_var + norm.eps)
    # Half the time of `F.batch_norm`, whose backward also prepares for weights that learn.
    return torch.addcmul(norm.bias.detach(), centred, scale)
