"""Several processes give what one process gives on the concatenated batch (gloo, CPU)."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # before torch 2.6
    from torch.distributed._composable.fsdp import fully_shard

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss
from graph_kd._distributed import average_over_processes

POINTS = ["1", "3", "5"]
CHANNELS = [4, 5, 6]
BATCH = 8
STEPS = 10
PRECISIONS = [torch.float32, torch.float64, torch.float16] * 2
FORMS = ["plain", "ddp", "accumulated"]


def network(seed):
    torch.manual_seed(seed)
    layers, incoming = [], 3
    for channels in CHANNELS:
        layers += [nn.Conv2d(incoming, channels, 3, padding=1), nn.Tanh()]
        incoming = channels
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(incoming, 4)]
    return nn.Sequential(*layers).double()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 6, 6, generator=generator, dtype=torch.float64)
    return images, torch.randint(4, (BATCH,), generator=generator)


def train(form, reduction, group):
    """Train heads and student, on this process's part of each batch; return parameters, losses."""
    rank, world = (0, 1) if group is None else (group.rank(), group.size())
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    student, teacher = network(1), network(2).requires_grad_(False)
    torch.manual_seed(3)
    loss = GraphTransferLoss(CHANNELS, 3, reduction=reduction, process_group=group).double()
    if form == "ddp" and group is not None:
        student = DistributedDataParallel(student, process_group=group)
    of_student, of_teacher = FeatureHooks(student, POINTS), FeatureHooks(teacher, POINTS)

    torch.manual_seed(100 + rank)  # processes draw differently, as they do when they augment
    heads = torch.optim.SGD(loss.parameters(), lr=0.1)
    for step in range(3):
        teacher(batch(step)[0][mine])
        heads.zero_grad()
        loss.estimator_loss(of_teacher).backward()
        heads.step()

    losses = []
    optimizer = GatedGradClip(
        torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9), process_group=group
    )
    for step in range(STEPS):
        images, labels = (part[mine] for part in batch(step))
        optimizer.zero_grad()
        for _ in range(2 if form == "accumulated" else 1):
            teacher(images)
            # Without DDP there is nothing to switch off.
            quiet = getattr(student, "no_sync", torch.enable_grad)
            with quiet():
                task = nn.functional.cross_entropy(student(images), labels)
                transfer = loss(of_student, of_teacher)
                optimizer.backward(task, transfer)
            losses.append(torch.stack([task, transfer]).detach())
        optimizer.step()
    parameters = [p.detach().clone() for m in (student, loss) for p in m.parameters()]
    return parameters, torch.stack(losses), list(loss.buffers())


def refusal():
    optimizer = GatedGradClip(torch.optim.SGD(network(1).parameters(), lr=0.1))
    try:
        optimizer.backward(torch.zeros(()), torch.zeros(()))
    except RuntimeError as error:
        return str(error)
    return None


def unequal_batches(group):
    loss = GraphTransferLoss(CHANNELS, process_group=group).double()
    try:
        loss.estimator_loss([torch.ones(2 + group.rank(), c, 2, 2).double() for c in CHANNELS])
    except ValueError as error:
        return str(error)
    return None


def mixed_gradients(rank):
    """Return gradients of three types; only process 1 has the first one, none has the last."""
    gradients = [
        torch.full((n + 1,), 2.0**n * (rank + 1), dtype=dtype) for n, dtype in enumerate(PRECISIONS)
    ]
    return [gradients[0] if rank == 1 else None, *gradients[1:-1], None]


def work(rank, world, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    results = {
        (form, reduction): train(form, reduction, dist.group.WORLD)
        for form in FORMS
        for reduction in ("sum", "batchmean")
    }
    refusals = {"no group": refusal(), "unequal": unequal_batches(dist.group.WORLD)}
    params = [torch.zeros(n + 1, dtype=dtype) for n, dtype in enumerate(PRECISIONS)]
    mixed = average_over_processes(mixed_gradients(rank), params, dist.group.WORLD)
    got = {"results": results, "refusals": refusals, "mixed": mixed}
    torch.save(got, f"{folder}/{world}.{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def processes(request, tmp_path_factory):
    """Run everything in two and in four processes and return what each of them got."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{request.param}.{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("reduction", ["sum", "batchmean"])
@pytest.mark.parametrize("form", FORMS)
def test_processes_train_as_one_does_on_the_whole_batch(processes, form, reduction):
    parameters, losses, buffers = train(form, reduction, None)
    got = [process["results"][form, reduction] for process in processes]
    for own_parameters, _, own_buffers in got:
        torch.testing.assert_close(own_parameters, parameters, rtol=0, atol=1e-9)
        torch.testing.assert_close(own_buffers, buffers, rtol=0, atol=1e-9)
    mean_losses = torch.stack([own_losses for _, own_losses, _ in got]).mean(dim=0)
    torch.testing.assert_close(mean_losses, losses, rtol=1e-7, atol=1e-9)


def test_several_processes_without_a_group_are_refused(processes):
    for rank in processes:
        assert "`process_group` must be given among" in rank["refusals"]["no group"]


def test_unequal_batches_are_refused(processes):
    for rank in processes:
        assert "must hold the same number of samples; their" in rank["refusals"]["unequal"]


def test_gradients_of_mixed_precision_are_averaged_each_in_its_own(processes):
    whole = [mixed_gradients(rank) for rank in range(len(processes))]
    for process in processes:
        for got, *parts in zip(process["mixed"], *whole, strict=True):
            given = [part for part in parts if part is not None]
            assert (got is None) == (not given)
            if given:
                torch.testing.assert_close(got, sum(given) / len(processes), rtol=0, atol=0)


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("reduction", ["sum", "batchmean"])
@pytest.mark.parametrize("form", FORMS)
def test_a_group_of_one_process_is_no_group(group_of_one, form, reduction):
    torch.testing.assert_close(
        train(form, reduction, group_of_one), train(form, reduction, None), rtol=0, atol=1e-12
    )


def test_copies_keep_the_group_and_pickles_do_not(group_of_one):
    loss = GraphTransferLoss(CHANNELS, process_group=group_of_one)
    optimizer = GatedGradClip(
        torch.optim.SGD(loss.parameters(), lr=0.1), process_group=group_of_one
    )
    for thing in (loss, optimizer):
        assert copy.copy(thing).process_group is group_of_one
        assert copy.deepcopy(thing).process_group is group_of_one
        assert pickle.loads(pickle.dumps(thing)).process_group is None


def test_a_sharded_parameter_is_refused_before_the_first_step(group_of_one):
    mesh = init_device_mesh("cpu", (group_of_one.size(),))
    model = nn.Linear(4, 2)
    fully_shard(model, mesh=mesh)
    with pytest.raises(TypeError, match=r"must hold plain parameters; number 0 is a DTensor"):
        GatedGradClip(torch.optim.SGD(model.parameters(), lr=0.1))
