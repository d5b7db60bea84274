"""The training of the recipes in examples/integrations/, written out in pure PyTorch."""

import contextlib
import os
import socket

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from graph_kd import FeatureHooks, GatedGradClip

BATCH, ACCUMULATE, CLIP = 8, 2, 1.0


def loader(batch=BATCH):
    """Return 32 images and labels, in the same order every epoch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 3, 8, 8, generator=generator)
    labels = torch.randint(4, (32,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=batch, drop_last=True)


def pair(make, for_student, for_teacher):
    """Return a student and a teacher, the same at every call."""
    torch.manual_seed(1)
    return make(for_student), make(for_teacher)


def features_of(teacher, points):
    """Yield the teacher's features of each batch."""
    with FeatureHooks(teacher, points) as hooks:
        for images, _ in loader():
            teacher(images)
            yield hooks.features


def train_heads(transfer, features):
    """Train the attention heads from the same start at every call, in each process alone."""
    torch.manual_seed(2)
    for module in transfer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    heads = torch.optim.SGD(transfer.estimators.parameters(), lr=0.1)
    group, transfer.process_group = transfer.process_group, None
    for maps in features:
        heads.zero_grad()
        transfer.estimator_loss(maps).backward()
        heads.step()
    transfer.process_group = group


def heads_of(recipe):
    """Return what trains the heads so in place of the recipe's own function."""
    return lambda transfer, teacher, *_: train_heads(transfer, features_of(teacher, recipe.POINTS))


def train(student, teacher, transfer, points, *, epochs=1, autocast=contextlib.nullcontext):
    """Train the student and its own heads; return the optimizer.

    Gradients of two batches are accumulated and clipped; the rate falls as a cosine.
    """
    teacher.eval().requires_grad_(False)
    student_hooks, teacher_hooks = FeatureHooks(student, points), FeatureHooks(teacher, points)
    trained = [*student.parameters(), *transfer.student_heads.parameters()]
    bound = 3.0 if transfer.student_heads else 1.0  # as the README says
    optimizer = GatedGradClip(torch.optim.SGD(trained, lr=0.1, momentum=0.9), bound=bound)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    for _ in range(epochs):
        for index, (images, labels) in enumerate(loader()):
            with autocast():
                task = F.cross_entropy(student(images), labels)
                teacher(images)
                loss = transfer(student_hooks.features, teacher_hooks.features)
            optimizer.backward(task / ACCUMULATE, loss / ACCUMULATE)
            if index % ACCUMULATE == ACCUMULATE - 1:
                torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return optimizer


def trained(recipe, for_student, for_teacher, transfer, **settings):
    """Return the student of a recipe as this loop trains it."""
    student, teacher = pair(recipe.network, for_student, for_teacher)
    heads_of(recipe)(transfer, teacher)
    train(student, teacher, transfer, recipe.POINTS, **settings)
    return student.state_dict()


@contextlib.contextmanager
def losses_of():
    """Yield a list that receives the two losses of every gated backward pass.

    Parameters alone say little of a transfer loss scaled wrongly: the gate bounds its gradient.
    """
    seen = []
    backward = GatedGradClip.backward

    def record(self, task, transfer):
        seen.append((task.item(), transfer.item()))
        backward(self, task, transfer)

    GatedGradClip.backward = record
    try:
        yield seen
    finally:
        GatedGradClip.backward = backward


def assert_equal(got, wanted, tolerance=1e-6):
    """Compare two state_dicts."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name], value, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_same_training(run, expected):
    """Compare the losses of all steps, and the parameters at the end."""
    with losses_of() as losses:
        got = run()
    with losses_of() as wanted:
        assert_equal(got, expected())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted))


def forget_accelerate():
    """Let accelerate forget the run before; it keeps its state in class attributes."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def in_two_processes(work, folder):
    """Return what ``work(rank, folder)`` gives in each of two processes, which may form a group."""
    mp.spawn(_join, args=(free_port(), work, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _join(rank, port, work, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.save(work(rank, folder), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def free_port():
    """Return a port that two processes may meet at."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
