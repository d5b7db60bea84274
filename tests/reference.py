"""Slow loops straight from the equations, for the fast code to be held against."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def top_right_singular_vectors(rows_bnc: Tensor, k: int) -> Tensor:
    """Take a full SVD a sample; signs so that the mean position is on the positive side."""
    vectors = []
    for matrix in rows_bnc:
        _, _, right = torch.linalg.svd(matrix, full_matrices=False)
        top = right[:k]
        side = top @ matrix.mean(dim=0)
        vectors.append(torch.where(side < 0, -1.0, 1.0)[:, None] * top)
    return torch.stack(vectors)


def align(student_bic: Tensor, teacher_bkc: Tensor) -> Tensor:
    """Pick per teacher vector the student vector of largest |cosine|, with its sign."""
    aligned = torch.zeros_like(teacher_bkc)
    for b, vectors in enumerate(teacher_bkc):
        for k, target in enumerate(vectors):
            cosines = [float(target @ candidate) for candidate in student_bic[b]]
            best = max(range(len(cosines)), key=lambda i: abs(cosines[i]))
            aligned[b, k] = student_bic[b, best] * (-1 if cosines[best] < 0 else 1)
    return aligned


def batch_norm(rows: Tensor, norm: torch.nn.BatchNorm1d, *, training: bool) -> Tensor:
    """Normalise by the batch (biased variance) or by the running statistics."""
    mean = rows.mean(dim=0) if training else norm.running_mean
    variance = rows.var(dim=0, unbiased=False) if training else norm.running_var
    return (rows - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def logits(estimator: torch.nn.Module, front: Tensor, back: Tensor, *, training: bool) -> Tensor:
    """S[m, i, j] = θ_m(back_i) · φ_m(front_j), entry by entry."""
    theta = batch_norm(back @ estimator.theta[0].weight.T, estimator.theta[1], training=training)
    phi = batch_norm(front @ estimator.phi[0].weight.T, estimator.phi[1], training=training)
    d = estimator.head_channels
    s = torch.zeros(estimator.num_heads, len(back), len(front), dtype=front.dtype)
    for m in range(estimator.num_heads):
        head = slice(m * d, (m + 1) * d)
        for i in range(len(back)):
            for j in range(len(front)):
                s[m, i, j] = theta[i, head] @ phi[j, head]
    return s


def softmax(row: Tensor) -> Tensor:
    """exp / sum of exp, over a vector."""
    weights = (row - row.max()).exp()
    return weights / weights.sum()


def estimate(
    estimator: torch.nn.Module, front: Tensor, back: Tensor, kept: Tensor, *, training: bool
) -> Tensor:
    """V̄_B = f2([kept · G_a f1(V_F)]_a), unit rows, sample by sample."""
    s = logits(estimator, front, back, training=training)
    hidden = batch_norm(
        front @ estimator.f1[0].weight.T, estimator.f1[1], training=training
    ).clamp_min(0)
    rows = []
    for i in range(len(back)):
        gathered = [
            kept[m, i] * sum(g * h for g, h in zip(softmax(s[m, i]), hidden, strict=True))
            for m in range(estimator.num_heads)
        ]
        output = estimator.f2.weight @ torch.cat(gathered) + estimator.f2.bias
        rows.append(output / output.norm())
    return torch.stack(rows)


def transfer_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Σ G^S (log G^S - log G^T), row by row."""
    total = torch.zeros((), dtype=student_logits.dtype)
    for student_graph, teacher_graph in zip(student_logits, teacher_logits, strict=True):
        for student_row, teacher_row in zip(student_graph, teacher_graph, strict=True):
            p, q = softmax(student_row), softmax(teacher_row)
            total = total + (p * (p.log() - q.log())).sum()
    return total


def frozen_logits(estimator: torch.nn.Module, front: Tensor, back: Tensor) -> Tensor:
    """Return the products of the frozen embeddings, which is what the transfer compares."""
    theta, phi = estimator.embeddings(front, back, frozen=True)
    return theta @ phi.mT


def total(gradients: Sequence[Tensor | None]) -> Tensor | None:
    """Sum, in float64, what is not None."""
    given = [g.to(torch.promote_types(g.dtype, torch.float64)) for g in gradients if g is not None]
    return sum(given) if given else None


def norm(gradients: Sequence[Tensor | None]) -> Tensor:
    """‖·‖ of all that is not None."""
    return torch.cat([g.flatten().abs() for g in gradients if g is not None]).norm()


def factor(gate: str | Callable, task_norm: Tensor, transfer_norm: Tensor, bound: float) -> float:
    """min(1, bound · ‖task‖ / ‖transfer‖), or 1 / (1 + exp(-τ)), or what the gate returns."""
    if callable(gate):
        return gate(task_norm, transfer_norm).item()
    ratio = (task_norm / transfer_norm).item()  # NaN of two zeros: `min` and `max` return the 1.0
    return min(1.0, bound * ratio) if gate == "norm" else 1 / (1 + math.exp(-max(1.0, ratio)))


def gated_gradients(
    calls: Sequence[tuple[Sequence[Tensor | None], Sequence[Tensor | None]]],
    gate: str | Callable = "norm",
    scope: str = "parameter",
    bound: float = 1.0,
) -> tuple[list[Tensor | None], list[float], bool]:
    """Return Σ task + factor · Σ transfer, the factors, and whether the step is skipped."""
    task, transfer = (
        [total(gs) for gs in zip(*lists, strict=True)] for lists in zip(*calls, strict=True)
    )
    if not all(d is None or d.isfinite().all() for d in transfer):
        return task, [], True
    factors, merged = [], list(task)
    for n, (g, d) in enumerate(zip(task, transfer, strict=True)):
        if d is not None:
            task_norm = norm(task if g is None or scope == "global" else [g])
            transfer_norm = norm(transfer if scope == "global" else [d])
            factors.append(factor(gate, task_norm, transfer_norm, bound))
            merged[n] = total([g, factors[-1] * d])
    return merged, factors[:1] if scope == "global" else factors, False
