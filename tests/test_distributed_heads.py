"""Two processes equal one on own heads and on rank-deficient maps (gloo, CPU)."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss

POINTS = ["1", "3", "5"]
TEACHER, STUDENT = [6, 8, 10], [3, 5, 4]
BATCH, STEPS, WORLD = 8, 10, 2
FORMS = ["own heads", "own heads, eval", "own heads, equal", "rank-deficient", "own, deficient"]


def network(seed, channels, deficient):
    """ReLU maps of 2 × 2 positions have a rank of at most four, and often of less."""
    torch.manual_seed(seed)
    layers, incoming = [], 3
    for width in channels:
        layers += [nn.Conv2d(incoming, width, 3, padding=1), nn.ReLU() if deficient else nn.Tanh()]
        incoming = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(incoming, 4)
    ).double()


def train(form, group):
    """Train heads, then the student and its own heads; return parameters, buffers and losses."""
    rank, world = (0, 1) if group is None else (group.rank(), group.size())
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    deficient = "deficient" in form
    channels = STUDENT if form in ("own heads", "own heads, eval", "own, deficient") else TEACHER
    own = {"student_channels": channels} if form.startswith("own") else {}
    student, teacher = network(1, channels, deficient), network(2, TEACHER, deficient)
    torch.manual_seed(3)
    loss = GraphTransferLoss(TEACHER, 3, process_group=group, **own).double()
    of_student, of_teacher = FeatureHooks(student, POINTS), FeatureHooks(teacher, POINTS)
    size = 2 if deficient else 6
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(STEPS, BATCH, 3, size, size, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (STEPS, BATCH), generator=generator)

    torch.manual_seed(100)
    heads = torch.optim.SGD(loss.estimators.parameters(), lr=0.1)
    for step in range(3):
        with torch.no_grad():
            teacher(images[step, mine])
        heads.zero_grad()
        loss.estimator_loss(of_teacher.features).backward()
        heads.step()

    loss.train("eval" not in form)
    trained = [*student.parameters(), *loss.student_heads.parameters()]
    optimizer = GatedGradClip(torch.optim.SGD(trained, lr=0.1, momentum=0.9), process_group=group)
    losses = []
    for step in range(STEPS):
        with torch.no_grad():
            teacher(images[step, mine])
        task = nn.functional.cross_entropy(student(images[step, mine]), labels[step, mine])
        transfer = loss(of_student.features, of_teacher.features)
        optimizer.zero_grad()
        optimizer.backward(task, transfer)
        optimizer.step()
        losses.append(transfer.detach())
    graphs = loss.graphs(of_student.features, align_to=of_teacher.features)
    parameters = [p.detach().clone() for m in (student, loss) for p in m.parameters()]
    buffers = [b.clone() for b in loss.buffers()]
    return parameters, buffers, torch.stack(losses), torch.cat(graphs)


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    results = {form: train(form, dist.group.WORLD) for form in FORMS}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("form", FORMS)
def test_two_processes_train_as_one_does_on_the_whole_batch(processes, form):
    parameters, buffers, losses, graphs = train(form, None)
    got = [process[form] for process in processes]
    for own_parameters, own_buffers, _, _ in got:
        torch.testing.assert_close(own_parameters, parameters, rtol=0, atol=1e-9)
        torch.testing.assert_close(own_buffers, buffers, rtol=0, atol=1e-9)
    mean = torch.stack([own_losses for _, _, own_losses, _ in got]).mean(dim=0)
    torch.testing.assert_close(mean, losses, rtol=1e-7, atol=1e-9)
    # Each process has its own rows against all columns.
    rows = torch.cat([own_graphs for _, _, _, own_graphs in got], dim=1)
    torch.testing.assert_close(rows, graphs, rtol=0, atol=1e-9)
