"""Benchmark of a training step: what MHGD costs beside the network passes it can not do without.

And what it takes to have a batch ready: see `parts/augment.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from parts.augment import Normalize, batches, random_crop_flip
from parts.data import ImageSet
from parts.engine import nesterov
from parts.models import Network
from parts.timing import median_ratio, paired_seconds, peak_memory
from torch import Tensor

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss
from graph_kd._gate import merge_gradients

__all__ = ["measure_step"]


class _Steps:
    """The parts of a step, each a method without arguments."""

    def __init__(
        self, teacher: Network, student: Network, image_set: ImageSet, batch_size: int
    ) -> None:
        self.stream = _endless(image_set, batch_size)
        self.normalize = Normalize(image_set)
        images = self.normalize(image_set.images[:batch_size])
        labels = image_set.labels[:batch_size]
        self.teacher = teacher.eval().requires_grad_(requires_grad=False)
        self.student = student.train()
        self.images, self.labels = images, labels
        self.of_teacher = FeatureHooks(teacher, teacher.sensing_points)
        self.of_student = FeatureHooks(student, student.sensing_points)
        self.transfer = GraphTransferLoss(student.channels).to(images.device)
        self.params = list(student.parameters())
        self.optimizer = GatedGradClip(nesterov(self.params, learning_rate=1e-6))
        self.gradients = [torch.rand_like(p) for p in self.params]
        first = dict(student.named_modules())[student.sensing_points[0]]
        front = {id(p) for p in first.parameters()}
        self.behind_first = [p for p in self.params if id(p) not in front]

    def input_pipeline(self) -> None:
        """The next batch as training takes it: drawn, shifted, mirrored, standardised."""
        self.normalize(next(self.stream)).contiguous(memory_format=torch.channels_last)

    def task(self) -> Tensor:
        return F.cross_entropy(self.student(self.images), self.labels)

    def teacher_forward(self) -> None:
        with torch.no_grad():
            self.teacher(self.images)

    def student_alone(self) -> None:
        torch.autograd.grad(self.task(), self.params)

    def floor(self) -> None:
        self.teacher_forward()
        task = self.task()
        torch.autograd.grad(task, self.params, retain_graph=True)
        torch.autograd.grad(task, self.params)

    def losses(self) -> tuple[Tensor, Tensor]:
        self.teacher_forward()
        task = self.task()
        return task, self.transfer(self.of_student.features, self.of_teacher.features)

    def complete(self) -> None:
        losses = self.losses()
        self.optimizer.zero_grad()
        self.optimizer.backward(*losses)
        self.optimizer.step()

    def merge(self) -> None:
        """The gate alone, on gradients of the losses' sizes."""
        merge_gradients(self.gradients, self.gradients, "norm", scope="parameter", bound=1.0)

    def optimizer_step(self) -> None:
        self.optimizer.step()

    def known_gate(self) -> None:
        """The gate of an earlier step, for scope="global": one backward of the weighted sum."""
        task, graphs = self.losses()
        self.optimizer.zero_grad()
        (task + 0.5 * graphs).backward()  # type: ignore[no-untyped-call] # torch's own has no types
        self.optimizer.optimizer.step()

    def backward_to_first_point(self) -> None:
        """No transfer gradient for the layers up to the first sensing point."""
        task, graphs = self.losses()
        torch.autograd.grad(graphs, self.behind_first, retain_graph=True, allow_unused=True)
        torch.autograd.grad(task, self.params)
        self.optimizer.step()


def _endless(image_set: ImageSet, batch_size: int) -> Iterator[Tensor]:
    order = torch.Generator().manual_seed(0)
    while True:
        for images, _ in batches(image_set, batch_size, order):
            yield random_crop_flip(images, order)


def measure_step(
    teacher: Network, student: Network, image_set: ImageSet, batch_size: int, repeats: int
) -> dict[str, Any]:
    """Return seconds of a step and of its parts, medians of ``repeats``, and their ratios."""
    steps, device = _Steps(teacher, student, image_set, batch_size), image_set.images.device
    seconds = paired_seconds(
        {
            "input pipeline": steps.input_pipeline,
            "student alone": steps.student_alone,
            "teacher forward": steps.teacher_forward,
            "floor": steps.floor,
            "complete": steps.complete,
            "merge": steps.merge,
            "optimizer step": steps.optimizer_step,
            "gate known beforehand": steps.known_gate,
            "transfer backward up to the first point": steps.backward_to_first_point,
        },
        repeats,
        device,
    )
    result = {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "complete / floor": median_ratio(seconds["complete"], seconds["floor"]),
        "merge / complete": median_ratio(seconds["merge"], seconds["complete"]),
        "input pipeline / student alone": median_ratio(
            seconds["input pipeline"], seconds["student alone"]
        ),
        "peak_bytes": {
            "floor": peak_memory(steps.floor, device),
            "complete": peak_memory(steps.complete, device),
        },
    }
    steps.of_teacher.remove()
    steps.of_student.remove()
    return result
