"""Compress feature maps to their top right singular vectors (Lee & Song 2019, step 1).

Axes: ``b`` sample, ``c`` channel, ``h w`` space, ``n`` position (all of space, flattened), ``k``
singular vector.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from graph_kd._checks import check_count, check_floating
from graph_kd._features import to_rows
from graph_kd._svd_exact import Decomposition, decompose, gradient_of_vectors, null_vectors
from graph_kd._svd_fast import check_finite, top_vectors, top_vectors_gradient

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
    - Cost: float32 maps, and half precision, which comes in as it is, under autocast too, and goes
      out as float32, take a Gram matrix of the shorter side and a few thin products with it
      (subspace iteration), always in whole float32. Where a returned value stands 1 % off its
      neighbours, 1 - |cos| is below 1e-6 and the gradient within 1e-3 of the true one. A sample on
      which this does not converge, whose values are closer than 0.05 %, or whose range is too wide
      for float32 takes the way of float64 maps: a whole eigendecomposition of the Gram
      matrix in float64, in which a vector's error is some 1e-16 (σ_1/σ)² over its relative gap, and
      nothing is resolved below σ_1 · 1e-7. How many rounds are needed depends on the maps, so the
      device is waited for a few times a call.

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
        vectors, _null = top_singular_vectors(rows_bnc, self.k)
        return vectors

    def extra_repr(self) -> str:
        """Name the settings in ``print(module)``."""
        return f"k={self.k}, channel_dim={self.channel_dim}"


def align_singular_vectors(
    student: Tensor, teacher: Tensor, *, null: Tensor | None = None
) -> Tensor:
    """Pick for each teacher vector the student vector closest to it, in the teacher's direction.

    Singular vectors come with a free sign, and a student orders them by its own singular values;
    both are removed before the graphs are compared.

    Equation: method step 2; i_k = argmax_i |v_T,k · v_S,i|, a_k = sign(v_T,k · v_S,i_k),
    V_S = [a_k v_S,i_k].

    Differs from the source: at a cosine of zero, up to rounding, the sign is +1 (the source returns
    a zero vector), of exactly tied vectors the first is taken (the source adds them), and ``null``
    vectors are no candidates.

    Gradient flows to the student alone; the choice and the sign are constants.

    Args:
        student: Unit singular vectors of the student, the candidates.
        teacher: Unit singular vectors of the teacher, the targets.
        null: Which student vectors have a singular value of zero. They are arbitrary, and are
            chosen only where a sample has no other.

    Shape:
        - student: ``b i c``
        - teacher: ``b k c``
        - null: ``b i``, bool
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
        # Of orthogonal vectors rounding alone would decide.
        cosine = torch.where(cosine.abs() > torch.finfo(dtype).eps ** 0.75, cosine, 0)
        closeness = cosine.abs()
        if null is not None:
            closeness = closeness.masked_fill(rearrange(null, "b i -> b 1 i"), -1)
        choice = closeness.argmax(dim=-1, keepdim=True)
        chosen = cosine.gather(-1, choice)
        sign = torch.where(chosen < 0, -1, 1).to(student.dtype)
    return sign * student.gather(1, choice.expand(-1, -1, student.shape[2]))


def top_singular_vectors(
    rows_bnc: Tensor, k: int, *, name: str = "features"
) -> tuple[Tensor, Tensor]:
    """Return the top-k right singular vectors of each matrix, ``b k c``; see `SVDFeature`.

    The second tensor, ``b k``, says which have a singular value of zero up to rounding.
    """
    _, n, c = rows_bnc.shape
    if k > min(n, c):
        raise ValueError(
            f"`k` must be at most min(positions, channels) = {min(n, c)} for `{name}`; got {k}."
        )
    if rows_bnc.dtype != torch.float64 and len(rows_bnc):
        fast: tuple[Tensor, Tensor] = _FastVectors.apply(rows_bnc, k, name)  # type: ignore[no-untyped-call] # torch's own method has no types
        return fast
    # The check waits for the device; a compiled graph can not branch on data and goes without it.
    if not torch.compiler.is_compiling():
        check_finite(rows_bnc.detach(), name)
    vectors, null = _ExactVectors.apply(rows_bnc, k)  # type: ignore[no-untyped-call] # torch's own method has no types
    return (vectors if rows_bnc.dtype == torch.float64 else vectors.float()), null


class _FastVectors(torch.autograd.Function):
    """Subspace iteration and its derivative, for float32 and below."""

    @staticmethod
    def forward(ctx: Any, rows_bnc: Tensor, k: int, name: str) -> tuple[Tensor, Tensor]:
        vectors: Tensor
        vectors, null, *rest = top_vectors(rows_bnc, k, name)
        ctx.save_for_backward(rows_bnc, vectors, *rest)
        ctx.mark_non_differentiable(null)
        return vectors, null

    @staticmethod
    def backward(ctx: Any, grad_bkc: Tensor, _grad_null: None) -> tuple[Tensor, None, None]:
        rows_bnc, *rest = ctx.saved_tensors
        with torch.no_grad():
            grad_rows = top_vectors_gradient(rows_bnc, *rest, grad_bkc)
        return _once(grad_rows, rows_bnc, grad_bkc), None, None


class _ExactVectors(torch.autograd.Function):
    """A whole eigendecomposition and its first-order perturbation, for float64."""

    @staticmethod
    def forward(ctx: Any, rows_bnc: Tensor, k: int) -> tuple[Tensor, Tensor]:
        with torch.autocast(rows_bnc.device.type, enabled=False):
            found = decompose(rows_bnc, k)
            null = null_vectors(found, rows_bnc.shape[1], rows_bnc.shape[2], rows_bnc.dtype)
        ctx.save_for_backward(rows_bnc, *found)
        ctx.mark_non_differentiable(null)
        return found.vectors, null

    @staticmethod
    def backward(ctx: Any, grad_bkc: Tensor, _grad_null: None) -> tuple[Tensor, None]:
        rows_bnc, *found = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(rows_bnc.device.type, enabled=False):
            grad_rows = gradient_of_vectors(rows_bnc, Decomposition(*found), grad_bkc)
        return _once(grad_rows, rows_bnc, grad_bkc), None


def _once(gradient: Tensor, rows_bnc: Tensor, grad_bkc: Tensor) -> Tensor:
    """Tie a gradient to what it depends on, so that it is not taken for a constant."""
    if not torch.is_grad_enabled():  # but for create_graph=True
        return gradient
    tied: Tensor = _RefuseSecondDerivative.apply(gradient, rows_bnc, grad_bkc)  # type: ignore[no-untyped-call] # torch's own method has no types
    return tied


class _RefuseSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, gradient: Tensor, *_depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(_ctx: Any, *_grads: Tensor) -> None:
        raise RuntimeError(
            "The gradient of SVDFeature can not be differentiated again; leave the transfer loss "
            "out of what is differentiated twice."
        )
