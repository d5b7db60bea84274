"""What the examples share in several processes is what one process has."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from parts.batch_norm import GlobalBatchNorm2d, synchronise_batch_norm
from parts.distributed import (
    all_processes,
    average_gradients,
    check_divisible,
    first_on_each_machine,
    mean_over_processes,
    num_processes,
    share_of,
    sum_over_processes,
)
from torch import nn

WORLDS = [2, 4]


def normalise(steps=3):
    """Train a batch norm on this process's share; return all that it gave."""
    generator = torch.Generator().manual_seed(0)
    norm = synchronise_batch_norm(nn.Sequential(nn.BatchNorm2d(3, momentum=0.3)).double())
    optimizer = torch.optim.SGD(norm.parameters(), lr=1.0)
    outputs, gradients = [], []
    for _ in range(steps):
        images, weights = torch.randn(2, 8, 3, 2, 5, generator=generator, dtype=torch.float64)
        images = images * torch.tensor([[[0.1]], [[1.0]], [[3.0]]]) + 5
        own = share_of(images).requires_grad_()
        output = norm(own)
        optimizer.zero_grad()
        (output * share_of(weights)).square().mean().backward()
        average_gradients(norm.parameters())
        optimizer.step()
        outputs.append(output.detach())
        gradients.append(own.grad / num_processes())  # of the mean over processes
    outputs.append(norm.eval()(own).detach())
    return {"outputs": outputs, "gradients": gradients, "state": norm.state_dict()}


def message(function, *arguments):
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return None


def work(rank, folder):
    torch.set_num_threads(1)
    for world in (world for world in WORLDS if rank < world):
        os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
        store = f"file://{folder}/store{world}"
        limit = timedelta(seconds=180)
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=world, timeout=limit
        )
        cache = Path(folder) / f"cache{world}"
        with first_on_each_machine():
            cached = cache.exists()
            time.sleep(0.2)
            cache.touch()
        part = torch.full((2,), float(rank), requires_grad=True)
        (mean_over_processes(part).square() * (rank + 1)).sum().backward()
        got = normalise() | {
            "cached": cached,
            "share": share_of(torch.arange(5)),
            "sum": sum_over_processes(torch.tensor(rank)),
            "gradient of a mean": part.grad,
            "batch": message(check_divisible, world + 1, "cpu"),
            "device": message(check_divisible, world, "cuda:0"),
            "fits": message(check_divisible, 3 * world, "cpu"),
        }
        torch.save(got, f"{folder}/{world}.{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run everything in four processes, of which two go first; return where the results are."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (str(folder),), nprocs=max(WORLDS))
    return folder


@pytest.fixture(params=WORLDS)
def processes(request, folder):
    """Return what each process got."""
    return [torch.load(folder / f"{request.param}.{rank}.pt") for rank in range(request.param)]


def test_batch_norm_spans_the_batch_of_all_processes(processes):
    exact = {"rtol": 0, "atol": 1e-12}
    whole = normalise()
    for name in ("outputs", "gradients"):
        got = [torch.cat(parts) for parts in zip(*(p[name] for p in processes), strict=True)]
        torch.testing.assert_close(got, whole[name], **exact)
    for process in processes:
        assert list(process["state"]) == list(whole["state"])
        torch.testing.assert_close(process["state"], whole["state"], **exact)
        assert all(
            torch.equal(process["state"][k], processes[0]["state"][k]) for k in whole["state"]
        )


def test_shares_are_all_rows_in_order(processes):
    assert torch.cat([p["share"] for p in processes]).tolist() == list(range(5))


def test_sums_and_means_and_their_gradients_span_all_processes(processes):
    count = len(processes)
    mean = (count - 1) / 2
    for process in processes:
        assert process["sum"] == mean * count
        # Σ over processes of (rank + 1) · 2 · mean / count
        expected = torch.full((2,), mean * (count + 1))
        torch.testing.assert_close(process["gradient of a mean"], expected)


def test_one_process_fills_the_cache_of_a_machine(processes):
    assert [p["cached"] for p in processes] == [False] + [True] * (len(processes) - 1)


def test_what_can_not_be_divided_is_refused(processes):
    count = len(processes)
    for process in processes:
        assert f"`--batch-size` must be a multiple of {count}, the n" in process["batch"]
        assert (
            f"`--device` must be cpu, or cuda with a GPU for each of the {count} processes"
            in (process["device"])
        )
        assert process["fits"] is None


def test_batch_norm_is_exact_far_from_zero():
    images = torch.randn(8, 3, 4, 4) + 1000
    got = GlobalBatchNorm2d(3)(images)
    expected = nn.BatchNorm2d(3).double()(images.double()).float()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


def test_one_process_keeps_its_batch_norm():
    assert all_processes() is None
    assert type(synchronise_batch_norm(nn.Sequential(nn.BatchNorm2d(3)))[0]) is nn.BatchNorm2d
