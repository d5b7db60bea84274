"""Train the student by the teacher's graphs (Lee & Song 2019, L_transfer).

Axes: ``b`` sample, ``c`` channel, ``n`` position, ``k`` singular vector, ``m`` head, ``d`` head
width, ``i`` graph row (back-end sample), ``j`` graph column (front-end sample).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from graph_kd._align import closest
from graph_kd._checks import check_bool, check_choice, check_count
from graph_kd._distributed import (
    HoldsProcessGroup,
    check_equal_batches,
    check_process_group,
    gather_rows,
    group_size,
    own_part,
)
from graph_kd._estimator import AttentionHeads, MultiHeadGraphEstimator
from graph_kd._features import (
    Layout,
    check_fit_of_heads,
    check_layouts,
    fits,
    in_order,
    read_matrices,
)
from graph_kd._forward_pass import check_fresh, check_learns, training_norms
from graph_kd._graphs import Embeddings, Squash, divergence, log_graph
from graph_kd._svd import TopVectors, top_singular_vectors

__all__ = ["GraphTransferLoss"]

T = TypeVar("T")
Matrices = dict[str, Tensor]  # the maps of one network, ``b n c``, by their names in errors


class GraphTransferLoss(HoldsProcessGroup, nn.Module):
    """Compare the graphs of a student with those of its teacher, pair by pair of layers.

    A sensing point is a layer whose feature map is read. Points are ordered front to back, and
    consecutive points form a pair. Train the teacher's attention heads, `estimators`, first, with
    `estimator_loss` on the frozen teacher. Then train the student with `forward`.

    By default student and teacher share the heads, as in the paper, and need equal channels at each
    point. With ``student_channels`` the student has attention heads of its own, `student_heads`
    (else empty): any two networks can be paired. Put ``loss.student_heads.parameters()`` into the
    student's optimizer: the transfer loss trains them together with the student.

    Equation: Lee & Song 2019, L_transfer = Σ_pairs Σ_m,i,j G^S (log G^S - log G^T), natural
    logarithm, G = softmax_j(squash(S)).

    Differs from the source: vectors of singular value zero, up to rounding, are arbitrary. The
    alignment ignores them, and where a sample has no others the heads get zeros. `SVDFeature`,
    `align_singular_vectors` and `MultiHeadGraphEstimator` name their own differences.

    Gradient: `forward` reaches the student's features and `student_heads`. The teacher's heads are
    frozen there, whatever `train` says: no gradient to them or the teacher, no running statistic
    moves. `student_heads` use the statistics of the batch in training mode and
    the running ones in evaluation mode. `estimator_loss` reaches the teacher's heads alone.
    Graphs are computed in the heads' dtype, float32 at least, under autocast too; call
    `backward` outside of it, as torch advises.

    Args:
        channels: The teacher's channels at each sensing point, front to back; at least two.
        num_heads: Attention heads of each pair, ≥ 1.
        student_channels: The student's channels at each point; gives it attention heads of its own,
            as many and as wide as the teacher's. Equal channels are allowed. The student's top k
            vectors are not aligned then, and ``student_k`` is not used.
        channel_dim: Channel axis of maps of rank 4 and 5; -1 for ``b h w c`` (Swin, the inside of
            ConvNeXt blocks). One value for both networks, or a pair (teacher, student). None means
            axis 1.
        k: Singular vectors of the teacher that describe a sample at a point. Several are
            joined to one vector of k · c entries. At least 1, at most min(positions, channels) at
            every point.
        student_k: Candidates from which each teacher vector picks its student vector. At least k;
            points with fewer positions or channels offer as many as they have.
        squash: What is done to the logits of teacher and student before the softmax. None: nothing
            (the paper's poster). "tanh": the authors' program; it saturates on logits beyond ±2,
            and then carries little gradient. "scaled" (ours, recommended with own heads): division
            by the square root of the head width. A callable maps logits ``m i j`` of either network
            to logits; -∞ removes an entry from the graph, so mask both alike.
        reduction: "sum" over heads, rows and columns (as on the poster), or "batchmean", that sum
            divided by the number of samples.
        process_group: A `torch.distributed` group whose global batch the graphs span: each process
            takes its own rows against all columns, and only singular vectors travel. Losses and
            gradients, averaged over processes, equal those of one process with the whole batch.
            `estimator_loss` is that of the whole batch on every process: average nothing there.
            Every process must hold the same number of samples. Copies keep the group, pickles do
            not: set the attribute again, or the graphs are those of each process's own batch.
        block_rows: Rows of a graph that are held at a time, at least 1. Fewer rows take less memory
            and more time: they are computed again in the backward pass. None: all rows; in large
            batches, blocks of 1024 × 1024 entries a head. A callable ``squash`` sees the rows of a
            block.
        capturable: Whether a CUDA graph can hold `forward` and its backward: the host never waits
            for the device. No GPU has run it yet. Singular vectors are computed in float32 by a
            fixed number of iterations, with 1,500 to 1,700 more kernel launches a step. Where these
            do not suffice (two singular values within 0.05 %, or their squares within 3e-5 of the
            largest square), vectors are approximate and their gradient is bounded. A vector that
            may be off by more than 0.01 radian, as for a singular value below 4 % of the largest,
            is treated as one of value zero. So are the vectors of maps whose entries are far below
            1e-6 or above 1e6. The attribute `doubtful` counts all these samples, on the device.
            Float64 maps are refused. NaN, overflow and inputs that do not match across processes
            raise no error. The first call makes constants: run one step before a capture, and
            before ``torch.compile(mode="reduce-overhead")``.

    Shape:
        - features: one tensor per sensing point, ``b c h w``, ``b c t h w``, ``b n c`` or ``b c``;
          teacher and student may differ in rank and spatial size. Lists are paired by position;
          two mappings by key: the teacher's first one must have the order of ``channels``
        - returns: scalar

    Padding tokens count as positions. Multiply the features by the mask first
    (``tokens * mask[..., None]``): rows of zeros change no singular vector.

    Features from `FeatureHooks` must come from a new forward pass in each training step. `forward`
    raises an error if one network ran and the other did not; `estimator_loss` allows several steps
    on one pass. One warning is given if the batch norms of a hooked teacher are in training mode.

    Raises:
        RuntimeError: features of an earlier step were read from hooks again; or hooked features of
            a student with own heads carry no gradient, and `torch.no_grad` is off.
        TypeError: a setting has a wrong type; or features are no list or mapping of floating-point
            tensors, or of a precision higher than the heads'.
        ValueError: a setting has a wrong value; or the count, keys, channels, batch or device of
            features does not fit, or they are not finite: the message names the point by its place.

    Example:
        >>> import torch
        >>> from graph_kd import GraphTransferLoss
        >>> teacher = [torch.randn(8, 16, 4, 4), torch.randn(8, 32, 2, 2)]
        >>> student = [torch.randn(8, 10, 4, 4), torch.randn(8, 20, 2, 2)]
        >>> transfer = GraphTransferLoss([16, 32], student_channels=[10, 20], squash="scaled")
        >>> transfer.estimator_loss(teacher).shape, transfer(student, teacher).shape
        (torch.Size([]), torch.Size([]))
    """

    doubtful: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        num_heads: int = 8,
        *,
        student_channels: Sequence[int] | None = None,
        channel_dim: int | tuple[int | None, int | None] | None = None,
        k: int = 1,
        student_k: int = 4,
        squash: Squash = None,
        reduction: Literal["sum", "batchmean"] = "sum",
        process_group: dist.ProcessGroup | None = None,
        block_rows: int | None = None,
        capturable: bool = False,
    ) -> None:
        super().__init__()
        layouts = check_layouts(channels, student_channels, channel_dim)
        self.teacher_layout, self.student_layout = layouts
        self.channels = self.teacher_layout.channels
        self.k = check_count("k", k)
        self.student_k = check_count("student_k", student_k)
        if student_channels is None and student_k < k:
            raise ValueError(
                f"`student_k` must be at least `k` = {k}; got {student_k}. Pass student_k={2 * k}."
            )
        _check_settings(squash, reduction)
        self.squash = squash
        self.reduction = reduction
        self.process_group = check_process_group(process_group)
        self.capturable = check_bool("capturable", capturable)
        if capturable:
            self.register_buffer("doubtful", torch.zeros((), dtype=torch.int64), persistent=False)
        self.block_rows = None if block_rows is None else check_count("block_rows", block_rows)
        teacher_pairs, student_pairs = (_neighbours(layout.channels) for layout in layouts)
        heads = [MultiHeadGraphEstimator(k * f, k * b, num_heads) for f, b in teacher_pairs]
        own = [] if student_channels is None else zip(heads, student_pairs, strict=True)
        self.estimators: Any = nn.ModuleList(heads)
        self.student_heads: Any = nn.ModuleList(
            AttentionHeads(k * f, k * b, num_heads, of_teacher.head_channels)
            for of_teacher, (f, b) in own
        )
        self._keys: tuple[Any, ...] | None = None
        self._warned_of_training = False

    def estimator_loss(self, teacher_features: Iterable[Tensor]) -> Tensor:
        """Return the loss of the teacher's attention heads, L_MHAN, summed over pairs.

        Train until it is flat, and for 150 steps at least: the transfer loss uses the running
        statistics of the heads' batch norms, which take that long to settle. In training mode each
        call moves these statistics, under `no_grad` too. To log this loss later, call
        ``transfer.estimators.eval()`` first.
        """
        keys, maps = in_order(self._keys, teacher_features=teacher_features)
        (teacher,) = self._read(maps, self.teacher_layout)
        self._keys = keys
        check_fresh(maps["teacher_features"], maps["teacher_features"])
        self._warn_of_training(maps["teacher_features"], stacklevel=3)
        losses, group = [], self.process_group
        pairs = _neighbours(self._top_rows(teacher))
        for heads, (front, back) in zip(self.estimators, pairs, strict=True):
            kept_heads = heads.draw_kept_heads(back)
            if kept_heads is not None and group is not None:  # all must train the same heads
                dist.broadcast(kept_heads, dist.get_global_rank(group, 0), group)
            losses.append(heads.loss(front, back, kept_heads=kept_heads))
        return torch.stack(losses).sum()

    def forward(
        self, student_features: Iterable[Tensor], teacher_features: Iterable[Tensor]
    ) -> Tensor:
        """Return L_transfer; it trains the student, and its own heads if it has any."""
        _check_settings(self.squash, self.reduction)  # as set since
        keys, maps = in_order(
            self._keys, student_features=student_features, teacher_features=teacher_features
        )
        student, teacher = self._read(maps, self.student_layout, self.teacher_layout)
        self._keys = keys
        check_fresh(*maps.values())
        if self.student_heads:
            check_learns(maps["student_features"])
        self._warn_of_training(maps["teacher_features"], stacklevel=5)  # through `__call__`

        student_rows, teacher_rows = self._compress_and_align(student, teacher)
        embeddings = zip(
            self._embed(student_rows, self.student_heads or self.estimators),
            self._embed(teacher_rows, self.estimators),
            strict=True,
        )
        losses = [divergence(s, t, self.squash, self.block_rows) for s, t in embeddings]
        # The mean over processes is taken later, and is the sum over the rows of all.
        total = torch.stack(losses).sum() * group_size(self.process_group)
        return total / len(student_rows[0]) if self.reduction == "batchmean" else total

    @torch.no_grad()
    def graphs(
        self,
        features: Iterable[Tensor],
        align_to: Iterable[Tensor] | None = None,
        *,
        of: Literal["teacher", "student"] | None = None,
    ) -> list[Tensor]:
        """Return the graphs that the transfer loss compares, ``m i j`` a pair, without gradient.

        With a process group, call it in every process.

        Args:
            features: Feature maps of the teacher or of the student, one per sensing point.
            align_to: The teacher's features, if ``features`` are the student's. With shared heads
                the student's vectors are then aligned, as in `forward`; else its top k are taken.
            of: Whose heads are used, if the student has its own. By default the student's if
                ``align_to`` is given or only the student's channels fit, else the teacher's. Pass
                "student" for a student with the teacher's channels.
        """
        check_choice("of", of, (None, "teacher", "student"), or_callable=False)
        if align_to is not None and of == "teacher" and self.student_heads:
            raise ValueError(
                "`of` must be 'student' or None if `align_to` is given, as `features` are then the "
                "student's; got 'teacher'. Leave out `of`, or `align_to` for a teacher."
            )
        given = {"features": features} | ({} if align_to is None else {"align_to": align_to})
        _, maps = in_order(self._keys, **given)
        if of is None:
            teachers = align_to is None and fits(maps["features"], self.teacher_layout)
            of = "teacher" if teachers else "student"
        if align_to is None:
            layout = self.teacher_layout if of == "teacher" else self.student_layout
            rows = self._top_rows(*self._read(maps, layout))
        else:
            networks = self._read(maps, self.student_layout, self.teacher_layout)
            rows, _ = self._compress_and_align(*networks)
        own = self.student_heads and of == "student"
        heads = deepcopy(self.student_heads) if own else self.estimators  # statistics may move
        return [log_graph(*pair, self.squash).exp() for pair in self._embed(rows, heads)]

    def extra_repr(self) -> str:
        """Name the settings in ``print(module)``."""
        own = f"student_channels={list(self.student_layout.channels)}, " * bool(self.student_heads)
        return (
            f"channels={list(self.channels)}, {own}k={self.k}, student_k={self.student_k}, "
            f"squash={self.squash!r}, reduction={self.reduction!r}"
        )

    def _read(self, maps: dict[str, list[Any]], *layouts: Layout) -> list[Matrices]:
        """Return the maps of each network as matrices that fit."""
        heads, alone = self.estimators[0], group_size(self.process_group) == 1
        networks = read_matrices(maps, layouts, fewest=2 if alone else 1)
        for matrices in networks:
            check_fit_of_heads(matrices, heads.dtype, heads.device, capturable=self.capturable)
        batch = len(next(iter(matrices.values())))
        if not self.capturable:  # it waits for the other processes
            check_equal_batches(batch, heads.device, self.process_group)
        return networks

    def _warn_of_training(self, teacher_maps: list[Any], *, stacklevel: int) -> None:
        """Warn once if running statistics of the teacher move."""
        if self._warned_of_training or torch.compiler.is_compiling():
            return
        if names := training_norms(teacher_maps):
            self._warned_of_training = True
            warnings.warn(
                f"The teacher is in training mode (see {names[0]!r}): its features depend "
                "on the batch, and its running statistics move. Call `teacher.eval()`, again after "
                "`train()` of a module that holds it.",
                stacklevel=stacklevel,
            )

    def _compress_and_align(
        self, student: Matrices, teacher: Matrices
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return what describes each sample at each point, ``b (k c)``, of student and teacher."""
        most = self.k if self.student_heads else self.student_k
        counts = [max(self.k, min(most, *rows.shape[1:])) for rows in student.values()]
        found = self._compress({**teacher, **student}, [self.k] * len(teacher) + counts)
        theirs, ours = found[: len(teacher)], found[len(teacher) :]
        teacher_rows = [self._row(t.all, t.null) for t in theirs]
        if self.student_heads:
            return [self._row(s.vectors(), s.null) for s in ours], teacher_rows
        student_rows = []
        chosen = closest([s.all for s in ours], [t.all for t in theirs], [s.null for s in ours])
        for s, t, (choice, sign) in zip(ours, theirs, chosen, strict=True):
            # An arbitrary target chooses at random, and so does a sample without a vector.
            undefined = t.null | s.null.all(dim=1, keepdim=True)
            student_rows.append(self._row(sign * s.vectors(choice), undefined))
        return student_rows, teacher_rows

    def _top_rows(self, maps: Matrices) -> list[Tensor]:
        """Return the rows of one network by its top k vectors, without gradient."""
        return [self._row(f.all, f.null) for f in self._compress(maps, [self.k] * len(maps))]

    def _compress(self, maps: Matrices, counts: list[int]) -> list[TopVectors]:
        """Return the top singular vectors of each map; those of all maps are found together."""
        found = top_singular_vectors(
            list(maps.values()), counts, list(maps), capturable=self.capturable
        )
        if self.capturable:
            self.doubtful.add_(torch.cat([f.doubtful for f in found]).sum())
        return found

    def _row(self, vectors_bkc: Tensor, null_bk: Tensor) -> Tensor:
        """Put the k vectors of a sample side by side, as one unit vector; of all processes."""
        vectors = vectors_bkc.masked_fill(rearrange(null_bk, "b k -> b k 1"), 0)
        row: Tensor = rearrange(vectors, "b k c -> b (k c)").to(self.estimators[0].dtype)
        row = row if self.k == 1 else row / math.sqrt(self.k)
        return gather_rows(row, self.process_group)

    def _embed(self, rows: list[Tensor], heads: Iterable[Any]) -> list[Embeddings]:
        """Return θ of this process's samples and φ of all, pair by pair."""
        embeddings: list[Embeddings] = []
        for of_pair, (front, back) in zip(heads, _neighbours(rows), strict=True):
            # The statistics of the batch are those of all processes.
            theta, phi = of_pair.embeddings(front, back, frozen=heads is self.estimators)
            embeddings.append((own_part(theta, self.process_group, dim=1), phi))
        return embeddings


def _check_settings(squash: Any, reduction: Any) -> None:
    check_choice("squash", squash, (None, "scaled", "tanh"), or_callable=True)
    check_choice("reduction", reduction, ("sum", "batchmean"), or_callable=False)


def _neighbours(points: Sequence[T]) -> list[tuple[T, T]]:
    """Pair each sensing point with the next."""
    return list(zip(points[:-1], points[1:], strict=True))  # noqa: RUF007 # torch 2.4 can not compile itertools.pairwise
