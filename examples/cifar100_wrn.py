r"""CIFAR-100, WRN-22-4 teacher to WRN-10-4 student, from the data to the results.

    python examples/cifar100_wrn.py --out runs/wrn --student-share 0.1
    python examples/cifar100_wrn.py --out runs/all
    python examples/cifar100_wrn.py --out runs/small --width 0.25 --classes 10 --epochs 20 \
        --first-epochs 8 --learning-rate 0.05

Everything is as in `cifar100_vgg.py`, except for the networks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp
from typing import Any, Literal

import common
import torch
import torch.nn.functional as F
from common import Data, Run, finite
from networks import Network, build
from torch import nn
from torch.nn import Parameter
from torch.optim import SGD

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss

TEACHER, STUDENT = "WRN-22-4", "WRN-10-4"
SENSING_POINTS = ("stages.0", "stages.1", "stages.2")  # of both networks
Method = Literal[
    "student", "mhgd", "mhgd-tanh", "mhgd-scaled", "mhgd-own-heads",
    "mhgd-soft-logits", "mhgd-own-heads-soft-logits",
]  # fmt: skip
PAPER = ("mhgd", "mhgd-soft-logits")  # methods with squash=None


@dataclass(frozen=True)
class Settings(common.Settings):
    """Settings of a run; each is a flag."""

    data_name: str | None = "CIFAR-100"  # name of the data in records
    method: tuple[Method, ...] = ("student", "mhgd", "mhgd-own-heads")  # "student": alone
    epochs: int = 100  # epochs of each student
    teacher_epochs: int | None = None  # of the teacher; None: as `epochs`; 0: untrained
    first_epochs: int = 40  # epochs of the teacher's attention heads, before the student
    learning_rate: float = 0.1  # falls in three steps; constant for the teacher's heads
    width: float = 1.0  # factor on every channel count
    student_width: float = 1.0  # further factor for the student; shared heads need 1
    student_share: float = 1.0  # part of the images that heads and students learn from
    num_heads: int = 8  # attention heads
    gate: Literal["norm", "sigmoid"] = "norm"  # how the gate limits the transfer gradient
    bound: float | None = None  # of the gate, see the README; None: by method
    soft_share: float | None = None  # weight of soft logits in the task loss; None: by method


def load(settings: Settings) -> Data:
    """Return the images, on the device."""
    return common.load(settings, common.read_cifar100)


def new_network(name: str, width: float, data: Data, settings: Settings) -> Network:
    """Return a new network; the seed decides its weights."""
    torch.manual_seed(settings.seed)
    return common.place(build(name, data.classes, width, image_size=32), settings)


def gated_sgd(params: Iterable[Parameter], settings: Settings, bound: float = 1.0) -> GatedGradClip:
    """Return SGD with a gate for the gradient of a second loss; with one loss it is plain SGD."""
    sgd = SGD(params, settings.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    group = common.process_group()
    return GatedGradClip(sgd, settings.gate, bound=bound, process_group=group)


def train_alone(
    method: Literal["teacher", "student"], network: Network, data: Data, settings: Settings
) -> dict[str, Any]:
    """Train the teacher, or the student for comparison, on the task alone; return the record."""
    epochs = settings.epochs
    if method == "teacher" and settings.teacher_epochs is not None:
        epochs = settings.teacher_epochs
    optimizer = gated_sgd(network.parameters(), settings)
    schedule = common.step_decay(optimizer, epochs)
    run = Run(settings, data, method, **{method: network.name})  # saves each epoch; can resume
    for _ in run.epochs(method, epochs, model=network, optimizer=optimizer, schedule=schedule):
        network.train()
        losses = []
        for images, labels in data.batches(run.order):
            with settings.autocast():
                logits = network(images).float()
            task = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            optimizer.backward(task)
            optimizer.step()
            losses.append([task.detach()])
        run.log(losses, test_accuracy=common.accuracy(network, data, settings))
        schedule.step()
    return run.finish()


def train_heads(teacher: Network, data: Data, settings: Settings) -> nn.ModuleList:
    """Train the attention heads on the teacher's features: without a student, without `squash`."""
    torch.manual_seed(settings.seed)
    group = common.process_group()
    transfer = GraphTransferLoss(teacher.channels, settings.num_heads, process_group=group)
    heads: nn.ModuleList = transfer.to(settings.device).estimators
    # The authors add 5e-4 |w|² to the heads' loss: in torch that is a weight decay of 1e-3.
    decay, rate = 2 * 5e-4, settings.learning_rate
    optimizer = SGD(heads.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=decay)
    run = Run(settings, data, "heads", teacher=teacher.name)
    teacher.eval().requires_grad_(False)
    with FeatureHooks(teacher, SENSING_POINTS) as teacher_hooks:
        # If the heads are trained already, this loads them and yields no epoch.
        for _ in run.epochs("heads", settings.first_epochs, model=heads, optimizer=optimizer):
            losses = []
            for images, _labels in data.batches(run.order):
                with settings.autocast(), torch.no_grad():
                    teacher(images)
                loss = transfer.estimator_loss(teacher_hooks.features)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append([loss.detach()])
            run.log(losses)
    run.finish()
    return heads


