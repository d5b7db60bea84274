"""Systems shifted by leading eigenvalues: what the gradient of `SVDFeature` takes in float32.

Conjugate gradients, with what the subspace iteration of `graph_kd._eigen` has left as their
preconditioner: again thin matrix products.

Axes: ``b`` sample, ``s`` row of the Gram matrix, ``i`` wanted pair, ``p`` vector of the subspace,
the wanted ones first, ``j`` right side. Vectors are rows.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from graph_kd._orthonormal import TINY

__all__ = ["solve_shifted"]

ITERATIONS = 48  # at most
RESIDUAL = 1e-4  # of a right side, relative


def solve_shifted(
    gram: Tensor, values: Tensor, vectors: Tensor, right: Tensor, count: int, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve (λ_j - G) w_j = r_j on the complement of the eigenvector of λ_j.

    Along the wanted vectors by division. On their complement λ_j - G is positive definite:
    conjugate gradients, preconditioned by what the other vectors of the subspace know of it.

    Shape:
        - gram: ``b s s``
        - values: ``b p``, eigenvalues, largest first
        - vectors: ``b p s``, orthonormal; the first i are eigenvectors, the others nearly so
        - right: ``b j s``; its part along the eigenvector of λ_j is ignored
        - shift: ``b j``, λ, each one of the wanted values
        - returns: w ``b j s``; and whether the residual fell to `RESIDUAL`, ``b``
    """
    shift = rearrange(shift, "b j -> b j 1")
    gap = shift - rearrange(values, "b p -> b 1 p")
    inverse = torch.where(gap == 0, 0, 1 / gap)
    along = right @ vectors.mT
    if values.shape[1] == gram.shape[-1]:  # all eigenpairs are known
        return (along * inverse) @ vectors, torch.ones_like(values[:, 0], dtype=torch.bool)
    known, along = vectors[:, :count], along[..., :count]
    solution = (along * inverse[..., :count]) @ known
    # λ_j (λ_j - G)⁻¹ - 1 on the subspace, and -1 on what is projected out.
    excess = shift * inverse - 1
    excess[..., :count] = -1

    def precondition(rows: Tensor) -> Tensor:
        return torch.baddbmm(rows, (rows @ vectors.mT) * excess, vectors)

    scale = right.abs().amax(dim=-1, keepdim=True).clamp_min(TINY)
    residual = torch.baddbmm(right, along, known, alpha=-1) / scale
    rest = torch.zeros_like(residual)
    direction = precondition(residual)
    energy = _dot(residual, direction)
    # What rounding leaves of a right side that was all along the wanted vectors counts as zero.
    small = RESIDUAL**2 * energy + gram.shape[-1] * torch.finfo(gram.dtype).eps ** 2
    for _ in range(ITERATIONS):
        unsolved = energy > small
        if not bool(unsolved.any()):
            break
        image = torch.baddbmm(direction, direction / shift, gram, alpha=-1)
        # What is solved rests: its residual is rounding, some of it along the wanted vectors.
        step = torch.where(unsolved, energy / _dot(direction, image).clamp_min(TINY), 0)
        rest = torch.addcmul(rest, step, direction)
        residual = torch.addcmul(residual, step, image, value=-1)
        conditioned = precondition(residual)
        before, energy = energy, _dot(residual, conditioned)
        direction = torch.addcmul(conditioned, energy / before.clamp_min(TINY), direction)
    solved = rearrange((energy <= small).all(dim=1), "b 1 -> b")
    solution = torch.addcmul(solution, rest, scale / shift)
    # The wanted vectors are accurate to an angle, and the division by a small gap makes much of it:
    # what it has made wrong shows in the residual, and is divided once more.
    residual = torch.baddbmm(torch.addcmul(right, shift, solution, value=-1), solution, gram)
    along = (residual @ known.mT) * inverse[..., :count]
    return torch.baddbmm(solution, along, known), solved


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(dim=-1, keepdim=True)
