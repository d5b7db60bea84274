"""The training loop of the ten methods that the poster compares with; MHGD's is in the scripts."""

from __future__ import annotations

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


class Distillation:
    """Train a student by a method of `RECIPES`, with a script's optimizer and sensing points.

    The student is new; the teacher is trained, or new where both learn.
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
        if common.NUM_PROCESSES > 1:
            raise ValueError(f"`--methods` must be student or MHGD under torchrun; got {method}.")
        self.recipe = RECIPES[method]
        self.student, self.teacher, self.data, self.script = student, teacher, data, script
        settings, self.bound, share = common.suited(method, replace(settings, gate="norm"))
        self.settings = settings
        if method == "soft-logits":
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
        self.run = Run(settings, data, method, uses, teacher=teacher.name, student=student.name)

    def train(self) -> dict[str, Any]:
        """Train the student and return its record."""
        rate, first = self.settings.learning_rate, self.settings.first_epochs
        learning = [*self.student.parameters(), *self.module.parameters()]
        if self.recipe.schedule == "initialise":
            slow = replace(self.settings, learning_rate=self.recipe.first_rate * rate)
            self.descend("initialise", first, self.script.gated_sgd(learning, slow, self.bound))
            learning = list(self.student.parameters())
        elif self.recipe.schedule == "prepare":
            named = list(self.module.paraphraser.named_parameters())
            # The program's decay is 5e-4 |w|² of the kernels, without the usual half.
            kernels = {"params": [p for n, p in named if "bias" not in n], "weight_decay": 1e-3}
            biases = {"params": [p for n, p in named if "bias" in n], "weight_decay": 0.0}
            sgd = SGD([kernels, biases], rate, momentum=0.9, nesterov=True)
            self.descend("paraphraser", first, GatedGradClip(sgd))
            self.module.paraphraser.requires_grad_(False)
            learning = [p for p in learning if p.requires_grad]
        elif self.mutual:
            learning += self.teacher.parameters()
        optimizer = self.script.gated_sgd(learning, self.settings, self.bound)
        self.descend("student", self.settings.epochs, optimizer)
        for hooks in self.hooks.values():
            hooks.remove()
        return self.run.finish()

    def descend(self, phase: str, epochs: int, optimizer: GatedGradClip) -> None:
        """Run a phase; only the student's lowers its learning rate and measures the accuracy."""
        parts = {"model": self.student, "module": self.module, "optimizer": optimizer}
        parts |= {"teacher": self.teacher} if self.mutual else {}
        if phase == "student":
            parts["schedule"] = common.step_decay(optimizer, epochs)
        for epoch in self.run.epochs(phase, epochs, **parts):
            self.student.train()
            optimizer.bound = self.bound / (1 + exp(-epoch))
            rows = []
            for images, labels in self.data.batches(self.run.order):
                losses = self.losses(phase, images, labels)
                optimizer.zero_grad()
                optimizer.backward(*losses)
                optimizer.step()
                rows.append([loss.detach() for loss in losses])
            if phase == "student":
                measured = common.accuracy(self.student, self.data, self.settings)
                self.run.log(rows, test_accuracy=measured)
                parts["schedule"].step()
            else:
                self.run.log(rows)

    def losses(self, phase: str, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Return the loss of a step, or the two of a gated method."""
        if phase == "paraphraser":
            return (self.module.paraphraser_loss(self.show(self.teacher, images).last_map.float()),)
        of_student = self.show(self.student, images)
        task = finite(F.cross_entropy(of_student.logits, labels))
        if phase == "student" and self.recipe.schedule == "initialise":
            return (task,)
        of_teacher = self.show(self.teacher, images)
        loss = self.recipe.loss(self.module, of_student, of_teacher)
        if phase == "initialise":
            return (loss,)
        if self.mutual:
            task = task + F.cross_entropy(of_teacher.logits, labels)
        return (task, loss) if self.recipe.gated else (self.recipe.task_weight * task + loss,)

    def show(self, network: Network, images: Tensor) -> Outputs:
        """Run a network and return its maps, embedding and logits."""
        learns = self.mutual or network is self.student
        with self.settings.autocast(), torch.set_grad_enabled(learns):
            logits = network(images).float()
        *maps, embedding = self.hooks[network].features
        return Outputs(maps, embedding, logits)
