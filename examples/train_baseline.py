"""The training loop of the ten methods that the poster compares with; MHGD's is in the scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import exp
from types import ModuleType
from typing import Any

import common
import torch
import torch.nn.functional as F
from baselines import RECIPES, Outputs
from common import Data, Run, finite
from networks import Network
from torch import Tensor
from torch.optim import SGD

from graph_kd import FeatureHooks, GatedGradClip

Losses = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class Distillation:
    """Train a student by a method of `RECIPES`, with the optimizer and the points of a script.

    Args:
        method: Its name.
        student: A new network.
        teacher: A trained network, or a new one where both learn.
        data: What the student learns from.
        settings: Of the run.
        script: Where the sensing points and the optimizer are shown.
    """

    def __init__(
        self,
        method: str,
        student: Network,
        teacher: Network,
        data: Data,
        settings: Any,
        script: ModuleType,
    ) -> None:
        if common.num_processes() > 1:
            raise ValueError(f"`--methods` must be student or MHGD under torchrun; got {method}.")
        self.recipe = RECIPES[method]
        self.student, self.teacher, self.data, self.script = student, teacher, data, script
        self.settings = replace(settings, gate="norm")  # of gated ones: no other form
        if method == "soft-logits":
            share = settings.soft_share
            self.recipe = replace(self.recipe, weight=share, task_weight=1 - share)
        self.module: Any = self.recipe.build(student.channels, teacher.channels).to(settings.device)
        self.mutual = self.recipe.schedule == "mutual"
        teacher.train(self.mutual).requires_grad_(self.mutual)
        self.hooks = {
            network: FeatureHooks(network, [*script.SENSING_POINTS, network.embedding])
            for network in (student, teacher)
        }
        uses = ["epochs", "student_share", "student_width"]
        uses += [] if self.mutual else ["teacher_epochs"]
        uses += ["bound"] if self.recipe.gated else []
        uses += ["soft_share"] if method == "soft-logits" else []
        uses += ["first_epochs"] if self.recipe.schedule in ("initialise", "prepare") else []
        names = {"teacher": teacher.name, "student": student.name}
        self.run = Run(settings, data, method, uses, **names)

    def train(self) -> dict[str, Any]:
        """Train the student and return its record."""
        first, epochs = self.settings.first_epochs, self.settings.epochs
        learning = [*self.student.parameters(), *self.module.parameters()]
        if self.recipe.schedule == "initialise":
            rate = self.recipe.first_rate * self.settings.learning_rate
            self.descend("initialise", first, self.loss_alone, self.optimizer(learning, rate))
            learning, losses = list(self.student.parameters()), self.task_alone
        else:
            if self.recipe.schedule == "prepare":
                self.prepare(first)
            learning += self.teacher.parameters() if self.mutual else []
            learning, losses = [p for p in learning if p.requires_grad], self.both
        rate = self.settings.learning_rate
        self.descend("student", epochs, losses, self.optimizer(learning, rate))
        for hooks in self.hooks.values():
            hooks.remove()
        return self.run.finish(self.student)

    def optimizer(self, params: Iterable[Tensor], rate: float) -> GatedGradClip:
        """Return the script's optimizer with another rate."""
        settings = replace(self.settings, learning_rate=rate)
        optimizer: GatedGradClip = self.script.gated_sgd(params, settings)
        return optimizer

    def prepare(self, epochs: int) -> None:
        """Train the paraphraser on the teacher alone."""
        named = list(self.module.paraphraser.named_parameters())
        # The program's decay is 5e-4 |w|² of the kernels, without the usual half.
        kernels = {"params": [p for n, p in named if "bias" not in n], "weight_decay": 1e-3}
        biases = {"params": [p for n, p in named if "bias" in n], "weight_decay": 0.0}
        rate = self.settings.learning_rate
        sgd = SGD([kernels, biases], rate, momentum=0.9, nesterov=True)
        self.descend("paraphraser", epochs, self.paraphraser_alone, GatedGradClip(sgd))
        self.module.paraphraser.requires_grad_(False)

    def descend(self, phase: str, epochs: int, losses: Losses, optimizer: GatedGradClip) -> None:
        """Run a phase: steps on one loss, or on two of which the second is gated."""
        parts: dict[str, Any] = {
            "model": self.student,
            "module": self.module,
            "optimizer": optimizer,
        }
        parts |= {"teacher": self.teacher} if self.mutual else {}
        measured = phase == "student"
        if measured:
            parts["schedule"] = common.step_decay(optimizer, epochs)
        for epoch in self.run.epochs(phase, epochs, **parts):
            self.student.train()
            optimizer.bound = self.settings.bound / (1 + exp(-epoch))
            rows = []
            for images, labels in self.data.batches(self.run.order):
                of_step = losses(images, labels)
                optimizer.zero_grad()
                optimizer.backward(*of_step)
                optimizer.step()
                rows.append([loss.detach() for loss in of_step])
            values = {}
            if measured:
                values["learning_rate"] = parts["schedule"].get_last_lr()[0]
                parts["schedule"].step()
                values["test_accuracy"] = common.accuracy(self.student, self.data, self.settings)
            self.run.log(phase, rows, **values)

    def show(self, network: Network, images: Tensor) -> Outputs:
        """Run a network and return what it shows of a batch."""
        learns = self.mutual or network is self.student
        with self.settings.autocast(), torch.set_grad_enabled(learns):
            logits = network(images).float()
        *maps, embedding = self.hooks[network].features
        return Outputs(maps, embedding, logits)

    def loss_alone(self, images: Tensor, _labels: Tensor) -> tuple[Tensor, ...]:
        """Return the method's loss, for its first epochs."""
        shown = [self.show(network, images) for network in (self.student, self.teacher)]
        return (self.recipe.loss(self.module, *shown),)

    def task_alone(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Return the task's loss."""
        return (F.cross_entropy(self.show(self.student, images).logits, labels),)

    def paraphraser_alone(self, images: Tensor, _labels: Tensor) -> tuple[Tensor, ...]:
        """Return the loss of factor transfer's first epochs."""
        return (self.module.paraphraser_loss(self.show(self.teacher, images).last_map.float()),)

    def both(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Return the sum of task and method, or the two if the second is gated."""
        of_student = self.show(self.student, images)
        of_teacher = self.show(self.teacher, images)
        task = finite(F.cross_entropy(of_student.logits, labels))
        if self.mutual:
            task = task + F.cross_entropy(of_teacher.logits, labels)
        loss = self.recipe.loss(self.module, of_student, of_teacher)
        return (task, loss) if self.recipe.gated else (self.recipe.task_weight * task + loss,)
