"""An optimizer that behaves as the one it wraps, whatever a loop or a framework does to it."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from graph_kd._distributed import HoldsProcessGroup
from graph_kd._gate import Gate, Scope
from graph_kd._gradient_sums import GradientSums

__all__ = ["COUNTS", "OptimizerShell", "OptimizerState", "kept_in"]

COUNTS = ("skipped", "scale_exponent", "calm_steps")  # in a checkpoint; tensors if capturable
CALM = 2000  # steps, as torch's GradScaler
LEAST = -16  # undoes the first scale of torch's GradScaler


@dataclass(eq=False)
class OptimizerState(HoldsProcessGroup):
    """The wrapped optimizer, the settings and the counters; and the sums, which no copy has."""

    optimizer: Optimizer
    gate: Gate
    scope: Scope
    bound: float
    process_group: dist.ProcessGroup | None
    capturable: bool
    skipped: int | Tensor = 0
    # The transfer loss is multiplied by 2**scale_exponent, and its gradient divided by it.
    scale_exponent: int | Tensor = 0
    calm_steps: int | Tensor = 0  # with a transfer gradient, since the last overflow
    warned: bool = False
    sums: GradientSums = field(default_factory=GradientSums)

    @property
    def params(self) -> list[Tensor]:
        """All parameters of the wrapped optimizer."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def adapt_scale(self, overflows: bool | Tensor, skip: bool | Tensor, *, first: bool) -> None:
        """Halve the scale of the transfer loss after an overflow, double it after a long calm.

        Each of them once a step: at its ``first`` call, and where it is not skipped already.
        `GradScaler` does not see the overflow: the merged gradient has none.
        """
        # In place, so that a captured step finds its tensors again. Of bools and of bool tensors
        # alike, a > b is "a and not b".
        self.calm_steps += first
        grows = (self.calm_steps % CALM == 0) & (self.scale_exponent < 0) & first
        shrinks = (overflows > skip) & (self.scale_exponent > LEAST)
        self.scale_exponent += (grows > overflows) + -1 * shrinks
        self.calm_steps *= overflows < 1

    def __getstate__(self) -> dict[str, Any]:
        # A copy counts on its own: of a tensor, the sum is another one.
        state = super().__getstate__() | {name: getattr(self, name) + 0 for name in COUNTS}
        del state["sums"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc] # a step of its own


def kept_in(owner: str, name: str) -> Any:
    """Return a property for the attribute ``name`` of another object, found at ``owner``."""
    find = attrgetter(owner)
    return property(
        lambda self: getattr(find(self), name), lambda self, value: setattr(find(self), name, value)
    )


class OptimizerShell(Optimizer):
    """Pass everything but `step` and `zero_grad` on to the wrapped optimizer.

    All that it knows is in ``_shared``. A framework that copies the ``__dict__`` or mixes its class
    with this one (Lightning, Fabric) gets the same state; `copy` and `pickle` make another one.
    """

    _shared: OptimizerState

    # The wrapped optimizer replaces these objects when it loads a state_dict, so that a copy of
    # the references would go stale.
    param_groups = kept_in("_shared.optimizer", "param_groups")
    state = kept_in("_shared.optimizer", "state")
    defaults = kept_in("_shared.optimizer", "defaults")

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer; where a framework's wrapper has this attribute, that one."""
        own: Optimizer = self.__dict__.get("optimizer", self._shared.optimizer)
        return own

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer) -> None:
        if getattr(optimizer, "_shared", None) is self._shared:  # a framework keeps what it wraps
            self.__dict__["optimizer"] = optimizer
        else:
            self._shared.optimizer = optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the wrapped optimizer."""
        self._shared.optimizer.add_param_group(param_group)

    def train(self) -> None:
        """Call `train` of a schedule-free optimizer; does nothing for others."""
        getattr(self._shared.optimizer, "train", lambda: None)()

    def eval(self) -> None:
        """Call `eval` of a schedule-free optimizer; does nothing for others."""
        getattr(self._shared.optimizer, "eval", lambda: None)()

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state_dict, which both can load.

        After a transfer gradient that was not finite it also has `skipped`, the float16 scale and
        `gates`.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self._shared.optimizer.state_dict()
        counts = {name: getattr(self._shared, name) + 0 for name in COUNTS}
        # To look at a tensor would sync.
        if isinstance(counts["skipped"], Tensor) or counts["skipped"] or counts["scale_exponent"]:
            state_dict |= counts | {"gates": self._shared.sums.factors.clone()}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this wrapper or of the wrapped optimizer."""
        state_dict = state_dict.copy()  # hooks may write to it
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._shared.optimizer.load_state_dict(state_dict)
        for name in COUNTS:
            count = state_dict.get(name, 0)
            if isinstance(mine := getattr(self._shared, name), Tensor):
                mine.copy_(torch.as_tensor(count))  # in place: a captured step counts there
            else:
                setattr(self._shared, name, int(count))
        if "gates" in state_dict:
            sums, gates = self._shared.sums, state_dict["gates"]
            fits = sums.factors.shape == gates.shape  # in place: a captured step writes there
            sums.factors = sums.factors.copy_(gates) if fits else gates.clone()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        # What a framework adds is left out, as it is around any torch optimizer.
        return {"_shared": self._shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # torch's unpickling path sets up hooks and nothing else, while its constructor would make
        # param groups of this object's own.
        super().__setstate__({})

    def __copy__(self) -> Any:
        twin = self.__class__.__new__(self.__class__)
        twin.__setstate__({"_shared": copy(self._shared)})
        return twin
