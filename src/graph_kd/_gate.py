"""Merge two gradient lists, the transfer's gated by the task's (Lee & Song 2019, step 5).

Pure functions; `GatedGradClip` is the optimizer that applies them. Norms are Euclidean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from numbers import Real
from typing import Literal, NamedTuple

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
    finite: bool


def merge_gradients(
    task: Sequence[Tensor | None],
    transfer: Sequence[Tensor | None],
    gate: Gate,
    *,
    scope: Scope,
    bound: float,
    task_reaches: Sequence[bool] | None = None,
) -> Merged:
    """Return task + factor · transfer as new tensors, None where both are None.

    ``factors`` holds one entry for each transfer gradient that is not None, or a single one for
    scope "global", none without a transfer gradient; they are zero, and ``finite`` is False, if a
    transfer norm or a factor is not.

    ``task_reaches`` tells where the task gradient is one, by default wherever it is not None. Where
    it is not, and is zero, the norm of all task gradients takes the place of its own.
    """
    reached = [n for n, gradient in enumerate(transfer) if gradient is not None]
    if not reached:
        return Merged([_blend(gradient, None, None) for gradient in task], torch.zeros(0), True)
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

    finite, factors = bool(torch.isfinite(transfer_norm).all()), torch.zeros_like(transfer_norm)
    if finite:
        factors = gate_factors(task_norm, transfer_norm, gate, bound=bound)
        # The named gates are finite then; to look would be one more sync.
        finite = not callable(gate) or bool(torch.isfinite(factors).all())
    if not finite:
        factors = torch.zeros_like(transfer_norm)
    factor_of = dict(zip(reached, factors.expand(len(reached)), strict=True)) if finite else {}
    gradients = [
        _blend(*pair, factor_of.get(n)) for n, pair in enumerate(zip(task, transfer, strict=True))
    ]
    return Merged(gradients, factors, finite)


def _blend(task: Tensor | None, transfer: Tensor | None, factor: Tensor | None) -> Tensor | None:
    if transfer is None or factor is None:
        # A clone: autograd may give two parameters the same memory, and `p.grad` is changed in
        # place by those who clip or unscale it.
        return None if task is None else task.clone()
    precise = torch.promote_types(transfer.dtype, factor.dtype)
    gated = (transfer.to(precise) * factor.to(transfer.device)).to(transfer.dtype)
    if task is None:
        return gated
    return gated.add_(task) if gated.dtype == task.dtype else task + gated


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
    norms = [
        torch.zeros((), dtype=dtype, device=device)
        if gradient is None
        else torch.linalg.vector_norm(gradient, dtype=dtype).to(device)
        for gradient in gradients
    ]
    return torch.stack(norms)
