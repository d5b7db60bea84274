"""Compress feature maps to their top right singular vectors (Lee & Song 2019, step 1).

Axes: ``b`` sample, ``c`` channel, ``h w`` space, ``n`` position (all of space, flattened), ``k``
singular vector, ``s`` eigenvector of the Gram matrix of the shorter side, min(n, c) of them.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from graph_kd._checks import check_count, check_floating

__all__ = ["SVDFeature", "align_singular_vectors"]


class SVDFeature(nn.Module):
    """Compress each sample to the top-k right singular vectors of its position × channel matrix.

    Rows are positions and columns are channels, so the vectors live in channel space: they do not
    change when positions are permuted or rotated, or when the map is scaled by a positive number,
    and networks of different spatial size can be compared.

    Equation: Lee & Song 2019, step "compress"; V_p in M_p = U_p Σ_p V_pᵀ.

    Differs from the source: the authors' program returns vectors of arbitrary sign, and a gradient
    that is twice the true one (positions ≥ channels), points elsewhere (positions < channels) or is
    missing (nearly square). Here value and gradient are exact:

    - Sign: the mean over positions has a non-negative inner product with every vector; where that
      product is zero, rounding decides.
    - Gradient: the derivative of the returned vectors, wherever their singular values are isolated.
      It depends on the gaps between a returned value and the others alone, so dead channels or
      repeated values among the rest do no harm. Two values that rounding the input could exchange
      count as repeated: the rotation between their vectors is undefined and gets zero gradient. A
      vector of singular value zero is an arbitrary unit vector orthogonal to the others; an
      all-zero map gives such vectors and zero gradient, and so does a map whose largest entry is
      below 1e-19 (float64: 1e-154). The gradient can not be differentiated again.
    - Cost: one Gram matrix of the shorter side and its eigenvectors, in float64, because a Gram
      matrix squares the range of the singular values: a vector's error is some 1e-16 (σ_1/σ)²
      over its relative gap, and below σ_1 · 1e-7 nothing is resolved. Half precision comes in as it
      is, under autocast too, and float32 goes out. Looking for NaN waits for the device.

    Args:
        k: Singular vectors kept, largest value first. Count, 1 ≤ k ≤ min(positions, channels).
        channel_dim: Axis of the channels. By default 1 for maps of rank 4 and 5, the last one for
            tokens (rank 3) and vectors (rank 2, one position: the vector itself, normalised).

    Shape:
        - features: ``b c h w``, ``b c t h w``, ``b n c`` or ``b c``, floating
        - returns: ``b k c``, unit rows; float64 for float64, float32 for anything else

    Raises:
        TypeError: ``features`` is no floating-point tensor.
        ValueError: its rank does not fit, it holds NaN or infinity, or ``k`` is too large for it.

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
        rows_bnc = to_rows(features, channel_dim=self.channel_dim)
        return top_singular_vectors(rows_bnc, self.k)

    def extra_repr(self) -> str:
        """Name the settings in ``print(module)``."""
        return f"k={self.k}, channel_dim={self.channel_dim}"


