"""Merge the gradients of two losses, the transfer's gated by the task's.

Pure functions; `GatedGradClip` is the optimizer that applies them. Norms are Euclidean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from numbers import Real
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from graph_kd._gradient_sums import Sums

__all__ = ["Gate", "Scope", "merge_gradients"]

Gate = Literal["norm", "sigmoid"] | Callable[[Tensor, Tensor], Tensor | float]
Scope = Literal["parameter", "global"]


def merge_gradients(
    sums: Sequence[Sums],
    gate: Gate,
    *,
    scope: Scope,
    bound: float,
    capturable: bool,
    skip: bool | Tensor = False,
) -> tuple[list[Tensor | None], Tensor, bool | Tensor, bool | Tensor]:
    """Return task + factor · transfer as new tensors, the factors, and two answers.

    These are whether the transfer gradients were skipped, and whether a norm of theirs overflows. A
    gradient is None where both are None. There is one factor for each transfer gradient that is
    not None, or a single one for scope "global"; none without a transfer gradient. If a transfer
    norm or a factor is not finite, or where ``skip``, the transfer gradients are left out and the
    factors are zero.

    The host looks once whether all is finite. If ``capturable`` it does not, and the last two
    values are tensors.
    """
    reached = {n: s.transfer for n, s in enumerate(sums) if s.transfer is not None}
    merged: dict[int, Tensor] = {}
    factors = torch.zeros(0)
    skipped = skip  # without a transfer gradient too: a skipped step stays so
    overflows: bool | Tensor = False
    if reached:
        factors, infinite, overflows = _factors(sums, reached, gate, scope=scope, bound=bound)
        skipped = infinite if skip is False else infinite | skip
        factors = torch.where(skipped, 0, factors)
        if not capturable:
            skipped, overflows = torch.stack([skipped, overflows]).tolist()
    if reached and skipped is not True:
        gated = _times(factors, list(reached.values()))
        if isinstance(skipped, Tensor):  # zero times infinity is NaN
            gated = [torch.where(skipped.to(g.device), 0, g) for g in gated]
        tasks = [
            torch.zeros_like(g) if (task := sums[n].task) is None else task
            for n, g in zip(reached, gated, strict=True)
        ]
        merged = dict(zip(reached, torch._foreach_add(tasks, gated), strict=True))
    for n, both in enumerate(sums):
        if n not in merged and both.task is not None:
            # New memory: autograd may give two parameters the same, and `p.grad` is changed.
            merged[n] = both.task.clone()
    return [merged.get(n) for n in range(len(sums))], factors, skipped, overflows


def _factors(
    sums: Sequence[Sums], reached: dict[int, Tensor], gate: Gate, *, scope: Scope, bound: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors; if a transfer norm or a factor is not finite; if a norm is not.

    The norm of all task gradients takes the place of a norm where the task has no gradient.
    """
    norms = _norms([*(s.task for s in sums), *reached.values()])
    task_norms, transfer_norm = norms[: len(sums)], norms[len(sums) :]
    whole = torch.linalg.vector_norm(task_norms, keepdim=True)
    if scope == "global":
        task_norm, transfer_norm = whole, torch.linalg.vector_norm(transfer_norm, keepdim=True)
    else:
        # By `where`, not by a look at the norm, which would sync.
        own = [(task_norms[n : n + 1], sums[n].task_reaches) for n in reached]
        task_norm = torch.cat([t if r else torch.where(t > 0, t, whole) for t, r in own])
    finite = torch.isfinite(transfer_norm).all()
    # A callable must cope with norms of zero, not with infinite ones.
    factors = _apply(gate, task_norm, torch.where(finite, transfer_norm, 0), bound)
    return factors, ~(finite & torch.isfinite(factors).all()), ~finite


def _apply(gate: Gate, task_norm: Tensor, transfer_norm: Tensor, bound: float) -> Tensor:
    """Return the gate's factors from the norms of both gradients, entry by entry."""
    if gate == "norm":
        limit = bound * task_norm
        return torch.where(transfer_norm > limit, limit / transfer_norm, 1.0)
    if gate == "sigmoid":
        # A transfer gradient of zero may have any factor; 0 / 0 must not make it NaN.
        return torch.sigmoid((task_norm / transfer_norm).nan_to_num(1.0).clamp_min(1.0))
    factors = []
    for task, transfer in zip(task_norm, transfer_norm, strict=True):
        factor = gate(task, transfer)
        if isinstance(factor, Real):  # no copy from the host, which a CUDA graph can not hold
            factor = torch.full_like(task, float(factor))
        if not isinstance(factor, Tensor) or factor.numel() != 1:
            raise ValueError(
                f"`gate` must return a single number; it returned {factor!r}. Return a float or a "
                "tensor of one element: the factor of the transfer gradient."
            )
        factors.append(rearrange(factor.detach().to(task_norm), "... -> (...)"))
    return torch.cat(factors)


def _norms(gradients: Sequence[Tensor | None]) -> Tensor:
    """Return the norm of each gradient, zero for None, in the highest precision of any.

    That is float32 at least.
    """
    given = [gradient for gradient in gradients if gradient is not None]
    real = reduce(torch.promote_types, (g.dtype.to_real() for g in given), torch.float32)
    none = torch.zeros((), dtype=real, device=given[0].device)
    precise = [g.to(torch.promote_types(g.dtype, real)) for g in given]
    norms = iter(torch._foreach_norm(precise))
    return torch.stack([none if g is None else next(norms).to(none) for g in gradients])


def _times(factors: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    """Return factor · gradient, multiplied in the precision of the factor: it may be very small."""
    each = [f.to(g.device) for f, g in zip(factors.expand(len(gradients)), gradients, strict=True)]
    precise = [g.to(torch.promote_types(g.dtype, factors.dtype)) for g in gradients]
    products = torch._foreach_mul(precise, each)
    return [p.to(g.dtype) for p, g in zip(products, gradients, strict=True)]
