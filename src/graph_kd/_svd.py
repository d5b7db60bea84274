"""Compress feature maps to their top right singular vectors (Lee & Song 2019, step 1).

Axes: ``b`` sample, ``c`` channel, ``h w`` space, ``n`` position (all of space, flattened), ``k``
singular vector, ``j`` one that is used, ``s`` row of the Gram matrix of the shorter side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import repeat
from torch import Tensor, nn

from graph_kd._checks import check_count, check_finite
from graph_kd._features import to_rows
from graph_kd._leading import fast_gradient, fast_vectors
from graph_kd._precision import has_float64, whole_float32
from graph_kd._svd_exact import exact_gradient, exact_vectors

__all__ = ["SVDFeature", "TopVectors", "top_singular_vectors"]


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
      all-zero map gives such vectors and zero gradient, and so does a map whose largest singular
      value is below 1e-19 (float64: 1e-154). The gradient can not be differentiated again.
    - Precision: float32 and half-precision maps are solved in float32, whatever autocast or TF32
      allow, and come out as float32. Where a returned value stands 1 % off its neighbours,
      1 - |cos| is below 1e-6 and the gradient within 1e-3 of the true one. Samples that float32 can
      not resolve are decomposed in float64, as float64 maps are. On a device without float64 the
      CPU does the work.

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
        (found,) = top_singular_vectors([rows_bnc], [self.k], ["features"])
        return found.vectors()

    def extra_repr(self) -> str:
        """Name the settings in ``print(module)``."""
        return f"k={self.k}, channel_dim={self.channel_dim}"


class TopVectors(NamedTuple):
    """Hold the top singular vectors of a batch of maps, and what their gradient needs.

    Shape:
        - all: unit vectors with canonical signs, ``b k c``, without gradient
        - null: whether the singular value is zero up to rounding, ``b k``
        - values: squared singular values, largest first, ``b k``; float64 maps: all, ``b s``, not
          squared
        - basis: Gram matrix of the shorter side, ``b s s``; float64 maps: all vectors, ``b s c``
        - doubtful: which samples want float64, ``b``; unless capturable, on the host, and they have
          got it
        - rows: the maps, ``b n c``
    """

    all: Tensor
    null: Tensor
    values: Tensor
    basis: Tensor
    doubtful: Tensor
    rows: Tensor
    capturable: bool

    def vectors(self, index: Tensor | None = None) -> Tensor:
        """Return the vectors, or those of an index ``b j``, with their gradient, ``b j c``."""
        *found, rows, capturable = self
        vectors: Tensor = _WithGradient.apply(rows, index, *found, capturable)  # type: ignore[no-untyped-call] # torch's own method has no types
        return vectors


def top_singular_vectors(
    maps: list[Tensor], counts: list[int], names: list[str], *, capturable: bool = False
) -> list[TopVectors]:
    """Return the top singular vectors of several batches ``b n c`` at once; see `SVDFeature`."""
    for rows, k, name in zip(maps, counts, names, strict=True):
        if k > (most := min(rows.shape[1:])):
            raise ValueError(
                f"`k` must be at most min(positions, channels) = {most} for `{name}`; got {k}."
            )
    with torch.no_grad():
        detached = [rows.detach() for rows in maps]
        found = FIND[capturable](detached, counts, names, capturable)
    return [
        TopVectors(*found[5 * i : 5 * i + 5], rows, capturable)  # type: ignore[call-arg] # five
        for i, rows in enumerate(maps)
    ]


def _find(
    maps: list[Tensor], counts: list[int], names: list[str], capturable: bool
) -> list[Tensor]:
    """Return the first five of `TopVectors`, map after map."""
    device = maps[0].device
    if not has_float64(device):
        found = _find([rows.cpu() for rows in maps], counts, names, False)
        return [t if i % 5 == 4 else t.to(device) for i, t in enumerate(found)]
    results: dict[int, tuple[Tensor, ...]] = {}
    with whole_float32(device):
        fast = [i for i, rows in enumerate(maps) if rows.dtype != torch.float64 and len(rows)]
        if fast:
            solved = fast_vectors([maps[i] for i in fast], [counts[i] for i in fast], capturable)
            results.update(zip(fast, solved, strict=True))
        if fast and not capturable:  # here, and nowhere else, the host waits for the device
            doubtful = torch.cat([found[4] for found in solved]).cpu()
            lengths = [len(maps[i]) for i in fast]
            for i, part in zip(fast, torch.split(doubtful, lengths), strict=True):
                results[i] = (*results[i][:4], part.clone())
                if bool(part.any()):
                    check_finite(maps[i], names[i])
                    some = part.nonzero()[:, 0].to(device)
                    vectors, null, *_ = exact_vectors(maps[i][some], counts[i])
                    results[i][0][some], results[i][1][some] = vectors.float(), null
        for i in set(range(len(maps))) - {*fast}:
            check_finite(maps[i], names[i])
            vectors, null, values, basis = exact_vectors(maps[i], counts[i])
            own = torch.promote_types(maps[i].dtype, torch.float32)  # an empty map may be of any
            every = torch.ones(len(maps[i]), dtype=torch.bool)
            results[i] = (vectors.to(own), null, values.to(own), basis.to(own), every)
    return [tensor for i in range(len(maps)) for tensor in results[i]]


def _fake_find(
    maps: list[Tensor], counts: list[int], _names: list[str], capturable: bool
) -> list[Tensor]:
    results = []
    for rows, k in zip(maps, counts, strict=True):
        (b, n, c), double = rows.shape, rows.dtype == torch.float64
        s, real = min(n, c), rows.new_empty(0, dtype=torch.float64 if double else torch.float32)
        vectors, values, basis = (b, k, c), (b, s if double else k), (b, s, c if double else s)
        results += [real.new_empty(vectors), rows.new_empty((b, k), dtype=torch.bool)]
        results += [real.new_empty(values), real.new_empty(basis)]
        results += [torch.empty(b, dtype=torch.bool, device=rows.device if capturable else "cpu")]
    return results


class _WithGradient(torch.autograd.Function):
    """Choose vectors, and pull their gradient back to the maps."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        index: Tensor | None,
        vectors: Tensor,
        _null: Tensor,
        values: Tensor,
        basis: Tensor,
        doubtful: Tensor,
        capturable: bool,
    ) -> Tensor:
        if index is None:
            index = torch.arange(vectors.shape[1], device=vectors.device)
            index, chosen = repeat(index, "k -> b k", b=len(vectors)), vectors.clone()
        else:
            chosen = vectors.gather(1, repeat(index, "b j -> b j c", c=vectors.shape[2]))
        ctx.save_for_backward(rows, index, chosen, values, basis, doubtful)
        ctx.capturable = capturable
        return chosen

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *saved = ctx.saved_tensors
        with torch.no_grad():
            grad_rows = GRADIENT[ctx.capturable](rows, *saved, grad, ctx.capturable)
        return _once(grad_rows, rows, grad), *(None,) * 7


