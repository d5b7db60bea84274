"""An optimizer wrapper for two losses: a shell around `merge_gradients` (step 5)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from graph_kd._autograd import check_loss, check_plain_parameter, find_leaves, gradients_of
from graph_kd._checks import check_bool, check_choice, check_positive
from graph_kd._distributed import (
    average_over_processes,
    check_equal_leaves,
    check_process_group,
)
from graph_kd._gate import Gate, Scope, merge_gradients
from graph_kd._optimizer_state import GATED, Left, OptimizerState, Shared

__all__ = ["GatedGradClip"]

SCALE_GROWTH_INTERVAL = 2000  # steps, as torch's GradScaler
SCOPES = ("parameter", "global")
LEAST_SCALE = 2.0**-24  # the smallest number above zero in float16


class GatedGradClip(Optimizer):
    """Wrap an optimizer so that the transfer gradient never drowns the task's.

    `backward` takes both losses and leaves the merged gradient in every ``p.grad``; everything
    else (`step`, `zero_grad`, `state_dict`, `param_groups`, schedulers, hooks, `GradScaler`,
    `clip_grad_norm_`, pickle, deepcopy) behaves as on the wrapped optimizer.

    One step:

    1. The gradients of both losses are taken with `torch.autograd.grad`, one after the other.
    2. Given a process group, both are averaged over it.
    3. They are added to what `backward` was given since the last `zero_grad`. What stands in
       ``p.grad`` and was not left there by this wrapper, untouched, counts as task gradient.
    4. A factor is computed from the norms of the two sums, by the gate. A parameter that only the
       transfer loss reaches (an attention head of the student's own, a connector) has no task
       gradient; the norm of all task gradients takes its place.
    5. ``p.grad`` = task + factor · transfer.

    Equation: Lee & Song 2019, "gated gradient", g_main + gate · g_transfer.

    Differs from the source: ``"norm"`` is the authors' program with their factor
    sigmoid(epoch since transfer began) left to `bound`, which may be set every epoch.
    ``"sigmoid"`` is the poster's gate as printed; it never falls below 0.731, so with a summed
    transfer loss it can swamp the task (a small student on digits fell from 89 % to 31 %).

    A transfer gradient that is not finite never reaches the parameters: that step uses the task's
    alone, and `skipped` counts it. `state_dict` has the count whenever it is not 0. Under
    `GradScaler` both losses are scaled alike, which changes neither gate; a callable sees the
    scaled norms. Scaling only one of them (a `GradScaler` on the task alone) changes the gate.

    A leaf that the losses reach and the optimizer does not hold (a head of a second optimizer, a
    learned prompt) gets what ``.backward()`` would give it, gated in the same way; `zero_grad` does
    not clear it. Leaves are found in the autograd graph in every `backward`, at about a microsecond
    a node; those that a custom function keeps to itself are not found.

    Frameworks that copy this object or mix its class with theirs (Lightning, Fabric, accelerate)
    share its state: settings, `gates`, `skipped` and the sums are the same in all.

    A compiled student needs ``torch._functorch.config.donated_buffer = False`` before it is
    compiled. With inductor run under ``TORCHINDUCTOR_FORCE_DISABLE_CACHES=1`` besides: a cache
    entry of an earlier run with donated buffers makes the second gradient wrong without an error.

    `backward` syncs once, to look for infinities; if ``capturable`` not at all. Two copies of the
    gradients are held from it to `zero_grad`; clearing ``p.grad.data`` behind autograd's back is
    not noticed. Gradient hooks of tensors and modules run once a loss,
    ``register_post_accumulate_grad_hook`` not at all, as with
    any `torch.autograd.grad`. Step hooks registered for all optimizers at once
    (`register_optimizer_step_pre_hook`) fire for the wrapper and for the wrapped optimizer. Sparse
    gradients are refused.

    Args:
        optimizer: Any torch optimizer; its weight decay takes no part in the norms.
        gate: "norm" scales the transfer gradient down to a norm of at most `bound` times the
            task's. "sigmoid" is 1 / (1 + exp(-τ)), τ = max(1, ‖task‖ / ‖transfer‖). A callable
            takes the two norms (scalar tensors, the transfer's may be zero) and returns the factor;
            one that is not finite counts as a transfer gradient that is not.
        scope: Norms of each "parameter" on its own, or one "global" norm over all of them.
        bound: Largest ratio of the gated transfer norm to the task norm, for the norm gate; for a
            parameter that only the transfer loss reaches, to the norm of all task gradients. May
            be set at any time. Dimensionless, > 0.
        process_group: A `torch.distributed` group over which both gradients are averaged before
            any norm is taken: data parallelism without the DDP wrapper, or with it under
            `no_sync()`. Among several processes it is required: the second gradient of a step
            passes DDP by and would silently stay local. Its processes must reach the same leaves
            outside the optimizer; one without a transfer loss counts with zero.
        capturable: Whether a CUDA graph can hold `backward`: the host never waits for the device.
            `skipped` is a tensor on the device then, and always in `state_dict`. A captured
            `backward` keeps the gate, bound and losses that it was captured with.

    Attributes:
        gates: The factors last applied, one for each parameter that the transfer loss reaches, in
            the order of the param groups, then of leaves outside the optimizer, or a single one
            for ``scope="global"``; none if there was no transfer loss. Reading them syncs.
        skipped: Steps whose transfer gradient was not finite. Count; capturable: a scalar tensor.

    Raises:
        TypeError: ``optimizer`` is no torch optimizer, or holds sharded parameters (FSDP1, FSDP2)
            or a loss reaches them, or a loss is no tensor.
        ValueError: an unknown gate or scope, a loss that is no scalar, reaches no parameter or
            gives a sparse gradient, or a callable gate that returns no single number.
        RuntimeError: several processes are running and no process group was given, or they reach
            different leaves outside the optimizer; the losses came through reentrant activation
            checkpoints, or through a compiled student that donates its buffers.

    Example:
        >>> import torch
        >>> from graph_kd import GatedGradClip
        >>> student = torch.nn.Linear(4, 2)
        >>> optimizer = GatedGradClip(torch.optim.SGD(student.parameters(), lr=0.1))
        >>> output = student(torch.randn(8, 4))
        >>> optimizer.backward(output.square().mean(), output.abs().sum())
        >>> optimizer.step()
    """

    gate: Shared[Gate] = Shared()
    scope: Shared[Scope] = Shared()
    bound: Shared[float] = Shared()
    process_group: Shared[dist.ProcessGroup | None] = Shared()
    skipped: Shared[int | Tensor] = Shared()
    capturable: Shared[bool] = Shared()
    _shared: OptimizerState

    def __init__(
        self,
        optimizer: Optimizer,
        gate: Gate = "norm",
        *,
        scope: Scope = "parameter",
        bound: float = 1.0,
        process_group: dist.ProcessGroup | None = None,
        capturable: bool = False,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"`optimizer` must be a torch.optim.Optimizer; got {type(optimizer).__name__}."
            )
        check_choice("gate", gate, ("norm", "sigmoid"), or_callable=True)
        check_choice("scope", scope, SCOPES, or_callable=False)
        bound = check_positive("bound", bound)
        process_group = check_process_group(process_group)
        check_bool("capturable", capturable)
        params = _trained_parameters(optimizer)  # what can not be trained is told before a step
        state = OptimizerState(optimizer, gate, scope, bound, process_group, capturable)
        if capturable:
            device = params[0].device if params else None
            state.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.__setstate__({"_shared": state})

    def backward(self, task_loss: Tensor, transfer_loss: Tensor | None = None) -> None:
        """Leave the merged gradient of the two scalar losses in every ``p.grad``.

        Called again before `zero_grad` it accumulates both gradients and gates the sums. A
        parameter that the transfer loss does not reach keeps its task gradient; one that neither
        reaches keeps None. Without a transfer loss it is a step on the task alone (warm-up, a batch
        of one sample), merged with what was accumulated.
        """
        shared = self._shared
        group = shared.process_group
        _check_processes(group)
        check_choice("scope", shared.scope, SCOPES, or_callable=False)  # may be set at any time
        check_positive("bound", shared.bound, or_zero=True)  # a schedule may begin there
        params = _trained_parameters(shared.optimizer)
        if not params:
            raise ValueError("`optimizer` must hold a parameter that requires gradient; none does.")
        check_loss("task_loss", task_loss)
        losses = [task_loss]
        if transfer_loss is not None:
            check_loss("transfer_loss", transfer_loss)
            losses.append(transfer_loss)
        held = len(params)
        params += self._outside(losses)
        if group is not None:
            check_equal_leaves(params[held:], params[0].device, group)

        new_task = gradients_of(
            "task_loss", task_loss, params, held, retain_graph=transfer_loss is not None
        )
        new_transfer: list[Tensor | None] = [None] * len(params)
        if transfer_loss is not None:
            new_transfer = gradients_of("transfer_loss", transfer_loss, params, held)
        if group is not None:
            new_task = average_over_processes(new_task, params, group)
            new_transfer = average_over_processes(new_transfer, params, group)

        earlier = [shared.sums(p) for p in params]
        task = [_add(old, new) for (old, _, _), new in zip(earlier, new_task, strict=True)]
        transfer = [_add(old, new) for (_, old, _), new in zip(earlier, new_transfer, strict=True)]
        reaches = [
            old or new is not None for (_, _, old), new in zip(earlier, new_task, strict=True)
        ]
        merged = merge_gradients(
            task,
            transfer,
            shared.gate,
            scope=shared.scope,
            bound=shared.bound,
            task_reaches=reaches,
            capturable=shared.capturable,
        )

        if any(gradient is not None for gradient in transfer):
            continues = any(old is not None for _, old, _ in earlier)
            self._count(merged.finite, continues)
        shared.factors = merged.factors
        for n, (p, gradient) in enumerate(zip(params, merged.gradients, strict=True)):
            p.grad = gradient
            if gradient is not None:
                GATED[p] = True
                shared.left[p] = Left(
                    gradient, gradient._version, task[n], transfer[n], reaches[n], shared.step
                )

    @property
    def gates(self) -> list[float]:
        """The factors last applied; see the class."""
        factors = self._shared.factors
        gates: list[float] = [] if factors is None else factors.tolist()
        return gates

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override] # torch overloads what is one signature
        """Take one step of the wrapped optimizer; a closure calls `backward` itself.

        Warns once if the gradients did not come from `backward`: they are not gated.
        """
        if closure is None:
            self._warn_if_ungated()
            return self._shared.optimizer.step()

        def checked() -> float:
            value = closure()
            self._warn_if_ungated()
            return value

        return self._shared.optimizer.step(checked)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, the sums of accumulated ones included.

        Sums of a gradient that the wrapped optimizer does not clear stay (accelerate's does nothing
        while it accumulates), and so do gradients of tensors outside the optimizer.
        """
        shared = self._shared
        shared.optimizer.zero_grad(set_to_none)
        shared.drop_cleared()
        if not any(p in shared.left for p in _parameters(shared.optimizer)):
            shared.step += 1

    def train(self) -> None:
        """Call `train` of a schedule-free optimizer; others have none."""
        getattr(self._shared.optimizer, "train", _nothing)()

    def eval(self) -> None:
        """Call `eval` of a schedule-free optimizer; others have none."""
        getattr(self._shared.optimizer, "eval", _nothing)()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the wrapped optimizer."""
        self._shared.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state_dict: either of the two loads it.

        After a transfer gradient that was not finite it has "skipped" besides.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        shared = self._shared
        state_dict = shared.optimizer.state_dict()
        if isinstance(shared.skipped, Tensor):  # to look at it would sync
            state_dict["skipped"] = shared.skipped.clone()
        elif shared.skipped:
            state_dict["skipped"] = shared.skipped
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
        shared = self._shared
        shared.optimizer.load_state_dict(state_dict)
        skipped = state_dict.get("skipped", 0)
        if isinstance(shared.skipped, Tensor):  # in place: a captured step counts there
            shared.skipped.copy_(torch.as_tensor(skipped))
        else:
            shared.skipped = int(skipped)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer; of a shell that has one of that name, its own."""
        own: Optimizer = self.__dict__.get("optimizer", self._shared.optimizer)
        return own

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer) -> None:
        if getattr(optimizer, "_shared", None) is self._shared:  # a shell keeps what it wraps
            self.__dict__["optimizer"] = optimizer
        else:
            self._shared.optimizer = optimizer

    # The wrapped optimizer replaces these objects when it loads a state_dict, so a copy of the
    # references would go stale.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's param groups."""
        return self._shared.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self._shared.optimizer.param_groups = param_groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state."""
        return self._shared.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self._shared.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        return self._shared.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self._shared.optimizer.defaults = defaults

    def __repr__(self) -> str:
        return (
            f"GatedGradClip(gate={self.gate!r}, scope={self.scope!r}, bound={self.bound}, "
            f"optimizer={self._shared.optimizer!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # What a shell adds is left out, as it is around any torch optimizer.
        return {"_shared": self._shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # torch's unpickling path sets up hooks and nothing else, while its constructor would make
        # param groups of this wrapper's own.
        super().__setstate__({})

    def __copy__(self) -> Any:
        twin = self.__class__.__new__(self.__class__)
        twin.__setstate__({"_shared": copy(self._shared)})
        return twin

    def _outside(self, losses: list[Tensor]) -> list[Tensor]:
        """Return the leaves with a gradient in this step that the optimizer does not hold."""
        shared = self._shared
        earlier = [
            leaf
            for leaf, left in shared.left.items()
            if left.step == shared.step and leaf.requires_grad and left.untouched(leaf)
        ]
        held = set(_parameters(shared.optimizer))
        outside = [p for p in dict.fromkeys([*earlier, *find_leaves(*losses)]) if p not in held]
        for leaf in outside:
            check_plain_parameter("a tensor that it does not hold", leaf)
        return outside

    def _count(self, finite: bool | Tensor, continues: bool) -> None:
        """Count a skipped step, once however many losses it accumulates."""
        shared = self._shared
        if isinstance(finite, Tensor) and isinstance(shared.skipped, Tensor):
            again = shared.skipping if continues else False
            shared.skipping = ~finite
            shared.skipped.add_((~finite & ~again) if isinstance(again, Tensor) else ~finite)
        else:
            shared.skipped += not finite and not (continues and shared.skipping)
            shared.skipping = not finite

    def _warn_if_ungated(self) -> None:
        shared = self._shared
        given = [p for p in _parameters(shared.optimizer) if p.grad is not None]
        # A gated gradient may be replaced before the step, or serve a second step.
        gated = [p for p in given if GATED.pop(p, False) or shared.left_in(p)]
        if shared.warned or not given or gated:
            return
        if all(group.get("lr") in (0, 0.0) for group in self.param_groups):
            return  # torch.distributed.checkpoint makes the state by a step that moves nothing
        shared.warned = True
        warnings.warn(
            "`step` was called on gradients that `backward` of this optimizer did not make, so "
            "nothing gates the transfer gradient. Call optimizer.backward(task_loss, "
            "transfer_loss) in place of loss.backward(); optimizer.backward(task_loss) is the step "
            "on the task alone.",
            stacklevel=4,
        )


def _nothing() -> None:
    pass


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _trained_parameters(optimizer: Optimizer) -> list[Tensor]:
    params = [p for p in _parameters(optimizer) if p.requires_grad]
    for place, param in enumerate(params):
        check_plain_parameter(f"number {place}", param)
    return params


def _check_processes(group: dist.ProcessGroup | None) -> None:
    if group is None and dist.is_available() and dist.is_initialized():
        processes = dist.get_world_size()
        if processes > 1:
            raise RuntimeError(
                f"`process_group` must be given among {processes} processes: gradients would "
                "silently stay local, with or without DistributedDataParallel. Pass "
                "process_group=torch.distributed.group.WORLD, and run a DDP model under "
                "`no_sync()`."
            )


def _add(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old + new
