"""Several processes give what one process gives on the concatenated batch (gloo, CPU)."""

import copy
import pickle
import traceback
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # before torch 2.6
    from torch.distributed._composable.fsdp import fully_shard

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss
from graph_kd._distributed import average_over_processes, gather_rows, own_part

POINTS = ["1", "3", "5"]
TEACHER, STUDENT = [6, 8, 10], [3, 5, 4]
WORLD = 3  # processes
BATCH = 6  # samples of all of them
STEPS = 3
LARGE = torch.full((2,), 6e4, dtype=torch.float16)
PRECISIONS = [torch.float32, torch.float64, torch.float16] * 2
FORMS = {
    "sum": {},
    "batchmean": {"reduction": "batchmean"},
    "ddp": {"ddp": True},
    "ddp, batchmean": {"ddp": True, "reduction": "batchmean"},
    "accumulated": {"calls": 2},
    "own heads": {"student_channels": STUDENT},
    "own heads, batchmean, eval": {
        "student_channels": STUDENT,
        "reduction": "batchmean",
        "training": False,
    },
    "own heads, equal": {"student_channels": TEACHER},
    "rank-deficient": {"deficient": True},
    "own heads, rank-deficient": {"student_channels": STUDENT, "deficient": True},
    "one sample each": {"batch": WORLD},
}


def network(seed, channels=TEACHER, deficient=False):
    """Rank-deficient: ReLU maps of 2 × 2 positions have a rank of at most four, often of less."""
    torch.manual_seed(seed)
    layers, incoming = [], 3
    for width in channels:
        layers += [nn.Conv2d(incoming, width, 3, padding=1), nn.ReLU() if deficient else nn.Tanh()]
        incoming = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(incoming, 4)]
    return nn.Sequential(*layers).double()


