"""Two losses in one optimizer: the transfer gradient is gated and added to the task's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
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
from graph_kd._gradient_sums import MANY
from graph_kd._optimizer_shell import COUNTS, OptimizerShell, OptimizerState, kept_in

__all__ = ["GatedGradClip"]


class GatedGradClip(OptimizerShell):
    """Wrap an optimizer: a gate limits the transfer gradient relative to the task's.

    `backward` takes both losses and leaves the merged gradient in every ``p.grad``; everything
    else (`step`, `zero_grad`, `state_dict`, `param_groups`, schedulers, hooks, `GradScaler`,
    `clip_grad_norm_`, pickle, deepcopy) behaves as on the wrapped optimizer.

    One step:

    1. The gradients of both losses are taken with `torch.autograd.grad`, one after the other.
    2. Given a process group, both are averaged over it.
    3. They are added to those of earlier `backward` calls since `zero_grad`. A ``p.grad`` that
       is set or changed otherwise counts as task gradient, so clip after the last `backward`.
    4. A factor is computed from the norms of the two sums, by the gate. A parameter that only the
       transfer loss reaches (an attention head of the student's own) has no task gradient; the norm
       of all task gradients takes its place. If the task loss gives a parameter a gradient of zero,
       its norm gate is 0.
    5. ``p.grad`` = task + factor · transfer.

    Equation: Lee & Song 2019, "gated gradient", g_main + gate · g_transfer.

    Differs from the source: ``"norm"`` is the gate of the authors' program. They multiply the bound
    by sigmoid(epoch of the transfer): set `bound` each epoch. ``"sigmoid"`` is the gate that the
    paper's poster prints; it never falls below 0.731, so with a summed transfer loss it can
    override the task (a small student on digits fell from 89 % to 31 %).

    A transfer gradient that is not finite, or whose norm overflows, never reaches the parameters:
    that step uses the task's alone, and `skipped` counts it. `state_dict` has the count, and
    `gates`, whenever the count is not 0; it does not have `bound`. Under `GradScaler` scale both
    losses: the built-in gates stay the same, a callable sees scaled norms. Scaling one loss changes
    every gate. In float16 the transfer gradient can overflow where the task's does not, and
    `GradScaler` does not see that. So `backward` multiplies the transfer loss by a scale, and
    divides its gradient again. A step with an overflow halves the scale, 2000 steps without one
    double it, up to 1. The first steps of a float16 run may be without transfer.

    A tensor outside the optimizer that a loss reaches (a head of a second optimizer, a learned
    prompt) gets a merged gradient too. Clear it yourself, by ``grad = None``: `zero_grad` does not.
    If it is not cleared in 100 steps, and others are, a warning says so. Such tensors are looked
    for in the autograd graph in every `backward`; those hidden in a custom
    `torch.autograd.Function` are not found.

    The wrappers that Lightning, Fabric and accelerate put around this object share its state:
    settings, `gates`, `skipped` and the sums. A copy made by `copy`, `deepcopy` or pickle has
    settings and a count of its own.

    A compiled student needs ``torch._functorch.config.donated_buffer = False`` before it is
    compiled. With inductor also export ``TORCHINDUCTOR_FORCE_DISABLE_CACHES=1`` before Python
    starts: a cache entry of an earlier run with donated buffers makes the second gradient wrong
    without an error.

    `torch.compile`, and ``loss + 0 * sum(...)`` for DDP, give a parameter a task gradient of zero
    where the task does not reach it. Its gate is 0 then, and it does not learn. Leave layers that
    only the transfer loss reaches out of the compiled student, or take ``scope="global"``.

    `backward` syncs once, to look for infinities; if ``capturable`` not at all. Two copies of the
    gradients are held until `zero_grad`. Zeroing ``p.grad.data`` instead does not clear them.
    Gradient hooks of tensors and modules run once per loss, ``register_post_accumulate_grad_hook``
    not at all, as with any `torch.autograd.grad`. Step hooks registered for all optimizers at once
    (`register_optimizer_step_pre_hook`) fire for the wrapper and for the wrapped optimizer. Sparse
    gradients are refused.

    Args:
        optimizer: Any torch optimizer; its weight decay takes no part in the norms.
        gate: "norm" scales the transfer gradient down to a norm of at most `bound` times the
            task's. "sigmoid" is 1 / (1 + exp(-τ)), τ = max(1, ‖task‖ / ‖transfer‖). A callable
            takes the norms (task, transfer), scalar tensors that may be zero, and returns the
            factor. A factor that is not finite drops that step's transfer gradient.
        scope: Norms of each "parameter" on its own, or one "global" norm over all of them.
        bound: Largest ratio of the gated transfer norm to the task norm, for the norm gate; > 0.
            The attribute may be set at any time, also to 0. Start at 3 with own heads and at 1 with
            shared ones; try 1, 3 and 10.
        process_group: A `torch.distributed` group over which both gradients are averaged before any
            norm is taken: data parallelism without the DDP wrapper, or with it under `no_sync()`.
            Required among several processes: DDP does not average the second gradient. All
            processes must reach the same tensors outside the optimizer. A process without a
            transfer loss counts as zero; a `GraphTransferLoss` with a group must run in all.
        capturable: Whether a CUDA graph can hold `backward`: the host never waits for the device.
            `skipped` is a tensor on the device then, and always in `state_dict`. A captured
            `backward` keeps the gate, bound and losses that it was captured with. Call `zero_grad`
            before the capture, and capture every `backward` of a step in one graph. In a skipped
            step a parameter that only the transfer loss reaches gets a gradient of zero, not None.
            Each loss must reach the same parameters in every process; that is not checked.

    Attributes:
        gates: List of the factors last applied, one a parameter that the transfer loss reaches:
            first those of the param groups, then other tensors. A single one for
            ``scope="global"``, none without a transfer loss, zeros in a skipped step. Reading them
            syncs.
        skipped: Number of steps whose transfer gradient was dropped: the gradient, its norm or the
            gate's factor was not finite; capturable: a scalar tensor.

    Raises:
        TypeError: ``optimizer`` is no plain torch optimizer, another setting has a wrong type, a
            loss is no tensor, or a sharded parameter (FSDP1, FSDP2) is held or reached by a loss.
        ValueError: an unknown gate or scope, a bound that is not positive, an optimizer without a
            parameter to train, a loss that is no scalar, reaches no parameter or gives a sparse
            gradient, or a callable gate that returns no single number.
        RuntimeError: several processes run without a process group, or reach tensors outside the
            optimizer that differ in number, shape or dtype; the losses came through reentrant
            activation checkpoints, through a compiled student that donates its buffers, or through
            `torch.cuda.make_graphed_callables`.

    Example:
        >>> import torch
        >>> from graph_kd import GatedGradClip
        >>> student = torch.nn.Linear(4, 2)
        >>> optimizer = GatedGradClip(torch.optim.SGD(student.parameters(), lr=0.1))
        >>> output = student(torch.randn(8, 4))
        >>> optimizer.zero_grad()
        >>> optimizer.backward(output.square().mean(), output.abs().sum())
        >>> optimizer.step()
    """

    gate: Gate = kept_in("_shared", "gate")
    scope: Scope = kept_in("_shared", "scope")
    bound: float = kept_in("_shared", "bound")
    process_group: dist.ProcessGroup | None = kept_in("_shared", "process_group")
    skipped: int | Tensor = kept_in("_shared", "skipped")
    capturable: bool = kept_in("_shared", "capturable")

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
                f"`optimizer` must be a torch.optim.Optimizer; got {type(optimizer).__name__}. "
                "Build one first: GatedGradClip(torch.optim.SGD(student.parameters(), lr=0.1))."
            )
        if isinstance(optimizer, GatedGradClip):
            raise TypeError(
                "`optimizer` must be a plain optimizer; got a GatedGradClip. Use that one, or wrap "
                "the optimizer inside it."
            )
        _check_settings(gate, scope, bound)
        check_bool("capturable", capturable)
        group = check_process_group(process_group)
        state = OptimizerState(optimizer, gate, scope, float(bound), group, capturable)
        trained = _trained(state.params)  # what can not be trained is told before a step
        if capturable:
            device = trained[0].device if trained else None
            for name in COUNTS:
                setattr(state, name, torch.zeros((), dtype=torch.int64, device=device))
        self.__setstate__({"_shared": state})

    def backward(self, task_loss: Tensor, transfer_loss: Tensor | None = None) -> None:
        """Leave the merged gradient of the two scalar losses in every ``p.grad``.

        Called again before `zero_grad` it accumulates both gradients and gates the sums. A
        parameter that the transfer loss does not reach keeps its task gradient; one that neither
        reaches keeps None. Without a transfer loss only the task gradient is added (warm-up, a
        batch of one sample). The autograd graph is freed: add a third loss to the task loss.
        """
        shared, group = self._shared, self._shared.process_group
        shared.sums.drop_cleared(shared.params)  # by `model.zero_grad()`, say
        _warn_of_sums(shared.sums.never_cleared())
        _check_processes(group)
        _check_settings(shared.gate, shared.scope, shared.bound, or_zero=True)  # as set since
        check_loss("task_loss", task_loss)
        if transfer_loss is not None:
            check_loss("transfer_loss", transfer_loss)
        held, outside = self._leaves(task_loss, transfer_loss)
        params = [*held, *outside]

        # 1 to 5: the steps of the class.
        two = transfer_loss is not None
        task = gradients_of("task_loss", task_loss, params, len(held), retain_graph=two)
        transfer = gradients_of(
            "transfer_loss",
            transfer_loss,
            params,
            len(held),
            retain_graph=False,
            scale=2.0**shared.scale_exponent,
        )
        if group is not None:  # 2
            alike = shared.capturable  # to compare would wait for the other processes
            if not alike:
                check_equal_leaves(outside, params[0].device, group)
            task = average_over_processes(task, params, group, alike=alike)
            transfer = average_over_processes(transfer, params, group, alike=alike)
        earlier = [shared.sums.of(p) for p in params]  # 3
        sums = [old.plus(*new) for old, *new in zip(earlier, task, transfer, strict=True)]
        # A step that is skipped stays so: a parameter without task gradient keeps no infinite sum.
        again = any(s.task_reaches or s.transfer is not None for s in earlier)
        skip = again and shared.sums.skipped
        merged, shared.sums.factors, skipped, overflows = merge_gradients(  # 4, 5
            sums,
            shared.gate,
            scope=shared.scope,
            bound=shared.bound,
            capturable=shared.capturable,
            skip=skip,
        )
        for p, gradient, its_sums in zip(params, merged, sums, strict=True):
            shared.sums.leave(p, gradient, its_sums)

        shared.skipped += skipped > skip  # that is "skipped and not skip": once a step
        shared.sums.skipped = skipped
        if any(gradient is not None for gradient in transfer):  # in every process alike
            shared.adapt_scale(overflows, skip, first=not again)

    @property
    def gates(self) -> list[float]:
        """The factors last applied; see the class."""
        gates: list[float] = self._shared.sums.factors.tolist()
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
        """Clear the gradients of the optimizer's parameters, and their accumulated sums.

        Not cleared: gradients that the wrapped `zero_grad` keeps (accelerate's does while it
        accumulates), and those of tensors outside the optimizer.
        """
        shared = self._shared
        shared.optimizer.zero_grad(set_to_none)
        shared.sums.drop_cleared(shared.params)

    def __repr__(self) -> str:
        return (
            f"GatedGradClip(gate={self.gate!r}, scope={self.scope!r}, bound={self.bound}, "
            f"optimizer={self._shared.optimizer!r})"
        )

    def _leaves(self, *losses: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parameters to train, and the leaves that the optimizer does not hold."""
        shared = self._shared
        held = _trained(shared.params)
        if not held:
            raise ValueError(
                "`optimizer` must hold a parameter that requires gradient; none of its "
                f"{len(shared.params)} does. Hand it the parameters to train, not frozen ones."
            )
        found = find_leaves(*(loss for loss in losses if loss is not None))
        leaves = dict.fromkeys([*shared.sums.leaves(), *found])
        params = set(shared.params)
        outside = [leaf for leaf in leaves if leaf not in params]
        for leaf in outside:
            check_plain_parameter("one outside it", leaf)
        return held, outside

    def _warn_if_ungated(self) -> None:
        shared = self._shared
        given = [p for p in shared.params if p.grad is not None]
        gated = [p for p in given if shared.sums.is_gated(p)]
        if shared.warned or not given or gated:
            return
        if all(group.get("lr") in (0, 0.0) for group in self.param_groups):
            return  # torch.distributed.checkpoint makes the state by a step that moves nothing
        shared.warned = True
        warnings.warn(
            "`step` was called on gradients that `backward` of this optimizer did not make, so "
            "nothing gates the transfer gradient. Call optimizer.backward(task_loss, "
            "transfer_loss) in place of loss.backward(); optimizer.backward(task_loss) adds a "
            "task gradient only.",
            stacklevel=4,
        )


def _warn_of_sums(leaves: list[Tensor]) -> None:
    if leaves:
        warnings.warn(
            f"Gradients were not cleared in {MANY} steps, and each step adds to them (number: "
            f"{len(leaves)}; first shape: {tuple(leaves[0].shape)}). Give the student's own heads "
            "to the optimizer, and call `optimizer.zero_grad()` in place of `model.zero_grad()`. "
            "Set the gradients of other tensors to None yourself.",
            stacklevel=3,
        )


def _check_settings(gate: Any, scope: Any, bound: Any, *, or_zero: bool = False) -> None:
    check_choice("gate", gate, ("norm", "sigmoid"), or_callable=True)
    check_choice("scope", scope, ("parameter", "global"), or_callable=False)
    check_positive("bound", bound, or_zero=or_zero)  # a schedule may begin at zero


def _check_processes(group: dist.ProcessGroup | None) -> None:
    alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
    if group is None and not alone:
        raise RuntimeError(
            f"`process_group` must be given among {dist.get_world_size()} processes: gradients "
            "would silently stay local, with or without DistributedDataParallel. Pass "
            "process_group=torch.distributed.group.WORLD, and run a DDP model under `no_sync()`."
        )


def _trained(params: list[Tensor]) -> list[Tensor]:
    trained = [p for p in params if p.requires_grad]
    for place, param in enumerate(trained):
        check_plain_parameter(f"number {place}", param)
    return trained
