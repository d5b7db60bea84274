"""An optimizer wrapper for two losses: a shell around `merge_gradients` (step 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from graph_kd._checks import check_choice, check_positive
from graph_kd._distributed import (
    HoldsProcessGroup,
    average_over_processes,
    check_process_group,
)
from graph_kd._gate import Gate, Scope, merge_gradients

__all__ = ["GatedGradClip"]

SCALE_GROWTH_INTERVAL = 2000  # steps, as torch's GradScaler
SCOPES = ("parameter", "global")
LEAST_SCALE = 2.0**-24  # the smallest number above zero in float16


class GatedGradClip(HoldsProcessGroup, Optimizer):
    """Wrap an optimizer so that the transfer gradient never drowns the task's.

    `backward` takes both losses and leaves the merged gradient in every ``p.grad``; everything
    else (`step`, `zero_grad`, `state_dict`, `param_groups`, schedulers, hooks, `GradScaler`,
    `clip_grad_norm_`, pickle, deepcopy) behaves as on the wrapped optimizer.

    One step:

    1. The gradients of both losses are taken with `torch.autograd.grad`, one after the other; of
       the transfer loss scaled down by a power of two, once it has overflowed (float16).
    2. Given a process group, both are averaged over it.
    3. They are added to what `backward` was given since the last `zero_grad`. What stands in
       ``p.grad`` and was not left there by this wrapper, untouched, counts as task gradient.
    4. A factor is computed from the norms of the two sums, by the gate.
    5. ``p.grad`` = task + factor · transfer.

    Equation: Lee & Song 2019, "gated gradient", g_main + gate · g_transfer.

    Differs from the source: ``"norm"`` is the authors' program with their factor
    sigmoid(epoch since transfer began) left to `bound`, which may be set every epoch.
    ``"sigmoid"`` is the poster's gate as printed; it never falls below 0.731, so with a summed
    transfer loss it can swamp the task (a small student on digits fell from 89 % to 31 %).

    A transfer gradient that is not finite never reaches the parameters: that step uses the task's
    alone, and `skipped` counts it. `GradScaler` does not see such a step, and the transfer gradient
    is often many times the task's; so the scale of step 1 is halved then, and doubled again, up to
    one, after 2000 good steps. It is a power of two, undone in the parameters' precision, and in
    `state_dict` while it is not one. Under `GradScaler` both losses are scaled alike, which changes
    neither gate; a callable sees the scaled norms.

    `backward` waits for the device once, to look for infinities. Two copies of the gradients are
    held from it to `zero_grad`; clearing ``p.grad.data`` behind autograd's back is not noticed.
    Gradient hooks of tensors and modules run once a loss, ``register_post_accumulate_grad_hook``
    not at all, as with any `torch.autograd.grad`. Step hooks registered for
    all optimizers at once (`register_optimizer_step_pre_hook`) fire for the wrapper and for the
    wrapped optimizer. Sparse gradients are refused.

    Args:
        optimizer: Any torch optimizer; its weight decay takes no part in the norms.
        gate: "norm" scales the transfer gradient down to a norm of at most `bound` times the
            task's. "sigmoid" is 1 / (1 + exp(-τ)), τ = max(1, ‖task‖ / ‖transfer‖). A callable
            takes the two norms (scalar tensors, the transfer's may be zero) and returns the factor;
            one that is not finite counts as a transfer gradient that is not.
        scope: Norms of each "parameter" on its own, or one "global" norm over all of them.
        bound: Largest ratio of the gated transfer norm to the task norm, for the norm gate; a
            plain attribute. Dimensionless, > 0.
        process_group: A `torch.distributed` group over which both gradients are averaged before
            any norm is taken: data parallelism without the DDP wrapper, or with it under
            `no_sync()`. Among several processes it is required: the second gradient of a step
            passes DDP by and would silently stay local.

    Attributes:
        gates: The factors last applied, one for each parameter that the transfer loss reaches, in
            the order of the param groups, or a single one for ``scope="global"``. Reading them
            waits for the device.
        skipped: Steps whose transfer gradient was not finite. Count.

    Raises:
        TypeError: ``optimizer`` is no torch optimizer or holds sharded parameters (FSDP2), or a
            loss is no tensor.
        ValueError: an unknown gate or scope, a loss that is no scalar, reaches no parameter or
            gives a sparse gradient, or a callable gate that returns no single number.
        RuntimeError: several processes are running and no process group was given, or the first
            losses came through reentrant activation checkpoints.

    Example:
        >>> import torch
        >>> from graph_kd import GatedGradClip
        >>> student = torch.nn.Linear(4, 2)
        >>> optimizer = GatedGradClip(torch.optim.SGD(student.parameters(), lr=0.1))
        >>> output = student(torch.randn(8, 4))
        >>> optimizer.backward(output.square().mean(), output.abs().sum())
        >>> optimizer.step()
    """

    optimizer: Optimizer
    gate: Gate
    scope: Scope
    bound: float
    process_group: dist.ProcessGroup | None
    skipped: int
    _left: dict[Tensor, _Left]
    _factors: Tensor | None
    _skipping: bool
    _graph_seen: bool
    _scale: float
    _steps_since_overflow: int

    def __init__(
        self,
        optimizer: Optimizer,
        gate: Gate = "norm",
        *,
        scope: Scope = "parameter",
        bound: float = 1.0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"`optimizer` must be a torch.optim.Optimizer; got {type(optimizer).__name__}."
            )
        check_choice("gate", gate, ("norm", "sigmoid"), or_callable=True)
        check_choice("scope", scope, SCOPES, or_callable=False)
        self.__setstate__(
            {
                "optimizer": optimizer,
                "gate": gate,
                "scope": scope,
                "bound": check_positive("bound", bound),
                "process_group": check_process_group(process_group),
                "skipped": 0,
                "_scale": 1.0,
                "_steps_since_overflow": 0,
            }
        )
        self._trained_parameters()  # what can not be trained is told before the first step

    def backward(self, task_loss: Tensor, transfer_loss: Tensor) -> None:
        """Leave the merged gradient of the two scalar losses in every ``p.grad``.

        Called again before `zero_grad` it accumulates both gradients and gates the sums. A
        parameter that the transfer loss does not reach keeps its task gradient; one that neither
        reaches keeps None.
        """
        self._check_processes()
        check_choice("scope", self.scope, SCOPES, or_callable=False)  # may be set at any time
        check_positive("bound", self.bound, or_zero=True)  # a schedule may begin there
        params = self._trained_parameters()
        if not params:
            raise ValueError("`optimizer` must hold a parameter that requires gradient; none does.")
        if not self._graph_seen:
            _refuse_reentrant(task_loss, transfer_loss)
            self._graph_seen = True
        new_task = _gradients("task_loss", task_loss, params, retain_graph=True)
        new_transfer = _gradients(
            "transfer_loss", transfer_loss, params, retain_graph=False, scale=self._scale
        )
        if self.process_group is not None:
            new_task = average_over_processes(new_task, params, self.process_group)
            new_transfer = average_over_processes(new_transfer, params, self.process_group)

        earlier = [self._sums(p) for p in params]
        task = [_add(old, new) for (old, _), new in zip(earlier, new_task, strict=True)]
        transfer = [_add(old, new) for (_, old), new in zip(earlier, new_transfer, strict=True)]
        merged = merge_gradients(task, transfer, self.gate, scope=self.scope, bound=self.bound)

        continues = any(old is not None for _, old in earlier)
        first_overflow = not merged.finite and not (continues and self._skipping)
        self.skipped += first_overflow
        self._skipping = not merged.finite
        if first_overflow or not continues:
            self._adapt_scale(first_overflow)
        self._factors = merged.factors
        self._left = {}
        for p, gradient, *sums in zip(params, merged.gradients, task, transfer, strict=True):
            p.grad = gradient
            if gradient is not None:
                self._left[p] = _Left(gradient, gradient._version, *sums)

    @property
    def gates(self) -> list[float]:
        """The factors last applied; see the class."""
        factors: list[float] = [] if self._factors is None else self._factors.tolist()
        return factors

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override] # torch overloads what is one signature
        """Take one step of the wrapped optimizer; a closure calls `backward` itself."""
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, the sums of accumulated ones included."""
        self._left = {}
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state_dict: either of the two loads it.

        After an overflow in float16 it has two entries more, "transfer_scale" and
        "steps_since_overflow"; see the class.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self.optimizer.state_dict()
        if self._scale != 1:
            state_dict["transfer_scale"] = self._scale
            state_dict["steps_since_overflow"] = self._steps_since_overflow
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
        self.optimizer.load_state_dict(state_dict)
        self._scale = state_dict.get("transfer_scale", 1.0)
        self._steps_since_overflow = state_dict.get("steps_since_overflow", 0)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    # The wrapped optimizer replaces these objects when it loads a state_dict, so a copy of the
    # references would go stale.
    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override] # an attribute in torch
        """The wrapped optimizer's param groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override] # an attribute in torch
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override] # an attribute in torch
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    def __repr__(self) -> str:
        return (
            f"GatedGradClip(gate={self.gate!r}, scope={self.scope!r}, bound={self.bound}, "
            f"optimizer={self.optimizer!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Like gradients, hooks and accumulated sums are not part of an optimizer's state.
        names = (
            "optimizer",
            "gate",
            "scope",
            "bound",
            "skipped",
            "_scale",
            "_steps_since_overflow",
        )
        return {name: getattr(self, name) for name in names} | {"process_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._left = {}
        self._factors = None
        self._skipping = False
        self._graph_seen = False
        # torch's unpickling path sets up hooks and nothing else, while its constructor would make
        # param groups of this wrapper's own.
        super().__setstate__({})

    def _sums(self, param: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the task and the transfer gradient accumulated so far."""
        left = self._left.get(param)
        if left is None or param.grad is not left.merged or param.grad._version != left.version:
            return param.grad, None
        return left.task, left.transfer

    def _adapt_scale(self, overflow: bool) -> None:
        """Halve the scale of the transfer loss after an overflow, double it after a long peace."""
        if overflow:
            self._scale = max(self._scale / 2, LEAST_SCALE)
            self._steps_since_overflow = 0
        elif self._scale < 1 and not self._skipping:
            self._steps_since_overflow += 1
            if self._steps_since_overflow == SCALE_GROWTH_INTERVAL:
                self._scale *= 2
                self._steps_since_overflow = 0

    def _trained_parameters(self) -> list[Tensor]:
        params = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        for place, param in enumerate(params):
            if hasattr(param, "device_mesh"):  # DTensor, wherever this torch keeps the class
                raise TypeError(
                    "`optimizer` must hold plain parameters; number "
                    f"{place} is a {type(param).__name__} of shape {tuple(param.shape)}. Sharded "
                    "models (FSDP2, tensor parallelism) reduce gradients inside `.backward()`, of "
                    "which there is one a step, and two gradients are needed here: use DDP under "
                    "`no_sync()` with a process group."
                )
        return params

    def _check_processes(self) -> None:
        if self.process_group is None and dist.is_available() and dist.is_initialized():
            processes = dist.get_world_size()
            if processes > 1:
                raise RuntimeError(
                    f"`process_group` must be given among {processes} processes: gradients would "
                    "silently stay local, with or without DistributedDataParallel. Pass "
                    "process_group=torch.distributed.group.WORLD, and run a DDP model under "
                    "`no_sync()`."
                )


