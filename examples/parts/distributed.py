"""Several processes that train as one: each takes its share of every batch.

Every process holds the whole data set and draws the same weights, order, crops and flips; means
over processes then are those of the whole batch. Only the main process speaks and writes files.
In a single process every function here does nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from einops import pack, unpack
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined] # documented there

__all__ = [
    "all_processes",
    "average_gradients",
    "check_divisible",
    "end_all",
    "fails_first",
    "first_on_each_machine",
    "is_main",
    "mean_over_processes",
    "num_processes",
    "processes",
    "share_of",
    "sum_over_processes",
    "wait_for_all",
]

TIMEOUT = timedelta(hours=2)  # of a collective call; the first may wait for a download


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, and leave them at the end.

    ``cuda`` then is the GPU of this process, and what others than the main one print is dropped.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=TIMEOUT)
    if is_main():
        yield
    else:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            yield
    wait_for_all()  # the main process may still be drawing; not after an error, of course
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of gloo that outlive the interpreter abort a tidy end, now and then


def all_processes() -> dist.ProcessGroup | None:
    """Return the group of all processes; None where there is but one."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def num_processes() -> int:
    """Return how many processes train together."""
    group = all_processes()
    return 1 if group is None else group.size()


def is_main() -> bool:
    """Return whether this process is the one that speaks and writes."""
    group = all_processes()
    return group is None or group.rank() == 0


def check_divisible(batch_size: int, device: str) -> None:
    """Refuse a batch, or a device, that the processes can not divide among them."""
    if (count := num_processes()) == 1:
        return
    if batch_size % count:
        raise ValueError(
            f"`--batch-size` must be a multiple of {count}, the number of processes; "
            f"got {batch_size}. It counts the images of all of them."
        )
    wanted, here = torch.device(device), int(os.environ["LOCAL_WORLD_SIZE"])
    own_gpu = wanted == torch.device("cuda") and torch.cuda.device_count() >= here
    if wanted.type != "cpu" and not own_gpu:
        raise ValueError(
            f"`--device` must be cpu, or cuda with a GPU for each of the {here} processes here; "
            f"got {device} and {torch.cuda.device_count()} GPUs."
        )


def share_of(rows: Tensor) -> Tensor:
    """Return this process's share of the rows: all of them are given out, in rank order."""
    group = all_processes()
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    return rows[rank * len(rows) // size : (rank + 1) * len(rows) // size]


def sum_over_processes(part: Tensor) -> Tensor:
    """Return the sum of all processes' tensors.

    Gradient: each process gets that of the sum over processes of their losses.
    """
    if all_processes() is None:
        return part
    total: Tensor = _Sum.apply(part)  # type: ignore[no-untyped-call] # torch's own has no types
    return total


def mean_over_processes(part: Tensor) -> Tensor:
    """Return the mean of all processes' tensors; gradient as of `sum_over_processes`."""
    return sum_over_processes(part) / num_processes()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, part: Tensor) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return sum_over_processes(grad)


@torch.no_grad()
def average_gradients(params: Iterable[nn.Parameter]) -> None:
    """Average ``p.grad`` over processes, in one message; all have one type.

    Before `GradScaler` looks at them: it must find the same infinities everywhere.
    """
    if all_processes() is None:
        return
    gradients = [p.grad for p in params if p.grad is not None]
    flat, shapes = pack(gradients, "*")
    for gradient, mean in zip(
        gradients, unpack(mean_over_processes(flat), shapes, "*"), strict=True
    ):
        gradient.copy_(mean)


@contextmanager
def first_on_each_machine() -> Iterator[None]:
    """Run the body in one process of each machine, then in the others: what it caches is there."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        wait_for_all()
    yield
    if first:
        wait_for_all()


def wait_for_all() -> None:
    """Return when every process has come here."""
    sum_over_processes(torch.zeros(()))  # `barrier` would occupy a GPU


def fails_first() -> bool:
    """Return whether no other process has failed before, so that one message is enough."""
    if all_processes() is None:
        return True
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False)  # torchrun's own, which outlives the processes
    return store.add(f"failures of attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", 1) == 1


def end_all(message: str) -> NoReturn:
    """End this process, and so the others, which torchrun ends; only the first to fail says why."""
    if all_processes() is None:
        sys.exit(message)
    if fails_first():
        print(f"\n{message}", file=sys.stderr, flush=True)  # below the bar of the main process
    os._exit(1)  # a tidy end may wait for the others, and torchrun for this one
