"""Top right singular vectors and their derivative by subspace iteration, in float32.

Samples on which that would not be accurate are told apart and go to `graph_kd._svd_exact`. What is
done depends on the content of the maps (how many rounds, which samples go where), so that each of
the two functions here is one opaque operation to `torch.compile`.

Axes: ``b`` sample, ``n`` position, ``c`` channel, ``k`` singular vector, ``s`` row of the Gram
matrix of the shorter side, min(n, c) of them, ``p`` vector of the subspace, k and a few more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from einops import rearrange, repeat
from torch import Tensor

from graph_kd._eigen import leading_pairs, subspace_size
from graph_kd._orthonormal import inverse_factor
from graph_kd._shifted import solve_shifted
from graph_kd._svd_exact import decompose, gradient_of_vectors, null_vectors

__all__ = ["check_finite", "top_vectors", "top_vectors_gradient"]

CLOSE = 1e-3  # relative gap of eigenvalues below which the derivative wants float64
SMALLEST, LARGEST = 1e-12, 1e15  # of a Gram matrix's diagonal: float32 holds squares of errors


@torch.library.custom_op(
    "graph_kd::top_vectors",
    mutates_args=(),
    schema="(Tensor rows_bnc, int k, str name) "
    "-> (Tensor vectors, Tensor null, Tensor gram, Tensor values, Tensor subspace, Tensor hard)",
)
def top_vectors(
    rows_bnc: Tensor, k: int, name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the top-k right singular vectors, and what their derivative needs.

    Shape:
        - rows_bnc: ``b n c``, float32 or half precision
        - vectors: ``b k c``, signs fixed
        - null: ``b k``, whether the singular value is zero up to rounding
        - gram: ``b s s``
        - values: ``b p``, its leading eigenvalues
        - subspace: ``b p s``, their vectors, the first k accurate
        - hard: ``b``, whether the sample took the exact way
    """
    with _plain_float32(rows_bnc):
        matrix = rows_bnc.float()
        _, n, c = matrix.shape
        shorter = matrix.mT if n >= c else matrix
        gram = shorter @ shorter.mT
        peak = gram.diagonal(dim1=-2, dim2=-1).amax(dim=-1)
        outside = ~((peak >= SMALLEST) & (peak <= LARGEST))  # NaN is outside too
        if bool(outside.any()):
            check_finite(rows_bnc, name)
            aside = rearrange(outside, "b -> b 1 1")
            shorter = torch.where(aside, torch.eye(*shorter.shape[1:]).to(matrix), shorter)
            gram = torch.where(aside, torch.eye(min(n, c)).to(gram), gram)
        values, subspace, found = leading_pairs(shorter, gram, k)
        vectors = subspace[:, :k]
        if n >= c:
            total = vectors @ shorter.sum(dim=2, keepdim=True)
            vectors = vectors * _sign(total)
        else:  # Mᵀu = σv, orthogonal but for rounding
            along = vectors @ shorter
            inverse, _ = inverse_factor(along)
            total = inverse @ (vectors @ gram).sum(dim=2, keepdim=True)
            vectors = (inverse * _sign(total)) @ along

        after = values[:, 1 : k + 1]
        close = after >= (1 - CLOSE) * values[:, : after.shape[1]]
        hard = outside | close.any(dim=-1) | ~found
        null = torch.zeros(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
        if bool(hard.any()):  # null vectors are among these: zero is close to zero
            exact = decompose(rows_bnc[hard], k)
            vectors[hard] = exact.vectors.float()
            null[hard] = null_vectors(exact, n, c, rows_bnc.dtype)
    return vectors, null, gram, values, subspace, hard


@torch.library.custom_op(
    "graph_kd::top_vectors_gradient",
    mutates_args=(),
    schema="(Tensor rows_bnc, Tensor vectors, Tensor gram, Tensor values, "
    "Tensor subspace, Tensor hard, Tensor grad) -> Tensor",
)
def top_vectors_gradient(
    rows_bnc: Tensor,
    vectors: Tensor,
    gram: Tensor,
    values: Tensor,
    subspace: Tensor,
    hard: Tensor,
    grad: Tensor,
) -> Tensor:
    """Pull the gradient ``b k c`` of the vectors back to the maps, ``b n c`` in their dtype."""
    with _plain_float32(rows_bnc):
        matrix, grad = rows_bnc.float(), grad.float()
        _, n, c = matrix.shape
        k = vectors.shape[1]
        # Alignment uses one of k vectors: those without a gradient are left out.
        used = grad.abs().amax(dim=-1) != 0
        most = max(1, int(used.sum(dim=1).amax()))
        chosen = used.to(torch.uint8).topk(most, dim=1).indices
        shift = values.gather(1, chosen)
        grad_used = grad.masked_fill(rearrange(hard, "b -> b 1 1"), 0)  # those need no solution
        chosen = repeat(chosen, "b j -> b j c", c=c)
        grad_j, v = grad_used.gather(1, chosen), vectors.gather(1, chosen)
        # d<v_j, g_j> = <w_j, dG v_j> with dG = dMᵀ M + Mᵀ dM and w_j the response to g_j.
        if n >= c:
            w, solved = solve_shifted(gram, values, subspace, grad_j, k, shift)
            left_w, left_v = (torch.cat([w, v], dim=1) @ matrix.mT).chunk(2, dim=1)
        else:
            # (λ - MᵀM)⁻¹ = (1 + Mᵀ (λ - M Mᵀ)⁻¹ M) / λ, and all of it without v.
            right, left_v = (torch.cat([grad_j, v], dim=1) @ matrix.mT).chunk(2, dim=1)
            inner, solved = solve_shifted(gram, values, subspace, right, k, shift)
            along = (grad_j * v).sum(dim=-1, keepdim=True)
            value = rearrange(shift, "b j -> b j 1")
            w = (torch.addcmul(grad_j, along, v, value=-1) + inner @ matrix) / value
            left_w = (torch.addcmul(right, along, left_v, value=-1) + inner @ gram) / value
        left, outer = torch.cat([left_w, left_v], dim=1), torch.cat([v, w], dim=1)
        # Laid out as the map is.
        grad_rows = left.mT @ outer if rows_bnc.stride(-1) == 1 else (outer.mT @ left).mT
        grad_rows = grad_rows.to(rows_bnc.dtype)
        hard = hard | ~solved
        if bool(hard.any()):
            exact = decompose(rows_bnc[hard], k)
            grad_rows[hard] = gradient_of_vectors(rows_bnc[hard], exact, grad[hard])
    return grad_rows


def _sign(total: Tensor) -> Tensor:
    return torch.copysign(torch.ones_like(total), total)


@top_vectors.register_fake
def _(rows_bnc: Tensor, k: int, _name: str) -> tuple[Tensor, ...]:
    b, n, c = rows_bnc.shape
    size, kept = min(n, c), subspace_size(k, min(n, c))
    shapes = ((b, k, c), (b, size, size), (b, kept), (b, kept, size))
    vectors, *rest = (rows_bnc.new_empty(shape, dtype=torch.float32) for shape in shapes)
    null, hard = (rows_bnc.new_empty(shape, dtype=torch.bool) for shape in ((b, k), (b,)))
    return vectors, null, *rest, hard


@top_vectors_gradient.register_fake
def _(rows_bnc: Tensor, *_saved: Tensor) -> Tensor:
    b, n, c = rows_bnc.shape
    if rows_bnc.stride(-1) == 1:
        return rows_bnc.new_empty((b, n, c))
    return rows_bnc.new_empty((b, c, n)).mT


def check_finite(rows_bnc: Tensor, name: str) -> None:
    """Refuse NaN and infinity; waits for the device."""
    finite = torch.isfinite(rows_bnc).all(dim=2).all(dim=1)
    if not bool(finite.all()):
        samples = torch.nonzero(~finite).flatten().tolist()
        raise ValueError(
            f"`{name}` must be finite; got NaN or infinity in {len(samples)} of "
            f"{len(finite)} samples (the first is {samples[0]}). Look for the layer or the "
            f"step that diverged, or lower the learning rate."
        )


@contextmanager
def _plain_float32(rows_bnc: Tensor) -> Iterator[None]:
    """Multiply in whole float32, whatever the user lets other layers do: no autocast, no TF32."""
    with torch.no_grad(), torch.autocast(rows_bnc.device.type, enabled=False):
        backend = torch.backends.cuda if rows_bnc.is_cuda else torch.backends.mkldnn
        if hasattr(backend, "matmul") and hasattr(backend.matmul, "fp32_precision"):
            before = backend.matmul.fp32_precision
            backend.matmul.fp32_precision = "ieee"
            try:
                yield
            finally:
                backend.matmul.fp32_precision = "none"  # what was inherited stays inherited
                if backend.matmul.fp32_precision != before:
                    backend.matmul.fp32_precision = before
        else:  # before torch 2.9
            old = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(old)