class _Left(NamedTuple):
    """What `backward` left in one ``p.grad``, and the sums it was made of."""

    merged: Tensor
    version: int
    task: Tensor | None
    transfer: Tensor | None


def _gradients(
    name: str, loss: Any, params: list[Tensor], *, retain_graph: bool, scale: float = 1.0
) -> list[Tensor | None]:
    """Return the gradients of ``loss``, taken of scale · loss and divided by the scale."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"`{name}` must be a tensor; got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise ValueError(f"`{name}` must be a scalar; got shape {tuple(loss.shape)}.")
    gradients: Sequence[Tensor | None] = ()
    if loss.requires_grad:
        weight = torch.full_like(loss, scale)
        gradients = torch.autograd.grad(
            loss, params, weight, retain_graph=retain_graph, allow_unused=True
        )
    if all(gradient is None for gradient in gradients):
        raise ValueError(
            f"`{name}` must depend on the optimizer's parameters; none of the {len(params)} gets a "
            "gradient. Is the student run, and are its features taken, without `no_grad` and "
            "`detach`?"
        )
    for place, gradient in enumerate(gradients):
        if gradient is not None and gradient.layout != torch.strided:
            raise ValueError(
                f"`{name}` must give dense gradients; parameter {place} of shape "
                f"{tuple(params[place].shape)} gets a sparse one. Build the embedding with "
                "sparse=False."
            )
    if scale == 1:
        return list(gradients)
    return [None if gradient is None else gradient / scale for gradient in gradients]


def _refuse_reentrant(*losses: Any) -> None:
    """Refuse reentrant checkpoints: without an error they leave their parameters no gradient."""
    nodes = [loss.grad_fn for loss in losses if isinstance(loss, Tensor)]
    looked_at = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in looked_at:
            continue
        looked_at.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError(
                "The student must not use reentrant activation checkpoints: parameters inside them "
                "get their gradient from `.backward()` only. Pass use_reentrant=False to "
                "`torch.utils.checkpoint.checkpoint`."
            )
        nodes += [following for following, _ in node.next_functions]


def _add(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old + new
