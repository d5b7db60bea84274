"""Attention heads: sample × sample graphs between two layers (Lee & Song 2019).

Axes: ``b`` sample, ``c`` channel, ``m`` head, ``d`` head width, ``i`` graph row (back-end sample),
``j`` graph column (front-end sample).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.func import functional_call

from graph_kd._checks import check_bool, check_count, check_floating

__all__ = ["AttentionHeads", "MultiHeadGraphEstimator", "full_precision"]


class AttentionHeads(nn.Module):
    """Compare every sample at the back with every sample at the front, head by head.

    `MultiHeadGraphEstimator` adds the training on a teacher; its docstring has the arguments and
    the equations of both. A student's own heads are this class alone: the transfer loss trains
    them.
    """

    def __init__(
        self, front_channels: int, back_channels: int, num_heads: int, head_channels: int | None
    ) -> None:
        super().__init__()
        self.front_channels = check_count("front_channels", front_channels)
        self.back_channels = check_count("back_channels", back_channels)
        self.num_heads = check_count("num_heads", num_heads)
        if head_channels is None:
            head_channels = (front_channels + back_channels) // 2
        self.head_channels = check_count("head_channels", head_channels)
        width = num_heads * head_channels  # head-major: (m d)
        self.theta = nn.Sequential(linear(back_channels, width), nn.BatchNorm1d(width))
        self.phi = nn.Sequential(linear(front_channels, width), nn.BatchNorm1d(width))

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the computation: that of the parameters, float32 at least."""
        return torch.promote_types(self._weight.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self._weight.device

    def attention_logits(self, front: Tensor, back: Tensor) -> Tensor:
        """Return the attention logits S before any softmax, ``m i j``."""
        theta, phi = self.embeddings(front, back)
        with full_precision(theta):
            return theta @ phi.mT

    def embeddings(
        self, front: Tensor, back: Tensor, *, frozen: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return θ(back), ``m i d``, and φ(front), ``m j d``, in the mode that `train` set.

        If ``frozen``, in inference mode whatever `train` says: running statistics stay as they are,
        and gradient flows to the two inputs alone.
        """
        front, back = self._check_rows(front, back, training=self.training and not frozen)
        apply = _inference if frozen else apply_branch
        embedded = apply(self.theta, back), apply(self.phi, front)
        theta, phi = (rearrange(e, "n (m d) -> m n d", m=self.num_heads) for e in embedded)
        return theta, phi

    def extra_repr(self) -> str:
        """Name the settings in ``print(module)``."""
        return (
            f"{self.front_channels}, {self.back_channels}, num_heads={self.num_heads}, "
            f"head_channels={self.head_channels}"
        )

    @property
    def _weight(self) -> Tensor:
        return cast(nn.Linear, self.theta[0]).weight

    def _check_rows(self, front: Tensor, back: Tensor, *, training: bool) -> tuple[Tensor, Tensor]:
        """Return the rows in the precision of the computation."""
        for name, rows, channels in (
            ("front", front, self.front_channels),
            ("back", back, self.back_channels),
        ):
            check_floating(name, rows)
            if rows.ndim != 2 or rows.shape[1] != channels:
                raise ValueError(
                    f"`{name}` must have shape (samples, {channels}); got {tuple(rows.shape)}."
                )
            if rows.dtype not in (self.dtype, self._weight.dtype) or rows.device != self.device:
                raise TypeError(
                    f"`{name}` must be {self.dtype} on {self.device}, as the heads compute; "
                    f"got {rows.dtype} on {rows.device}. Convert it with `.to()`."
                )
        fewest = min(len(front), len(back)) if training else len(front)
        if fewest < 2:
            raise ValueError(
                "`front` and `back` must hold at least 2 samples: a graph relates samples to each "
                f"other, and batch norm needs two; got {len(front)} and {len(back)}. Drop the last "
                "incomplete batch of an epoch."
            )
        return front.to(self.dtype), back.to(self.dtype)


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
        - front: ``j c_front``, in the parameters' dtype; half-precision heads take float32 as well
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


def full_precision(rows: Tensor) -> torch.autocast:
    """Switch autocast off: unit vectors and their small differences need more than half."""
    return torch.autocast(rows.device.type, enabled=False)


def linear(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    """Return a linear layer with the start of the method: He's, by fan-out; zero bias."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def apply_branch(branch: nn.Module, rows: Tensor) -> Tensor:
    """Apply a branch in the precision of ``rows``, whatever that of its parameters."""
    with full_precision(rows):
        if all(parameter.dtype == rows.dtype for parameter in branch.parameters()):
            result: Tensor = branch(rows)
            return result
        state = {**dict(branch.named_parameters()), **dict(branch.named_buffers())}
        converted = {n: t.to(rows.dtype) if t.is_floating_point() else t for n, t in state.items()}
        result = functional_call(branch, converted, rows)
    for name, buffer in branch.named_buffers():
        buffer.copy_(converted[name])  # its statistics have moved
    return result


def _inference(branch: nn.Sequential, rows: Tensor) -> Tensor:
    """Linear + batch norm with running statistics and constant weights."""
    layer, norm = cast(nn.Linear, branch[0]), cast(nn.BatchNorm1d, branch[1])
    state = (layer.weight, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    weight, mean, var, gain, bias = (cast(Tensor, t).detach().to(rows.dtype) for t in state)
    with full_precision(rows):
        centred = F.linear(rows, weight, -mean)
        # Half the time of `F.batch_norm`, whose backward also prepares for weights that learn.
        return torch.addcmul(bias, centred, gain * torch.rsqrt(var + norm.eps))