def train_student(
    method: Method,
    student: Network,
    teacher: Network,
    heads: nn.ModuleList,
    data: Data,
    settings: Settings,
) -> dict[str, Any]:
    """Train the student on the task and on the teacher's graphs; return the record.

    ``method`` is a form of MHGD. Its name says if the student has own heads, and if soft logits are
    part of the task loss.
    """
    # Defaults by method: bound 1, own heads 3, own heads with soft logits 10; soft_share 0.3, with
    # own heads 0.8.
    settings, bound, soft_share = common.suited(method, settings)
    torch.manual_seed(settings.seed)
    transfer = GraphTransferLoss(
        teacher.channels,
        settings.num_heads,
        student_channels=student.channels if "own-heads" in method else None,
        squash=None if method in PAPER else "tanh" if method == "mhgd-tanh" else "scaled",
        process_group=common.process_group(),
    ).to(settings.device)
    transfer.estimators = heads  # of the teacher, trained before; they stay as they are
    # With shared heads the student has none of its own: `student_heads` is empty.
    learning = [*student.parameters(), *transfer.student_heads.parameters()]
    optimizer = gated_sgd(learning, settings, bound)
    schedule = common.step_decay(optimizer, settings.epochs)
    parts: dict[str, Any] = {"model": student, "own_heads": transfer.student_heads}
    parts |= {"optimizer": optimizer, "schedule": schedule}
    run = Run(settings, data, method, teacher=teacher.name, student=student.name)
    teacher.eval().requires_grad_(False)
    student_hooks = FeatureHooks(student, SENSING_POINTS)
    teacher_hooks = FeatureHooks(teacher, SENSING_POINTS)
    for epoch in run.epochs("student", settings.epochs, **parts):
        student.train()
        optimizer.bound = bound / (1 + exp(-epoch))  # 0.5, 0.73, 0.88, … of it
        losses = []
        for images, labels in data.batches(run.order):
            with settings.autocast():
                logits = student(images).float()
                with torch.no_grad():
                    teacher_logits = teacher(images).float()
            task = finite(F.cross_entropy(logits, labels))  # an error if it has diverged
            if "soft-logits" in method:
                soft = common.soft_logits(logits, teacher_logits)
                task = (1 - soft_share) * task + soft_share * soft
            transfer_loss = transfer(student_hooks.features, teacher_hooks.features)
            optimizer.zero_grad()
            optimizer.backward(task, transfer_loss)  # two gradients; the gate limits the second
            optimizer.step()
            losses.append([task.detach(), transfer_loss.detach()])
        run.log(losses, test_accuracy=common.accuracy(student, data, settings))
        schedule.step()
    student_hooks.remove()
    teacher_hooks.remove()
    return run.finish()


def main(settings: Settings) -> None:
    """Train the teacher and every student, print their accuracies and draw them over epochs."""
    data = load(settings)
    teacher = new_network(TEACHER, settings.width, data, settings)
    records = [train_alone("teacher", teacher, data, settings)]
    student_data = data.share(settings.student_share)
    for method in dict.fromkeys(settings.method):
        student = new_network(STUDENT, settings.width * settings.student_width, data, settings)
        if method == "student":
            records.append(train_alone("student", student, student_data, settings))
        else:
            heads = train_heads(teacher, student_data, settings)  # trained once, then loaded
            records.append(train_student(method, student, teacher, heads, student_data, settings))
    common.report(settings.out, records)


if __name__ == "__main__":
    common.command(main, Settings, __doc__)
