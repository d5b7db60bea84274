"""Hand the teacher's graphs to the student (Lee & Song 2019, L_transfer; step 4).

Axes: ``b`` sample, ``c`` channel, ``k`` singular vector, ``m`` head, ``i`` graph row (back-end
sample), ``j`` graph column (front-end sample).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graph_kd._checks import check_choice, check_count, check_floating
from graph_kd._distributed import (
    HoldsProcessGroup,
    check_equal_batches,
    check_process_group,
    gather_rows,
)
from graph_kd._estimator import MultiHeadGraphEstimator
from graph_kd._svd import align_singular_vectors, channel_count, to_rows, top_singular_vectors

__all__ = ["GraphTransferLoss"]

BLOCK_ENTRIES = 1024 * 1024  # of a graph, a head

P = TypeVar("P")
Squash = Literal["scaled", "tanh"] | Callable[[Tensor], Tensor] | None


class GraphTransferLoss(HoldsProcessGroup, nn.Module):
    """Make a student embed a batch as its teacher does: compare their graphs, pair by pair.

    Sensing points are layers at which teacher and student have the same number of channels, front
    to back; each two neighbours are a pair with an estimator of its own. First train the estimators
    with `estimator_loss` on the frozen teacher, then train the student with `forward`.

    Equation: Lee & Song 2019, L_transfer = Σ_pairs Σ_m,i,j G^S (log G^S - log G^T), natural
    logarithm, G = softmax_j(squash(S)).

    Differs from the source: nothing by default; ``squash="tanh"`` is the authors' program.

    Gradient: `forward` reaches the student's features alone. The estimators are used in inference
    mode whatever `train` says: no gradient to them or the teacher, no running statistic moves.
    `estimator_loss` reaches the estimators alone. Both compute in the estimators' dtype, under
    autocast too.

    Args:
        channels: Channels at each sensing point, front to back; at least two. Counts.
        num_heads: Attention heads of each estimator. Count.
        k: Singular vectors of the teacher that describe a sample at a point. Above one they are
            taken as one vector of k · c entries. Count, ≤ min(positions, channels) at every point.
        student_k: Candidates from which each teacher vector picks its student vector. Count ≥ k;
            points with fewer positions or channels offer as many as they have.
        squash: What is done to the logits of teacher and student before the softmax. None: nothing
            (the poster). "tanh": the authors' program; it saturates on logits beyond ±2 and then
            carries no gradient. "scaled": division by the square root of the head width (ours). A
            callable maps logits ``m i j`` to logits; one of -∞ takes an edge out of both graphs.
        reduction: "sum" over heads, rows and columns (the poster), or "batchmean", that sum
            divided by the number of samples.
        process_group: A `torch.distributed` group whose global batch the graphs span: each process
            takes its own rows against all columns, and only singular vectors travel. The mean over
            processes of the losses, and of the gradients, is that of one process holding the whole
            batch. `estimator_loss` is the whole batch's on every process. Every process must hold
            the same number of samples. Copies keep the group, pickles do not: set the attribute
            again, or the graphs are those of each process's own batch.
        block_rows: Rows of a graph that are held at a time; their logits are computed again in the
            backward pass, so that memory grows linearly in the batch. None takes whole graphs up to
            1024 × 1024 entries a head, and blocks of as many entries above. A callable ``squash``
            sees the rows of a block. Count.

    Shape:
        - features: one tensor a sensing point, ``b c h w``, ``b c t h w``, ``b n c`` or ``b c``;
          teacher and student may differ in rank and in space; of a mapping its values, in order
        - returns: scalar

    Raises:
        TypeError: features are no sequence of floating-point tensors, or of a precision higher
            than the estimators'.
        ValueError: their count, channels, batch, or device does not fit, or they hold NaN. The
            message names the point.

    Example:
        >>> import torch
        >>> from graph_kd import GraphTransferLoss
        >>> teacher = [torch.randn(8, 16, 4, 4), torch.randn(8, 32, 2, 2)]
        >>> student = [torch.randn(8, 16, 4, 4), torch.randn(8, 32, 2, 2)]
        >>> transfer = GraphTransferLoss(channels=[16, 32])
        >>> transfer.estimator_loss(teacher).shape, transfer(student, teacher).shape
        (torch.Size([]), torch.Size([]))
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_heads: int = 8,
        *,
        k: int = 1,
        student_k: int = 4,
        squash: Squash = None,
        reduction: Literal["sum", "batchmean"] = "sum",
        process_group: dist.ProcessGroup | None = None,
        block_rows: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(channels, Sequence) or len(channels) < 2:
            raise ValueError(
                "`channels` must list the channel counts of at least two sensing points, front to "
                f"back; got {channels!r}."
            )
        self.channels = tuple(check_count(f"channels[{p}]", c) for p, c in enumerate(channels))
        self.k = check_count("k", k)
        self.student_k = check_count("student_k", student_k, minimum=k)
        check_choice("squash", squash, (None, "scaled", "tanh"), or_callable=True)
        check_choice("reduction", reduction, ("sum", "batchmean"), or_callable=False)
        self.squash = squash
        self.reduction = reduction
        self.process_group = check_process_group(process_group)
        self.block_rows = None if block_rows is None else check_count("block_rows", block_rows)
        self.estimators = nn.ModuleList(
            MultiHeadGraphEstimator(k * front, k * back, num_heads)
            for front, back in _neighbours(self.channels)
        )

    def estimator_loss(self, teacher_features: Iterable[Tensor]) -> Tensor:
        """Return L_MHAN summed over pairs; it trains the estimators on the teacher.

        Until it has settled: heads begin with logits of a large spread, and graphs of a few edges a
        row, which say little of the data (`graphs` shows them).
        """
        teacher = self._check("teacher_features", teacher_features)
        check_equal_batches(len(teacher[0]), teacher[0].device, self.process_group)
        rows = [gather_rows(row, self.process_group) for row in self._compress_teacher(teacher)]
        losses = []
        for estimator, (front, back) in zip(self._heads, _neighbours(rows), strict=True):
            kept_heads = estimator.draw_kept_heads(back)
            if kept_heads is not None and self.process_group is not None:
                # Processes draw differently, but must train the same estimator.
                first = dist.get_global_rank(self.process_group, 0)
                dist.broadcast(kept_heads, src=first, group=self.process_group)
            losses.append(estimator.loss(front, back, kept_heads=kept_heads))
        return torch.stack(losses).sum()

    def forward(
        self, student_features: Iterable[Tensor], teacher_features: Iterable[Tensor]
    ) -> Tensor:
        """Return L_transfer; it trains the student."""
        student = self._check("student_features", student_features)
        teacher = self._check("teacher_features", teacher_features, batch=len(student[0]))
        check_equal_batches(len(student[0]), student[0].device, self.process_group)
        student_rows, teacher_rows = self._compress_pair(student, teacher)
        pairs = [
            self._pair_loss(*pair)
            for pair in zip(
                self._heads, _neighbours(student_rows), _neighbours(teacher_rows), strict=True
            )
        ]
        # Over processes the mean is taken later: it must give the sum over all rows.
        processes = 1 if self.process_group is None else self.process_group.size()
        samples = len(student[0]) if self.reduction == "batchmean" else 1 / processes
        return torch.stack(pairs).sum() / samples

    @torch.no_grad()
    def graphs(
        self, features: Iterable[Tensor], align_to: Iterable[Tensor] | None = None
    ) -> list[Tensor]:
        """Return the graphs that the transfer compares, one ``m i j`` a pair, to look at.

        Args:
            features: Feature maps of a teacher or a student, one a sensing point.
            align_to: The teacher's features, where ``features`` are a student's: its vectors are
                aligned as in `forward`. Without it the top k vectors are taken as they are.
        """
        checked = self._check("features", features)
        check_equal_batches(len(checked[0]), checked[0].device, self.process_group)
        if align_to is None:
            rows = self._compress_teacher(checked, name="features")
        else:
            teacher = self._check("align_to", align_to, batch=len(checked[0]))
            rows, _ = self._compress_pair(checked, teacher, names=("features", "align_to"))
        with torch.autocast(rows[0].device.type, enabled=False):
            return [
                self._log_graph(*self._embeddings(estimator, front, back)).exp()
                for estimator, (front, back) in zip(self._heads, _neighbours(rows), strict=True)
            ]

    def extra_repr(self) -> str:
        """Name the settings in ``print(module)``."""
        return (
            f"channels={list(self.channels)}, k={self.k}, student_k={self.student_k}, "
            f"squash={self.squash!r}, reduction={self.reduction!r}"
        )

    def _compress_teacher(
        self, features: list[Tensor], *, name: str = "teacher_features"
    ) -> list[Tensor]:
        with torch.no_grad():
            return [
                self._as_row(self._vectors(f, self.k, f"{name}[{p}]"))
                for p, f in enumerate(features)
            ]

    def _compress_pair(
        self,
        student: list[Tensor],
        teacher: list[Tensor],
        *,
        names: tuple[str, str] = ("student_features", "teacher_features"),
    ) -> tuple[list[Tensor], list[Tensor]]:
        teacher_rows, student_rows = [], []
        for p, (student_map, teacher_map) in enumerate(zip(student, teacher, strict=True)):
            with torch.no_grad():
                target = self._vectors(teacher_map, self.k, f"{names[1]}[{p}]")
            candidates = self._vectors(student_map, self.student_k, f"{names[0]}[{p}]")
            student_rows.append(self._as_row(align_singular_vectors(candidates, target)))
            teacher_rows.append(self._as_row(target))
        return student_rows, teacher_rows

    def _vectors(self, features: Tensor, count: int, name: str) -> Tensor:
        """Return the top ``count`` singular vectors, or all there are but at least k."""
        matrix = to_rows(features, name=name)
        available = max(self.k, min(count, *matrix.shape[1:]))
        return top_singular_vectors(matrix, available, name=name)

    def _as_row(self, vectors_bkc: Tensor) -> Tensor:
        """Put the k vectors of a sample side by side, as one unit vector of the heads' dtype."""
        row: Tensor = rearrange(vectors_bkc, "b k c -> b (k c)") / math.sqrt(self.k)
        weight = self._heads[0].f2.weight
        return row.to(weight.dtype)

    def _embeddings(
        self, estimator: MultiHeadGraphEstimator, front: Tensor, back: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return θ of this process's samples and φ of the group's."""
        return estimator.frozen_embeddings(gather_rows(front, self.process_group), back)

    def _log_graph(self, theta: Tensor, phi: Tensor) -> Tensor:
        """Return log G of the rows that ``theta`` has."""
        logits: Tensor = einsum(theta, phi, "m i d, m j d -> m i j")
        log_graph = self._squashed(logits, theta.shape[-1]).log_softmax(dim=-1)
        if not callable(self.squash):
            return log_graph
        # A callable may mask edges by -∞, and 0 · (∞ - ∞) must not make the divergence NaN.
        return log_graph.clamp_min(torch.finfo(log_graph.dtype).min)

    def _pair_loss(
        self,
        estimator: MultiHeadGraphEstimator,
        student: tuple[Tensor, Tensor],
        teacher: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Return Σ_m,i,j G^S (log G^S - log G^T) of one pair (front, back), by blocks of rows."""

        def divergence(theta: Tensor, theta_of_teacher: Tensor) -> Tensor:
            with torch.autocast(theta.device.type, enabled=False):
                with torch.no_grad():
                    teacher_log = self._log_graph(theta_of_teacher, teacher_phi)
                student_log = self._log_graph(theta, phi)
                return (student_log.exp() * (student_log - teacher_log)).sum()

        with torch.autocast(student[0].device.type, enabled=False):
            theta, phi = self._embeddings(estimator, *student)
            with torch.no_grad():
                teacher_theta, teacher_phi = self._embeddings(estimator, *teacher)
        rows = self.block_rows or max(1, BLOCK_ENTRIES // phi.shape[1])
        if rows >= theta.shape[1]:
            return divergence(theta, teacher_theta)
        # Graphs of a block are made again in the backward pass; none but its own is ever held.
        blocks = zip(
            torch.split(theta, rows, dim=1), torch.split(teacher_theta, rows, dim=1), strict=True
        )
        losses = [checkpoint(divergence, *block, use_reentrant=False) for block in blocks]
        return torch.stack(losses).sum()

    def _squashed(self, logits: Tensor, head_channels: int) -> Tensor:
        if self.squash is None:
            return logits
        if self.squash == "tanh":
            return logits.tanh()
        if self.squash == "scaled":
            return logits / math.sqrt(head_channels)
        squashed: Tensor = self.squash(logits)
        if not isinstance(squashed, Tensor) or squashed.shape != logits.shape:
            got = tuple(squashed.shape) if isinstance(squashed, Tensor) else squashed
            raise ValueError(
                f"`squash` must return logits of the shape it was given, {tuple(logits.shape)}; "
                f"got {got}."
            )
        return squashed

    @property
    def _heads(self) -> list[MultiHeadGraphEstimator]:
        return cast(list[MultiHeadGraphEstimator], list(self.estimators))

    def _check(
        self, name: str, features: Iterable[Tensor], *, batch: int | None = None
    ) -> list[Tensor]:
        """Return the features as a list that fits the sensing points and the estimators."""
        if isinstance(features, Tensor) or not isinstance(features, Iterable):
            raise TypeError(
                f"`{name}` must be a list with one tensor a sensing point; "
                f"got {type(features).__name__}."
            )
        maps = list(features.values() if isinstance(features, Mapping) else features)
        if len(maps) != len(self.channels):
            raise ValueError(
                f"`{name}` must hold {len(self.channels)} tensors, one for each entry of "
                f"channels={list(self.channels)}; got {len(maps)}."
            )
        for p, features_p in enumerate(maps):
            self._check_point(p, f"{name}[{p}]", features_p)
            batch = len(features_p) if batch is None else batch
            if len(features_p) != batch:
                raise ValueError(
                    f"`{name}[{p}]` must hold the same {batch} samples as the points before it; "
                    f"got {len(features_p)} in shape {tuple(features_p.shape)}."
                )
        return maps

    def _check_point(self, p: int, point: str, features: Tensor) -> None:
        weight = self._heads[0].f2.weight
        check_floating(point, features)
        channels = channel_count(features, name=point)
        if channels != self.channels[p]:
            raise ValueError(
                f"`{point}` must have {self.channels[p]} channels, as channels[{p}] says; "
                f"got {channels} in shape {tuple(features.shape)}."
            )
        processes = 1 if self.process_group is None else self.process_group.size()
        if len(features) * processes < 2:
            raise ValueError(
                f"`{point}` must hold at least 2 samples: a graph relates samples to each "
                f"other; got {len(features)}. Drop the last incomplete batch of an epoch."
            )
        if features.device != weight.device:
            raise ValueError(
                f"`{point}` must be on {weight.device}, where the estimators are; "
                f"got {features.device}. Move one of them with `.to(...)`."
            )
        vector_dtype = torch.promote_types(features.dtype, torch.float32)
        if torch.promote_types(vector_dtype, weight.dtype) != weight.dtype:
            raise TypeError(
                f"`{point}` of {features.dtype} gives vectors of {vector_dtype}, which do "
                f"not fit estimators of {weight.dtype}. Convert the loss with "
                f"`.to({vector_dtype})`."
            )


def _neighbours(points: Sequence[P]) -> list[tuple[P, P]]:
    """Pair each sensing point with the next."""
    return list(zip(points[:-1], points[1:], strict=True))  # noqa: RUF007 # torch 2.4 can not compile itertools.pairwise
