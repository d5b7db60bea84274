"""What travels between processes: rows of singular vectors, and gradients.

A process group belongs to the processes that made it: copies of an object keep it, pickles do not.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from einops import pack, unpack
from torch import Tensor

__all__ = [
    "HoldsProcessGroup",
    "average_over_processes",
    "check_equal_batches",
    "check_equal_leaves",
    "check_process_group",
    "gather_rows",
    "group_size",
    "own_part",
]


def check_process_group(group: Any) -> dist.ProcessGroup | None:
    """Return ``group`` if it is a process group or None."""
    if group is None or isinstance(group, dist.ProcessGroup):
        return group
    raise TypeError(
        f"`process_group` must be a torch.distributed process group or None; got {group!r}. "
        "`torch.distributed.group.WORLD` is one after `init_process_group`."
    )


def group_size(group: dist.ProcessGroup | None) -> int:
    """Return the number of processes; one without a group."""
    return 1 if group is None else group.size()


def own_part(gathered: Tensor, group: dist.ProcessGroup | None, dim: int = 0) -> Tensor:
    """Return what this process gave to a gathered tensor."""
    return gathered if group is None else gathered.chunk(group.size(), dim)[group.rank()]


def check_equal_batches(batch: int, device: torch.device, group: dist.ProcessGroup | None) -> None:
    """Refuse batches that differ between processes, before a collective call aborts on them."""
    if group is None or torch.compiler.is_compiling():
        return
    batches = gather_rows(torch.tensor([batch], device=device), group).tolist()
    if len(set(batches)) > 1:
        raise ValueError(
            "Every process must hold the same number of samples; they have "
            f"{batches}. Use a sampler with `drop_last=True`."
        )


def check_equal_leaves(
    leaves: Sequence[Tensor], device: torch.device, group: dist.ProcessGroup
) -> None:
    """Refuse tensors outside the optimizer that differ between processes, before they are sent."""
    signature = zlib.crc32(repr([(tuple(p.shape), p.dtype) for p in leaves]).encode())
    found = gather_rows(torch.tensor([[len(leaves), signature]], device=device), group)
    counts, signatures = found.T.tolist()
    if len(set(signatures)) > 1:
        raise RuntimeError(
            "The losses of every process must reach the same tensors outside the optimizer, in "
            f"number, shape and dtype; the processes have {counts}, this one "
            f"{[tuple(p.shape) for p in leaves]}. Add these tensors to the optimizer, or use all "
            "of them in every process and step."
        )


class HoldsProcessGroup:
    """Leave ``process_group`` out of pickles, and hand it to copies as it is."""

    process_group: dist.ProcessGroup | None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"process_group": None}
        # What `Module.compile` leaves runs the module it was called on; torch drops it likewise.
        state.pop("_compiled_call_impl", None)
        return state

    def __copy__(self) -> Any:
        return self._twin(self.__class__.__new__(self.__class__), self.__getstate__())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = twin = self.__class__.__new__(self.__class__)
        return self._twin(twin, deepcopy(self.__getstate__(), memo))

    def _twin(self, twin: Any, state: dict[str, Any]) -> Any:
        twin.__setstate__(state | {"process_group": self.process_group})
        return twin


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the rows of all processes of ``group``, in rank order; ``rows`` without a group.

    Gradient: each process gets the sum over processes of the gradients of its own rows.
    """
    if group is None:
        return rows
    gathered: Tensor = _GatherRows.apply(rows, group)  # type: ignore[no-untyped-call] # torch's own method has no types
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(rows) for _ in range(group.size())]
        dist.all_gather(parts, rows.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)  # autograd may still use `grad`
        dist.all_reduce(total, group=ctx.group)
        return own_part(total, ctx.group), None


def average_over_processes(
    gradients: Sequence[Tensor | None],
    params: Sequence[Tensor],
    group: dist.ProcessGroup,
    *,
    alike: bool,
) -> list[Tensor | None]:
    """Average gradients over a process group; None only where no process has a gradient.

    If ``alike``, all processes have gradients of the same parameters; else they are asked.
    """
    reached = [float(g is not None) for g in gradients]
    if not alike:
        counts = torch.tensor(reached, device=params[0].device)
        dist.all_reduce(counts, group=group)
        reached = counts.tolist()
    averaged: list[Tensor | None] = [None] * len(params)
    places = [n for n, count in enumerate(reached) if count]
    # In the order of the parameters: a set has another one in each process, messages must not.
    for kind in dict.fromkeys((params[n].dtype, params[n].device) for n in places):
        same = [n for n in places if (params[n].dtype, params[n].device) == kind]
        dense = [torch.zeros_like(params[n]) if (g := gradients[n]) is None else g for n in same]
        flat, shapes = pack(dense, "*")  # one message a kind
        flat = flat / group.size()  # before the sum, which could overflow in float16
        dist.all_reduce(flat, group=group)
        for n, mean in zip(same, unpack(flat, shapes, "*"), strict=True):
            averaged[n] = mean
    return averaged
