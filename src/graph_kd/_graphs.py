"""Compare the graphs of a student with those of its teacher (Lee & Song 2019).

Axes: ``m`` head, ``d`` head width, ``i`` graph row (back-end sample), ``j`` graph column (front-end
sample). A graph is made from the embeddings θ, ``m i d``, and φ, ``m j d``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from graph_kd._estimator import full_precision

__all__ = ["Embeddings", "Squash", "divergence", "log_graph"]

BLOCK_ENTRIES = 1024 * 1024  # of a graph, a head

Embeddings = tuple[Tensor, Tensor]
Squash = Literal["scaled", "tanh"] | Callable[[Tensor], Tensor] | None


def divergence(
    student: Embeddings, teacher: Embeddings, squash: Squash, block_rows: int | None
) -> Tensor:
    """Return Σ_m,i,j G^S (log G^S - log G^T), by blocks of rows; the teacher's are constant."""
    (theta, phi), (teacher_theta, teacher_phi) = student, teacher

    def of_rows(theta: Tensor, teacher_theta: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_log = log_graph(teacher_theta, teacher_phi, squash)
        student_log = log_graph(theta, phi, squash)
        return (student_log.exp() * (student_log - teacher_log)).sum()

    rows = block_rows or max(1, BLOCK_ENTRIES // phi.shape[1])
    if rows >= theta.shape[1]:
        return of_rows(theta, teacher_theta)
    # Graphs of a block are made again in the backward pass; none but its own is ever held.
    blocks = zip(
        torch.split(theta, rows, dim=1), torch.split(teacher_theta, rows, dim=1), strict=True
    )
    draws = callable(squash)  # maybe; to keep the random state would sync
    losses = [
        checkpoint(of_rows, *block, use_reentrant=False, preserve_rng_state=draws)
        for block in blocks
    ]
    return torch.stack(losses).sum()


def log_graph(theta: Tensor, phi: Tensor, squash: Squash) -> Tensor:
    """Return log G = log softmax_j(squash(S)), ``m i j``, of the rows that ``theta`` has."""
    with full_precision(theta):
        logits = theta @ phi.mT
        if squash == "tanh":
            logits = logits.tanh()
        elif squash == "scaled":
            logits = logits / math.sqrt(theta.shape[-1])
        elif squash is not None:
            logits = _called(squash, logits)
        log_graph = logits.log_softmax(dim=-1)
    if not callable(squash):
        return log_graph
    # A callable may mask edges by -∞, and 0 · (∞ - ∞) must not make the divergence NaN.
    return log_graph.clamp_min(torch.finfo(log_graph.dtype).min)


def _called(squash: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    squashed = squash(logits)
    got = type(squashed).__name__
    if isinstance(squashed, Tensor):
        if squashed.shape == logits.shape and squashed.is_floating_point():
            return squashed.to(logits.dtype)
        got = f"{tuple(squashed.shape)} of {squashed.dtype}"
    raise ValueError(
        "`squash` must return floating-point logits of the shape it was given, "
        f"{tuple(logits.shape)}; got {got}."
    )
