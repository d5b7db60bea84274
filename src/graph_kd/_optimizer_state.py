"""What `GatedGradClip` and every shell a framework puts around it share: one object."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from graph_kd._distributed import HoldsProcessGroup
from graph_kd._gate import Gate, Scope

__all__ = ["GATED", "Left", "OptimizerState", "Shared"]

T = TypeVar("T")

# Parameters whose gradients for the next step came from the `backward` of a wrapper, of any one.
GATED: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()


class Shared(Generic[T]):
    """An attribute that lives in ``_shared``, which copies of the ``__dict__`` share."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        value: T = self if instance is None else getattr(instance._shared, self.name)  # type: ignore[assignment] # of the class it is itself
        return value

    def __set__(self, instance: Any, value: T) -> None:
        setattr(instance._shared, self.name, value)


class Left(NamedTuple):
    """What `backward` left in one ``p.grad``, and the sums it was made of."""

    merged: Tensor
    version: int
    task: Tensor | None
    transfer: Tensor | None
    task_reaches: bool
    step: int

    def untouched(self, param: Tensor) -> bool:
        """Return whether it still stands in ``param.grad`` as it was left."""
        return param.grad is self.merged and self.merged._version == self.version


@dataclass(eq=False)
class OptimizerState(HoldsProcessGroup):
    """The settings and the counters; and, in no copy, the gradients of the step under way."""

    optimizer: Optimizer
    gate: Gate
    scope: Scope
    bound: float
    process_group: dist.ProcessGroup | None
    capturable: bool = False
    skipped: int | Tensor = 0
    warned: bool = False
    # By weak reference: an input that requires gradient goes with its batch.
    left: MutableMapping[Tensor, Left] = field(default_factory=WeakTensorKeyDictionary)
    step: int = 0
    factors: Tensor | None = None
    skipping: bool | Tensor = False

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in ("left", "step", "factors", "skipping"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc] # a fresh step: gradients are in no copy

    def sums(self, param: Tensor) -> tuple[Tensor | None, Tensor | None, bool]:
        """Return the task and the transfer gradient so far, and if the task's loss gave one."""
        left = self.left.get(param)
        if left is None or not left.untouched(param):
            return param.grad, None, False
        return left.task, left.transfer, left.task_reaches

    def left_in(self, param: Tensor) -> bool:
        """Return whether ``param.grad`` is what `backward` left, clipped or unscaled since."""
        left = self.left.get(param)
        return left is not None and left.merged is param.grad

    def drop_cleared(self) -> None:
        """Drop the sums of gradients that were cleared or changed."""
        for param, left in list(self.left.items()):
            if not left.untouched(param):
                del self.left[param]
