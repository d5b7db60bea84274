"""Top right singular vectors of many maps at once, with their gradient.

float32 maps go to the subspace iteration of `graph_kd._leading`. float64 maps, and the samples that
float32 does not resolve, go to the whole decomposition of `graph_kd._svd_exact`.

Axes: ``b`` sample, ``n`` position, ``c`` channel, ``k`` singular vector, ``j`` one that is used,
``s`` row of the Gram matrix of the shorter side, min(n, c).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import repeat
from torch import Tensor

from graph_kd._checks import check_finite
from graph_kd._leading import fast_gradient, fast_vectors
from graph_kd._precision import converted, has_float64, whole_float32
from graph_kd._svd_exact import exact_gradient, exact_vectors

__all__ = ["TopVectors", "top_singular_vectors"]


class TopVectors(NamedTuple):
    """Hold the top singular vectors of a batch of maps, and what their gradient needs.

    Shape:
        - all: unit vectors with canonical signs, ``b k c``, without gradient
        - null: whether the singular value is zero up to rounding, ``b k``; if capturable, also
          whether the vector was not found
        - values: squared singular values, largest first, ``b k``; float64 maps: all, ``b s``, not
          squared
        - basis: Gram matrix of the shorter side, ``b s s``; float64 maps: all vectors, ``b s c``
        - doubtful: which samples need float64, ``b``. Unless capturable, they have been decomposed
          in float64, and the flags are on the host
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
        saved = (self.values, self.basis, self.doubtful, self.capturable)
        vectors: Tensor = _WithGradient.apply(self.rows, index, self.all, *saved)  # type: ignore[no-untyped-call] # torch's own method has no types
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
        found = FIND[capturable](maps, counts, names, capturable)
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
    results = {
        i: tuple(_fake_find([rows], [counts[i]], names, capturable))
        for i, rows in enumerate(maps)
        if not len(rows)
    }
    with whole_float32(device):
        fast = [i for i, rows in enumerate(maps) if rows.dtype != torch.float64 and len(rows)]
        if fast:
            solved = fast_vectors([maps[i] for i in fast], [counts[i] for i in fast], capturable)
            results.update(zip(fast, solved, strict=True))
        if fast and not capturable:  # the one sync
            doubtful = torch.cat([found[4] for found in solved]).cpu()
            lengths = [len(maps[i]) for i in fast]
            for i, part in zip(fast, torch.split(doubtful, lengths), strict=True):
                results[i] = (*results[i][:4], part.clone())
                if bool(part.any()):
                    check_finite(maps[i], names[i])
                    some = part.nonzero()[:, 0].to(device)
                    vectors, null, *_ = exact_vectors(maps[i][some], counts[i])
                    results[i][0][some], results[i][1][some] = vectors.float(), null
        for i in set(range(len(maps))) - {*results}:
            check_finite(maps[i], names[i])
            vectors, null, values, basis = exact_vectors(maps[i], counts[i])
            every = torch.ones(len(maps[i]), dtype=torch.bool)
            results[i] = (vectors, null, values, basis, every)
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
    """Choose vectors by an index ``b j``, and pull their gradient back to the maps."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        index: Tensor | None,
        vectors: Tensor,
        values: Tensor,
        basis: Tensor,
        doubtful: Tensor,
        capturable: bool,
    ) -> Tensor:
        if index is None:
            every = torch.arange(vectors.shape[1], device=vectors.device)
            index, chosen = repeat(every, "k -> b k", b=len(vectors)), vectors
        else:
            chosen = vectors.gather(1, repeat(index, "b j -> b j c", c=vectors.shape[2]))
        ctx.save_for_backward(rows, index, chosen, values, basis, doubtful)
        ctx.capturable = capturable
        return chosen

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return GRADIENT[ctx.capturable](*ctx.saved_tensors, grad, ctx.capturable), *(None,) * 6


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
        found = (rows, index, chosen, values, basis)
        if rows.dtype == torch.float64:
            return exact_gradient(*found, grad)
        grad_rows = converted(fast_gradient(*found, grad, capturable=capturable), rows.dtype)
        if not capturable and bool(doubtful.any()):
            some = doubtful.nonzero()[:, 0].to(device)
            part, at = rows[some], index[some]
            vectors, _, own_values, own_basis = exact_vectors(part, values.shape[1])
            vectors = vectors.gather(1, repeat(at, "b j -> b j c", c=rows.shape[2]))
            exact = exact_gradient(part, at, vectors, own_values, own_basis, grad[some])
            grad_rows[some] = converted(exact, rows.dtype)
    return grad_rows


def _fake_gradient(rows: Tensor, *_others: Any) -> Tensor:
    b, n, c = rows.shape
    if rows.dtype == torch.float64 or rows.stride(-1) == 1:
        return rows.new_empty((b, n, c))
    return rows.new_empty((b, c, n)).mT


def _operators(name: str, run: Any, fake: Any, schema: str) -> dict[bool, Any]:
    """Make an operation opaque to `torch.compile`: its control flow depends on the maps' content.

    There are two, by ``capturable``: CUDA graphs must leave out the one that syncs.
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


def _refuse(_ctx: Any, *_grads: Tensor) -> None:
    raise RuntimeError(
        "The gradient of SVDFeature can not be differentiated again; leave the transfer loss "
        "out of what is differentiated twice."
    )


for operator in GRADIENT.values():
    operator.register_autograd(_refuse)
