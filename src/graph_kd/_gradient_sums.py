"""The gradients of a step: what `backward` was given since the last `zero_grad`."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["MANY", "GradientSums", "Sums"]

# Parameters whose gradients for the next step came from the `backward` of a wrapper, of any one.
GATED: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()
MANY = 100  # steps after which a gradient that is never cleared is not meant so


class Sums(NamedTuple):
    """Both gradients of one parameter, summed over the calls of a step; None where none came."""

    task: Tensor | None
    transfer: Tensor | None = None
    task_reaches: bool = False  # without it, a task gradient of zero may be what clearing left

    def plus(self, task: Tensor | None, transfer: Tensor | None) -> Sums:
        """Return the sums with the gradients of another call."""
        reaches = self.task_reaches or task is not None
        return Sums(_add(self.task, task), _add(self.transfer, transfer), reaches)


NONE = Sums(None)  # of a gradient that an earlier step left


class Left(NamedTuple):
    """What `backward` left in one ``p.grad``, and the sums it was made of."""

    merged: Tensor
    version: int
    sums: Sums
    before: Tensor | None  # gradient of earlier steps that nobody cleared: of leaves outside alone
    outlived: int  # steps in which gradients of other parameters were cleared, and this one was not

    def untouched(self, param: Tensor) -> bool:
        """Return whether it still stands in ``param.grad`` as it was left."""
        return param.grad is self.merged and self.merged._version == self.version


@dataclass
class GradientSums:
    """The sums of the step under way, and what its last gate did."""

    # By weak reference: an input that requires gradient goes with its batch.
    left: MutableMapping[Tensor, Left] = field(default_factory=WeakTensorKeyDictionary)
    factors: Tensor = field(default_factory=lambda: torch.zeros(0))
    skipped: bool | Tensor = False

    def of(self, param: Tensor) -> Sums:
        """Return the sums so far. A gradient that another one left is the task's."""
        left = self.left.get(param)
        return Sums(param.grad) if left is None or not left.untouched(param) else left.sums

    def leave(self, param: Tensor, merged: Tensor | None, sums: Sums) -> None:
        """Put the merged gradient into ``param.grad``, laid out as `.backward()` would."""
        left, before, outlived = self.left.get(param), None, 0
        if left is not None and left.untouched(param):
            before, outlived = left.before, left.outlived
            merged = _add(before, merged)
        if merged is not None and _strides(merged) != _strides(param):
            # Fused optimizers read both in one order.
            merged = torch.empty_like(param, requires_grad=False).copy_(merged)
        param.grad = merged
        if merged is not None:
            GATED[param] = True
            self.left[param] = Left(merged, merged._version, sums, before, outlived)

    def leaves(self) -> list[Tensor]:
        """Return the tensors that have a gradient in this step."""
        return [p for p, left in self.left.items() if left.sums is not NONE and p.requires_grad]

    def is_gated(self, param: Tensor) -> bool:
        """Return whether ``param.grad`` came from a `backward`; asked once before each step.

        It may have been clipped, unscaled, replaced or used in an earlier step.
        """
        left = self.left.get(param)
        return GATED.pop(param, False) or (left is not None and left.merged is param.grad)

    def drop_cleared(self, params: Sequence[Tensor]) -> None:
        """Drop the sums of cleared gradients; the step is over if none of ``params`` has any."""
        kept = {param: left for param, left in self.left.items() if left.untouched(param)}
        if len(kept) < len(self.left):
            kept = {p: left._replace(outlived=left.outlived + 1) for p, left in kept.items()}
        if not any(param in kept for param in params):
            kept = {p: left._replace(sums=NONE, before=left.merged) for p, left in kept.items()}
        self.left = WeakTensorKeyDictionary(kept)

    def never_cleared(self) -> list[Tensor]:
        """Return the tensors whose gradient has just outlived `MANY` steps."""
        return [param for param, left in self.left.items() if left.outlived == MANY]


def _strides(tensor: Tensor) -> list[int]:
    """Return the strides of axes that are longer than one."""
    return [stride for stride, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]


def _add(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old + new