def train(group, *, batch=BATCH, ddp=False, calls=1, training=True, deficient=False, **settings):
    """Train heads and student on this process's part of each batch.

    Return parameters, buffers, losses and graphs.
    """
    rank, world = (0, 1) if group is None else (group.rank(), group.size())
    mine = slice(rank * batch // world, (rank + 1) * batch // world)
    student = network(1, settings.get("student_channels", TEACHER), deficient)
    teacher = network(2, TEACHER, deficient).requires_grad_(False)
    torch.manual_seed(3)
    loss = GraphTransferLoss(TEACHER, 3, process_group=group, **settings).double()
    if ddp and group is not None:
        student = DistributedDataParallel(student, process_group=group)
    student_hooks, teacher_hooks = FeatureHooks(student, POINTS), FeatureHooks(teacher, POINTS)
    size, generator = 2 if deficient else 6, torch.Generator().manual_seed(4)
    images = torch.randn(STEPS, batch, 3, size, size, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (STEPS, batch), generator=generator)

    torch.manual_seed(100 + rank)  # processes draw differently, as they do when they augment
    heads = torch.optim.SGD(loss.estimators.parameters(), lr=0.1)
    for step in range(3):
        teacher(images[step, mine])
        heads.zero_grad()
        loss.estimator_loss(teacher_hooks).backward()
        heads.step()

    losses = []
    loss.train(training)
    trained = [*student.parameters(), *loss.student_heads.parameters()]
    optimizer = GatedGradClip(torch.optim.SGD(trained, lr=0.1, momentum=0.9), process_group=group)
    for step in range(STEPS):
        optimizer.zero_grad()
        for _ in range(calls):
            teacher(images[step, mine])
            # Without DDP there is nothing to switch off.
            with getattr(student, "no_sync", torch.enable_grad)():
                task = nn.functional.cross_entropy(student(images[step, mine]), labels[step, mine])
                transfer = loss(student_hooks, teacher_hooks)
                optimizer.backward(task, transfer)
            losses.append(torch.stack([task, transfer]).detach())
        optimizer.step()
    graphs = loss.graphs(student_hooks.features, align_to=teacher_hooks.features)
    parameters = [p.detach().clone() for m in (student, loss) for p in m.parameters()]
    return parameters, list(loss.buffers()), torch.stack(losses), torch.cat(graphs)


def mixed_gradients(rank):
    """Return gradients of three types; only process 1 has the first one, none has the last."""
    gradients = [
        torch.full((n + 1,), WORLD * 2.0**n * (rank + 1), dtype=dtype)
        for n, dtype in enumerate(PRECISIONS)
    ]
    return [gradients[0] if rank == 1 else None, *gradients[1:-1], None]


class Body(nn.Module):
    """A part that the optimizer holds, and one that it does not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.held, self.other = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()

    def losses(self, rows):
        hidden = self.held(rows).tanh()
        return self.other(hidden).square().mean(), (hidden - 1).square().sum(1).mean() * 5


def two_owners(group, transfer=True):
    """Return the gradients of a body and a head after two calls, one of them without transfer."""
    rank, world = (0, 1) if group is None else (group.rank(), group.size())
    body = Body()
    optimizer = GatedGradClip(torch.optim.SGD(body.held.parameters(), lr=0.1), process_group=group)
    rows = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mine = rows[rank * 6 // world : (rank + 1) * 6 // world]
    task, transfer_loss = body.losses(mine)
    optimizer.backward(task, transfer_loss if transfer else None)
    optimizer.backward(body.losses(mine)[0], None)
    return [p.grad for p in body.parameters()], optimizer.gates


def through_subgroup(group):
    """Use a group whose only process has another rank in the world."""
    results = [train(group)]
    rows = torch.full((3, 2), 2.0).T.requires_grad_()  # not contiguous
    gathered = gather_rows(rows, group)
    gathered.square().sum().backward()
    results += [gathered.detach(), rows.grad, two_owners(group)]
    loss = GraphTransferLoss(TEACHER, process_group=group).double()
    generator = torch.Generator().manual_seed(3)
    features = [torch.randn(3, c, 2, 2, generator=generator).double() for c in TEACHER]
    return [*results, loss.estimator_loss(features).isfinite().item()]


def capturable_step(group):
    """Return the merged gradients of a step, and how often `tolist` was called meanwhile."""
    torch.manual_seed(0)
    student, loss = nn.Linear(5, 10), GraphTransferLoss([4, 6], 2, capturable=True)
    sgd = torch.optim.SGD(student.parameters())
    optimizer = GatedGradClip(sgd, process_group=group, capturable=True)
    loss.process_group = group
    teacher, inputs = torch.randn(BATCH, 10), torch.randn(BATCH, 5)
    reads, tolist = [], torch.Tensor.tolist
    torch.Tensor.tolist = lambda tensor: reads.append(tensor) or tolist(tensor)
    split = [own_part(t, group).split([4, 6], dim=1) for t in (student(inputs), teacher)]
    optimizer.backward(own_part(student(inputs), group).square().mean(), loss(*split))
    torch.Tensor.tolist = tolist
    return [p.grad for p in student.parameters()], len(reads)


LAWS = {}


def law(check):
    """Have every process make a check, which is a test of its own below."""
    LAWS[check.__name__] = check
    return check


@law
def unequal_batches_are_refused(group):
    loss = GraphTransferLoss(TEACHER, process_group=group).double()
    features = [torch.ones(2 + group.rank(), c, 2, 2).double() for c in TEACHER]
    with pytest.raises(ValueError, match="must hold the same number of samples; they"):
        loss.estimator_loss(features)


@law
def leaves_outside_the_optimizer_that_differ_are_refused(group):
    rank, rows = group.rank(), torch.ones(2, 3).double()
    for kind, counts in {"number": r"\[0, 2", "shape": r"\[3, 3", "dtype": r"\[3, 3"}.items():
        body = Body()
        optimizer = torch.optim.SGD(body.held.parameters(), lr=0.1)
        task, transfer = body.losses(rows)
        if kind == "number":
            task = body.held(rows).sum() if rank == 0 else task
        elif kind == "shape":
            task = task + torch.zeros(2 + rank, requires_grad=True).sum()
        else:
            dtype = torch.float32 if rank % 2 else torch.float64
            task = task + torch.zeros(2, dtype=dtype, requires_grad=True).sum()
        with pytest.raises(RuntimeError, match=f"must reach the same tensors outside .*{counts}"):
            GatedGradClip(optimizer, process_group=group).backward(task, transfer)


@law
def blocks_are_as_large_as_those_of_one_process(group):
    """Its rows have the columns of all processes."""
    loss, entries = GraphTransferLoss(TEACHER, 3, process_group=group).double(), []
    loss.squash = lambda logits: entries.append(logits[0].numel()) or logits
    generator = torch.Generator().manual_seed(3)
    maps = [torch.randn(8, c, 2, 2, generator=generator).double() for c in TEACHER]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graph_kd._graphs.BLOCK_ENTRIES", 16 * group.size())  # two rows
        loss(maps, maps)
    assert set(entries) == {16 * group.size()}


@law
def what_one_process_reaches_is_reached(group):
    """Only process 0's task reaches the second parameter, only its transfer the third."""
    a, b, c = (torch.zeros(1, requires_grad=True) for _ in range(3))
    optimizer = GatedGradClip(torch.optim.SGD([a, b, c], lr=0.1), process_group=group)
    alone = group.rank() == 0
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        task, transfer = a.sum() + (0 * b.sum() if alone else 0), 4 * b.sum()
        optimizer.backward(task, transfer + (group.size() * 2 * c.sum() if alone else 0))
    # The task reaches b, with zeros; c belongs to the transfer loss: 1 / 2 of its norm.
    assert optimizer.gates == [0.0, 0.5]


@law
def a_missing_transfer_loss_counts_as_zero_in_the_mean(group):
    param = torch.zeros(1, requires_grad=True)
    optimizer = GatedGradClip(torch.optim.SGD([param], lr=0.1), bound=9.0, process_group=group)
    last = group.rank() == group.size() - 1
    optimizer.backward(param.sum(), 2.0 * param.sum() if last else None)
    assert param.grad.item() == pytest.approx(1.0 + 2.0 / group.size())


@law
def an_overflow_of_one_process_lowers_the_scale_of_all(group):
    param = torch.zeros(1, requires_grad=True)
    optimizer = GatedGradClip(torch.optim.SGD([param], lr=0.1), bound=1e9, process_group=group)
    last = group.rank() == group.size() - 1
    optimizer.backward(param.sum(), torch.inf * param.sum() if last else None)
    optimizer.zero_grad()
    # The backward pass of the gathered rows adds what all processes send, each with its scale.
    optimizer.backward(param.sum(), gather_rows(param, group).sum())
    assert param.grad.item() == pytest.approx(1.0 + group.size())


@law
def gradients_of_mixed_precision_are_averaged_each_in_its_own(group):
    params = [torch.zeros(n + 1, dtype=dtype) for n, dtype in enumerate(PRECISIONS)]
    whole = [mixed_gradients(rank) for rank in range(group.size())]
    averaged = average_over_processes(whole[group.rank()], params, group, alike=False)
    for got, *parts in zip(averaged, *whole, strict=True):
        given = [part for part in parts if part is not None]
        assert (got is None) == (not given)
        if given:
            torch.testing.assert_close(got, sum(given) / group.size(), rtol=0, atol=0)


@law
def a_mean_of_large_gradients_does_not_overflow(group):
    (mean,) = average_over_processes([LARGE], [LARGE], group, alike=True)
    assert torch.equal(mean, LARGE)


@law
def gathering_leaves_the_gradient_it_was_given_alone(group):
    """Another use of the gathered rows sees it too."""
    rows = torch.ones(1, 2, requires_grad=True)
    weight = torch.zeros(group.size(), 2, requires_grad=True)
    seed, own = (torch.full((group.size(), 2), group.rank() + 1.0) for _ in range(2))
    (gather_rows(rows, group) + weight).backward(seed)
    assert torch.equal(rows.grad, sum(range(1, group.size() + 1)) * torch.ones(1, 2))
    assert torch.equal(weight.grad, own)
    assert torch.equal(seed, own)


@law
def each_process_may_lay_out_what_it_gathers_in_its_own_way(group):
    rows, seed = (torch.arange(3.0 * n).view(n, 3) for n in (2, 2 * group.size()))
    wanted, own = rows.repeat(group.size(), 1), group.size() * own_part(seed, group)
    if group.rank() == 0:
        rows, seed = rows.T.contiguous().T, seed.T.contiguous().T
    gathered = gather_rows(rows.requires_grad_(), group)
    gathered.backward(seed)
    assert torch.equal(gathered, wanted)
    assert torch.equal(rows.grad, own)


@law
def a_loss_with_a_group_compiles(group):
    torch._dynamo.reset()
    channels = TEACHER[:2]  # each pair is traced anew, and takes long
    loss = GraphTransferLoss(channels, 2, process_group=group)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    maps = [torch.randn(4, c, 3, 3, generator=torch.Generator().manual_seed(0)) for c in channels]
    student = [m.flip(0) for m in maps]
    torch.testing.assert_close(compiled(student, maps), loss(student, maps))


def verdict(check, group):
    try:
        check(group)
    except BaseException:  # noqa: BLE001 # pytest's failures are no `Exception`
        return traceback.format_exc()


def work(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    group = dist.group.WORLD
    got = {
        "results": {form: train(group, **settings) for form, settings in FORMS.items()},
        "owners": [two_owners(group), two_owners(group, transfer=False)],
        "capturable": capturable_step(group),
        "laws": {name: verdict(check, group) for name, check in LAWS.items()},
    }
    subgroup = dist.new_group([1])
    if rank == 1:
        got["subgroup"] = through_subgroup(subgroup)
    torch.save(got, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Run everything in three processes and return what each of them got."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("form", FORMS)
def test_processes_train_as_one_does_on_the_whole_batch(processes, form):
    parameters, buffers, losses, graphs = train(None, **FORMS[form])
    got = [process["results"][form] for process in processes]
    for own_parameters, own_buffers, _, _ in got:
        torch.testing.assert_close(own_parameters, parameters, rtol=0, atol=1e-9)
        torch.testing.assert_close(own_buffers, buffers, rtol=0, atol=1e-9)
    mean_losses = torch.stack([own_losses for _, _, own_losses, _ in got]).mean(dim=0)
    torch.testing.assert_close(mean_losses, losses, rtol=1e-7, atol=1e-9)
    # Each process has its own rows against all columns.
    rows = torch.cat([own_graphs for _, _, _, own_graphs in got], dim=1)
    torch.testing.assert_close(rows, graphs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", LAWS)
def test_in_every_process(processes, name):
    for process in processes:
        assert process["laws"][name] is None, process["laws"][name]


@pytest.mark.parametrize("transfer", [True, False])
def test_leaves_outside_the_optimizer_are_averaged_as_well(processes, transfer):
    gradients, gates = two_owners(None, transfer)
    for process in processes:
        got, got_gates = process["owners"][0 if transfer else 1]
        torch.testing.assert_close(got, gradients, rtol=0, atol=1e-12)
        assert got_gates == pytest.approx(gates)
        assert bool(got_gates) == transfer


def test_a_subgroup_is_a_group_of_its_own(processes):
    trained, gathered, gradient, owners, finite = processes[1]["subgroup"]
    torch.testing.assert_close(trained, train(None), rtol=0, atol=1e-9)
    assert torch.equal(gathered, torch.full((2, 3), 2.0))
    assert torch.equal(gradient, torch.full((2, 3), 4.0))
    torch.testing.assert_close(owners, two_owners(None), rtol=0, atol=1e-12)
    assert finite


def test_a_capturable_step_reads_nothing_back(processes):
    wanted, _ = capturable_step(None)
    for process in processes:
        gradients, reads = process["capturable"]
        torch.testing.assert_close(gradients, wanted, rtol=1e-3, atol=1e-5)
        assert reads == 0


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("form", FORMS)
def test_a_group_of_one_process_is_no_group(group_of_one, form):
    got, wanted = (train(group, **FORMS[form]) for group in (group_of_one, None))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_a_group_of_one_process_refuses_a_single_sample(group_of_one):
    loss = GraphTransferLoss(TEACHER, process_group=group_of_one)
    with pytest.raises(ValueError, match=r"`teacher_features\[0\]` .* at least 2 samples"):
        loss.estimator_loss([torch.ones(1, c) for c in TEACHER])


def test_copies_keep_the_group_and_pickles_do_not(group_of_one):
    loss = GraphTransferLoss(TEACHER, process_group=group_of_one)
    assert copy.copy(loss).process_group is group_of_one
    assert copy.deepcopy(loss).process_group is group_of_one
    assert pickle.loads(pickle.dumps(loss)).process_group is None


def test_deepcopy_follows_cycles():
    loss = GraphTransferLoss(TEACHER)
    loss.squash = partial(torch.mul, loss)  # refers back to the loss
    twin = copy.deepcopy(loss)
    assert twin.squash.args[0] is twin


def test_a_sharded_parameter_is_refused_before_the_first_step(group_of_one):
    mesh = init_device_mesh("cpu", (group_of_one.size(),))
    model = nn.Linear(4, 2)
    fully_shard(model, mesh=mesh)
    with pytest.raises(TypeError, match=r"must hold plain parameters; number 0 is a DTensor"):
        GatedGradClip(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("when", ["construction", "backward"])
def test_fsdp1_is_refused(group_of_one, use_orig_params, when):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that one process shards nothing
        model = FullyShardedDataParallel(
            nn.Linear(4, 2),
            process_group=group_of_one,
            use_orig_params=use_orig_params,
            device_id=torch.device("cpu"),
        )
    refused = pytest.raises(TypeError, match=r"flattened parameter \(FSDP1\) .* use DDP under")
    if when == "construction":
        with refused:
            GatedGradClip(torch.optim.SGD(model.parameters(), lr=0.1))
        return
    head = nn.Linear(2, 1)
    optimizer = GatedGradClip(torch.optim.SGD(head.parameters(), lr=0.1))
    output = head(model(torch.ones(3, 4)))
    with refused:  # outside the optimizer
        optimizer.backward(output.sum(), output.square().sum())
    optimizer = GatedGradClip(torch.optim.SGD(head.parameters(), lr=0.1))
    optimizer.add_param_group({"params": list(model.parameters())})
    with refused:  # added later
        optimizer.backward(output.sum(), output.square().sum())
