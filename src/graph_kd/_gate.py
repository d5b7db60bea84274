"""Merge two gradient lists, the transfer's gated by the task's (Lee & Song 2019, step 5).

Pure functions; `GatedGradClip` is the optimizer that applies them. Norms are Euclidean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from numbers import Real
from typing import Literal, NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["Gate", "Merged", "Scope", "gate_factors", "gradient_norms", "merge_gradients"]

Gate = Literal["norm", "sigmoid"] | Callable[[Tensor, Tensor], Tensor | float]
Scope = Literal["parameter", "global"]


class Merged(NamedTuple):
    """What `merge_gradients` returns."""

    gradients: list[Tensor | None]
    factors: Tensor
    finite: bool | Tensor


def merge_gradients(
    task: Sequence[Tensor | None],
    transfer: Sequence[Tensor | None],
    gate: Gate,
    *,
    scope: Scope,
    bound: float,
    task_reaches: Sequence[bool] | None = None,
    capturable: bool = False,
) -> Merged:
    """Return task + factor · transfer as new tensors, None where both are None.

    ``factors`` holds one entry for each transfer gradient that is not None, or a single one for
    scope "global", none without a transfer gradient; they are zero, and ``finite`` is False, if a
    transfer norm or a factor is not.

    ``task_reaches`` tells where the task gradient is one, by default wherever it is not None. Where
    it is not, and is zero, the norm of all task gradients takes the place of its own.

    The host looks once whether all is finite; if ``capturable`` not at all, and ``finite`` is a
    tensor.
    """
    reached = [n for n, gradient in enumerate(transfer) if gradient is not None]
    if not reached:
        return Merged([_clone(gradient) for gradient in task], torch.zeros(0), True)
    if task_reaches is None:
        task_reaches = [gradient is not None for gradient in task]
    transfer_norm = gradient_norms([transfer[n] for n in reached])
    task_norms = gradient_norms(task).to(transfer_norm)
    whole = torch.linalg.vector_norm(task_norms)
    if scope == "global":
        transfer_norm = torch.linalg.vector_norm(transfer_norm, keepdim=True)
        task_norm = rearrange(whole, "-> 1")
    else:
        own = [(task_norms[n], task_reaches[n]) for n in reached]
        # By `where`, not by a look at the norm, which would sync.
        task_norm = torch.stack(
            [norm if reaches else torch.where(norm > 0, norm, whole) for norm, reaches in own]
        )

    good = torch.isfinite(transfer_norm).all()
    # A callable must cope with norms of zero, not with infinite ones.
    transfer_norm = torch.where(good, transfer_norm, 0)
    factors = gate_factors(task_norm, transfer_norm, gate, bound=bound)
    good = good & torch.isfinite(factors).all()
    factors = torch.where(good, factors, 0)
    finite: bool | Tensor = good if capturable else bool(good)
    gated = {} if finite is False else _gated(transfer, reached, factors, finite)
    both = [n for n in gated if task[n] is not None]
    sums: Sequence[Tensor] = []
    if both:
        sums = torch._foreach_add([cast(Tensor, task[n]) for n in both], [gated[n] for n in both])
    gated.update(zip(both, sums, strict=True))
    gradients = [gated[n] if n in gated else _clone(gradient) for n, gradient in enumerate(task)]
    return Merged(gradients, factors, finite)


def _clone(gradient: Tensor | None) -> Tensor | None:
    """Return new memory: autograd may give two parameters the same, and `p.grad` is changed."""
    return None if gradient is None else gradient.clone()


def _gated(
    transfer: Sequence[Tensor | None],
    reached: list[int],
    factors: Tensor,
    finite: bool | Tensor,
) -> dict[int, Tensor]:
    """Return factor · transfer of those that are not None, zero where not all is finite."""
    given = [cast(Tensor, transfer[n]) for n in reached]
    each = [f.to(t.device) for f, t in zip(factors.expand(len(given)), given, strict=True)]
    precise = [t.to(torch.promote_types(t.dtype, factors.dtype)) for t in given]
    gated = list(torch._foreach_mul(precise, each))
    if isinstance(finite, Tensor):
        gated = [torch.where(finite.to(g.device), g, 0) for g in gated]
    return {n: g.to(t.dtype) for n, g, t in zip(reached, gated, given, strict=True)}


def gate_factors(task_norm: Tensor, transfer_norm: Tensor, gate: Gate, *, bound: float) -> Tensor:
    """Return the factor of each transfer gradient from the norms of both, entry by entry."""
    if gate == "norm":
        limit = bound * task_norm
        return torch.where(transfer_norm > limit, limit / transfer_norm, 1.0)
    if gate == "sigmoid":
        # A transfer gradient of zero may have any factor; 0 / 0 must not make it NaN.
        return torch.sigmoid((task_norm / transfer_norm).nan_to_num(1.0).clamp_min(1.0))
    factors = []
    for task, transfer in zip(task_norm, transfer_norm, strict=True):
        factor = gate(task, transfer)
        if not isinstance(factor, (Tensor, Real)):
            raise ValueError(f"`gate` must return a single number; it returned {factor!r}.")
        factor = torch.as_tensor(factor).to(task_norm)
        if factor.numel() != 1:
            raise ValueError(
                f"`gate` must return a single number; it returned shape {tuple(factor.shape)}."
            )
        factors.append(rearrange(factor, "... -> (...)"))
    return torch.cat(factors)


def gradient_norms(gradients: Sequence[Tensor | None]) -> Tensor:
    """Return the Euclidean norm of each gradient, in float32 at least; zero for None.

    They come on the device of the first gradient and in the highest precision of any.
    """
    given = [gradient for gradient in gradients if gradient is not None]
    dtype = reduce(torch.promote_types, (g.dtype for g in given), torch.float32)
    device = given[0].device if given else None
    none = torch.zeros((), dtype=dtype, device=device)
    norms = iter(torch._foreach_norm([g.to(dtype) for g in given]) if given else ())
    return torch.stack([none if g is None else next(norms).to(device) for g in gradients])