def align_singular_vectors(student: Tensor, teacher: Tensor) -> Tensor:
    """Pick for each teacher vector the student vector closest to it, in the teacher's direction.

    Singular vectors come with a free sign, and a student orders them by its own singular values;
    both are removed before the graphs are compared.

    Equation: method step 2; i_k = argmax_i |v_T,k · v_S,i|, a_k = sign(v_T,k · v_S,i_k),
    V_S = [a_k v_S,i_k].

    Differs from the source: at a cosine of exactly zero the sign is +1 (the source returns a zero
    vector) and of exactly tied vectors the first is taken (the source adds them).

    Gradient flows to the student alone; the choice and the sign are constants.

    Args:
        student: Unit singular vectors of the student, the candidates.
        teacher: Unit singular vectors of the teacher, the targets.

    Shape:
        - student: ``b i c``
        - teacher: ``b k c``
        - returns: ``b k c``

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: an argument is not of rank 3, or batch or channels differ.
    """
    check_floating("student", student)
    check_floating("teacher", teacher)
    if (
        student.ndim != 3
        or teacher.ndim != 3
        or student.shape[0] != teacher.shape[0]
        or student.shape[2] != teacher.shape[2]
    ):
        raise ValueError(
            "`student` and `teacher` must have axes (b, i, c) and (b, k, c) with the same b and c; "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        dtype = torch.promote_types(student.dtype, teacher.dtype)
        cosine = einsum(teacher.to(dtype), student.to(dtype), "b k c, b i c -> b k i")
        choice = cosine.abs().argmax(dim=-1, keepdim=True)
        chosen = cosine.gather(-1, choice)
        sign = torch.where(chosen < 0, -1, 1).to(student.dtype)
    return sign * student.take_along_dim(choice, dim=1)


def channel_count(
    features: Tensor, *, name: str = "features", channel_dim: int | None = None
) -> int:
    """Return the number of channels of a feature map of any accepted rank."""
    return features.shape[_channel_axis(features, name, channel_dim)]


def to_rows(features: Tensor, *, name: str = "features", channel_dim: int | None = None) -> Tensor:
    """View feature maps as one position × channel matrix per sample, ``b n c``."""
    check_floating(name, features)
    channels_last = features.movedim(_channel_axis(features, name, channel_dim), -1)
    if 0 in features.shape[1:]:
        raise ValueError(
            f"`{name}` must have at least one position and one channel; "
            f"got shape {tuple(features.shape)}."
        )
    return rearrange(channels_last, "b ... c -> b (...) c")


def _channel_axis(features: Tensor, name: str, channel_dim: int | None) -> int:
    rank = features.ndim
    if channel_dim is None:
        if rank not in (2, 3, 4, 5):
            raise ValueError(
                f'`{name}` must have axes "b c h w", "b c t h w", "b n c" or "b c"; '
                f"got shape {tuple(features.shape)}. Add a batch axis with `features[None]`, or "
                f"say with `channel_dim` where the channels are."
            )
        return 1 if rank >= 4 else rank - 1
    if rank < 2 or not -rank <= channel_dim < rank or channel_dim % rank == 0:
        raise ValueError(
            f"`channel_dim` must name an axis of `{name}` other than the batch axis 0; "
            f"got {channel_dim} for shape {tuple(features.shape)}."
        )
    return channel_dim % rank


def top_singular_vectors(rows_bnc: Tensor, k: int, *, name: str = "features") -> Tensor:
    """Return the top-k right singular vectors of each matrix, ``b k c``; see `SVDFeature`."""
    _, n, c = rows_bnc.shape
    if k > min(n, c):
        raise ValueError(
            f"`k` must be at most min(positions, channels) = {min(n, c)} for `{name}`; got {k}."
        )
    # The check waits for the device; a compiled graph can not branch on data and goes without it.
    if not torch.compiler.is_compiling():
        finite = torch.isfinite(rows_bnc.detach()).all(dim=2).all(dim=1)
        if not bool(finite.all()):
            samples = torch.nonzero(~finite).flatten().tolist()
            raise ValueError(
                f"`{name}` must be finite; got NaN or infinity in {len(samples)} of "
                f"{len(finite)} samples (the first is {samples[0]}). Look for the layer or the "
                f"step that diverged, or lower the learning rate."
            )
    vectors: Tensor = _TopSingularVectors.apply(rows_bnc, k)  # type: ignore[no-untyped-call] # torch's own method has no types
    return vectors


class _TopSingularVectors(torch.autograd.Function):
    """Eigenvectors of the Gram matrix of the shorter side, and their first-order perturbation."""

    @staticmethod
    def forward(ctx: Any, rows_bnc: Tensor, k: int) -> Tensor:
        out_dtype = torch.float64 if rows_bnc.dtype == torch.float64 else torch.float32
        with torch.autocast(rows_bnc.device.type, enabled=False):
            matrix, _ = _normalise(rows_bnc)
            _, n, c = matrix.shape
            gram = matrix.mT @ matrix if n >= c else matrix @ matrix.mT
            values, basis = torch.linalg.eigh(gram)
            values, basis = values.flip(-1).clamp_min(0), basis.flip(-1)  # largest first
            if n >= c:
                columns = basis[..., :k]
            else:
                # Columns σ_i v_i are orthogonal already; QR gives them unit length and completes
                # those of singular value zero.
                columns, _ = torch.linalg.qr(matrix.mT @ basis[..., :k])
            vectors = rearrange(columns, "b c k -> b k c")
            mean_cosine = einsum(vectors, matrix.mean(dim=1), "b k c, b c -> b k")
            vectors = torch.where(mean_cosine < 0, -1, 1).unsqueeze(-1) * vectors
        ctx.save_for_backward(rows_bnc, values, basis, vectors)
        result: Tensor = vectors.to(out_dtype)
        return result

    @staticmethod
    def backward(ctx: Any, grad_bkc: Tensor) -> tuple[Tensor, None]:
        rows_bnc, values, basis, vectors = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(rows_bnc.device.type, enabled=False):
            matrix, scale = _normalise(rows_bnc)
            eps = torch.finfo(rows_bnc.dtype).eps
            response = _response(matrix, values, basis, vectors, grad_bkc.double(), eps)
            # d<v_i, g_i> = <w_i, dG v_i> with dG = dMᵀ M + Mᵀ dM and w_i the response to g_i.
            projected_v = einsum(matrix, vectors, "b n c, b k c -> b n k")
            projected_w = einsum(matrix, response, "b n c, b k c -> b n k")
            grad_rows = projected_w @ vectors + projected_v @ response
            grad_rows = (grad_rows / rearrange(scale, "b -> b 1 1")).to(rows_bnc.dtype)
        if torch.is_grad_enabled():  # create_graph=True
            grad_rows = _RefuseSecondDerivative.apply(grad_rows, rows_bnc)  # type: ignore[no-untyped-call] # torch's own method has no types
        return grad_rows, None


class _RefuseSecondDerivative(torch.autograd.Function):
    """Tie a gradient to what it depends on, so that it is not taken for a constant."""

    @staticmethod
    def forward(_ctx: Any, gradient: Tensor, _rows: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(_ctx: Any, *_grads: Tensor) -> None:
        raise RuntimeError(
            "The gradient of SVDFeature can not be differentiated again; leave the transfer loss "
            "out of what is differentiated twice."
        )


def _normalise(rows_bnc: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each map to a largest entry of one, in float64; return it and the scale.

    Neither very large nor very small maps overflow then. A null map becomes zero, its scale one.
    """
    peak = rows_bnc.abs().amax(dim=(1, 2))
    peak = peak.to(torch.promote_types(peak.dtype, torch.float32))  # half ends where maps may lie
    null = peak < torch.finfo(peak.dtype).tiny ** 0.5
    scale = torch.where(null, 1.0, peak.double())
    matrix = rows_bnc.double() / rearrange(scale, "b -> b 1 1")
    return torch.where(rearrange(null, "b -> b 1 1"), 0.0, matrix), scale


def _response(
    matrix: Tensor, values: Tensor, basis: Tensor, vectors: Tensor, grad: Tensor, eps: float
) -> Tensor:
    """Return w_i = Σ_{j≠i} v_j (v_j · g_i) / (λ_i - λ_j) over all right singular vectors j.

    ``values`` are the eigenvalues λ of the Gram matrix, ``basis`` its eigenvectors.
    """
    _, n, c = matrix.shape
    k, s = vectors.shape[1], values.shape[1]
    value_i = values[:, :k].unsqueeze(-1)
    value_j = values.unsqueeze(-2)
    largest = values[:, :1].unsqueeze(-1)
    gap = value_i - value_j
    # What rounding the input can open or close: n · c errors of eps/4 of a typical entry make a
    # matrix of norm eps/4 (√n + √c)/√(n c) σ_1; eight times that. And the Gram matrix's rounding.
    noise = 2 * eps * (n**0.5 + c**0.5) / (n * c) ** 0.5 * (largest * value_i).sqrt()
    noise = noise + 4 * s * torch.finfo(values.dtype).eps * largest
    isolated = gap.abs() > noise
    inverse_gap = torch.where(isolated, 1 / torch.where(isolated, gap, 1), 0)
    if n >= c:
        return ((grad @ basis) * inverse_gap) @ basis.mT
    # Wide maps: the eigenvectors known are those of M Mᵀ, on the left. From
    #   (λ_i - MᵀM)⁻¹ = (1 + Mᵀ (λ_i - M Mᵀ)⁻¹ M) / λ_i
    # the sum above is reached without the small v_j = Mᵀ u_j / σ_j and without the null space.
    # A repeated partner j is taken out of g_i by the coefficient -1/λ_j.
    itself = torch.eye(k, s, dtype=torch.bool, device=values.device)
    repeated = ~isolated & ~itself & (value_i > noise)
    inverse_gap = torch.where(repeated, -1 / torch.where(repeated, value_j, 1), inverse_gap)
    inner = (einsum(grad, matrix, "b k c, b n c -> b k n") @ basis) * inverse_gap @ basis.mT
    along = einsum(grad, vectors, "b k c, b k c -> b k").unsqueeze(-1)
    response = grad - along * vectors + inner @ matrix
    positive = value_i > noise
    return torch.where(positive, response / torch.where(positive, value_i, 1), 0)
