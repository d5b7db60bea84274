"""The training of the recipes in examples/integrations/, written out in pure PyTorch."""

import contextlib
import socket

import torch
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


def train_heads(transfer, teacher, points):
    """Train the attention heads, from the same start and in the same way at every call."""
    torch.manual_seed(2)
    for module in transfer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    heads = torch.optim.SGD(transfer.estimators.parameters(), lr=0.1)
    with FeatureHooks(teacher, points) as teacher_hooks:
        for images, _ in loader():
            teacher(images)
            heads.zero_grad()
            transfer.estimator_loss(teacher_hooks.features).backward()
            heads.step()


def train(student, teacher, transfer, points, *, epochs=1, autocast=contextlib.nullcontext):
    """Train the student and its own heads; return the optimizer.

    Gradients of two batches are accumulated and clipped; the rate falls as a cosine.
    """
    teacher.eval().requires_grad_(False)
    student_hooks, teacher_hooks = FeatureHooks(student, points), FeatureHooks(teacher, points)
    trained = [*student.parameters(), *transfer.student_heads.parameters()]
    optimizer = GatedGradClip(torch.optim.SGD(trained, lr=0.1, momentum=0.9))
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


def free_port():
    """Return a port that two processes may meet at."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