def _gradient(
    rows: Tensor,
    index: Tensor,
    chosen: Tensor,
    values: Tensor,
    basis: Tensor,
    doubtful: Tensor,
    grad: Tensor,
    capturable: bool,
) -> Tensor:
    """Pull the gradient ``b j c`` of the chosen vectors back to the maps, ``b n c``."""
    device = rows.device
    if not has_float64(device):
        moved = (t.cpu() for t in (rows, index, chosen, values, basis, doubtful, grad))
        gradient: Tensor = GRADIENT[False](*moved, False).to(device)
        return gradient
    with whole_float32(device):
        if rows.dtype == torch.float64:
            return exact_gradient(rows, index, chosen, values, basis, grad)
        fast = (rows, index, chosen, values, basis, grad.float())
        grad_rows = fast_gradient(*fast, bounded=capturable)
        if not capturable and bool(doubtful.any()):
            some = doubtful.nonzero()[:, 0].to(device)
            part, at = rows[some], index[some]
            vectors, _, own_values, own_basis = exact_vectors(part, values.shape[1])
            vectors = vectors.gather(1, repeat(at, "b j -> b j c", c=rows.shape[2]))
            grad_rows[some] = exact_gradient(part, at, vectors, own_values, own_basis, grad[some])
    return grad_rows


def _fake_gradient(rows: Tensor, *_others: Any) -> Tensor:
    b, n, c = rows.shape
    if rows.dtype == torch.float64 or rows.stride(-1) == 1:
        return rows.new_empty((b, n, c))
    return rows.new_empty((b, c, n)).mT


def _operators(name: str, run: Any, fake: Any, schema: str) -> dict[bool, Any]:
    """Make an operation opaque to `torch.compile`, as its course depends on the content of maps.

    Twice: CUDA graphs must leave out the one that waits for the device, not the capturable one.
    """
    syncs = getattr(torch.Tag, "cudagraph_unsafe", None)
    operators = {}
    for capturable, suffix in ((False, ""), (True, "_capturable")):
        tags = {"tags": [syncs]} if syncs is not None and not capturable else {}
        operators[capturable] = torch.library.custom_op(
            f"graph_kd::{name}{suffix}", run, mutates_args=(), schema=schema, **tags
        )
        operators[capturable].register_fake(fake)
    return operators


FIND = _operators(
    "top_vectors",
    _find,
    _fake_find,
    "(Tensor[] maps, int[] counts, str[] names, bool capturable) -> Tensor[]",
)
GRADIENT = _operators(
    "top_vectors_gradient",
    _gradient,
    _fake_gradient,
    "(Tensor rows, Tensor index, Tensor chosen, Tensor values, Tensor basis, Tensor doubtful, "
    "Tensor grad, bool capturable) -> Tensor",
)


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
