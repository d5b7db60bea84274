"""MHGD in Lightning: manual optimization, and automatic optimization with one method overridden.

    python examples/integrations/lightning_module.py

`Distillation` steps by itself. `AutomaticDistillation` leaves accumulation, clipping and schedules
to the Trainer. The data are random and the teacher is untrained: put yours in their place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss

POINTS = ["0", "2", "4"]  # sensing points: with equal channels in teacher and student
CHANNELS = [8, 8, 8]


def network(kernel: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for incoming, channels in zip([3, *CHANNELS], CHANNELS, strict=False):
        layers += [nn.Conv2d(incoming, channels, kernel, padding=kernel // 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def train_heads(transfer: GraphTransferLoss, teacher: nn.Module, batches: Iterable[Any]) -> None:
    """Train the attention heads on the frozen teacher; with real data, until convergence."""
    optimizer = torch.optim.SGD(transfer.parameters(), lr=0.1, momentum=0.9)
    with FeatureHooks(teacher, POINTS) as teacher_hooks:
        for images, _ in batches:
            teacher(images)
            optimizer.zero_grad()
            transfer.estimator_loss(teacher_hooks.features).backward()
            optimizer.step()


class Distillation(L.LightningModule):
    """Manual optimization: two losses, accumulation, clipping and a schedule."""

    def __init__(
        self, teacher: nn.Module, transfer: GraphTransferLoss, accumulate: int = 2
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.accumulate = accumulate
        self.student = network(kernel=3)
        self.teacher = teacher.eval().requires_grad_(False)
        self.transfer = transfer  # a submodule, so that every checkpoint has the trained heads
        self.student_hooks = FeatureHooks(self.student, POINTS)
        self.teacher_hooks = FeatureHooks(self.teacher, POINTS)

    def configure_optimizers(self) -> Any:
        group = dist.group.WORLD  # None in a single process
        self.transfer.process_group = group
        inner = torch.optim.SGD(self.student.parameters(), lr=0.1, momentum=0.9)
        optimizer = GatedGradClip(inner, process_group=group)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, labels = batch
        task = F.cross_entropy(self.student(images), labels)
        self.teacher(images)
        return task, self.transfer(self.student_hooks.features, self.teacher_hooks.features)

    def training_step(self, batch: Any, index: int) -> Any:
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        task, transfer = (self.scale(loss / self.accumulate) for loss in self.losses(batch))
        # Lightning runs this method under autocast, which would round gradients to half precision.
        with torch.autocast(self.device.type, enabled=False):
            optimizer.backward(task, transfer)
        if (index + 1) % self.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    def scale(self, loss: Tensor) -> Tensor:
        """Apply Lightning's GradScaler in 16-mixed; other precisions return the loss as it is."""
        scaled: Tensor = self.trainer.precision_plugin.pre_backward(loss, self)
        return scaled

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if not self.automatic_optimization:  # here the gradients of 16-mixed are unscaled
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")


class AutomaticDistillation(Distillation):
    """Automatic optimization: the Trainer accumulates, clips, steps and schedules."""

    def __init__(self, teacher: nn.Module, transfer: GraphTransferLoss) -> None:
        super().__init__(teacher, transfer)
        self.automatic_optimization = True

    def training_step(self, batch: Any, index: int) -> Tensor:
        task, self.transfer_loss = self.losses(batch)
        return task

    def backward(self, loss: Tensor) -> None:
        # `loss` is the task loss as Lightning scaled it; the transfer loss is scaled alike.
        optimizer: Any = self.optimizers()
        optimizer.backward(
            loss, self.scale(self.transfer_loss / self.trainer.accumulate_grad_batches)
        )


def main() -> None:
    data = TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(4, (64,)))
    loader = DataLoader(data, batch_size=8, shuffle=True, drop_last=True)
    teacher = network(kernel=5).requires_grad_(False)
    transfer = GraphTransferLoss(CHANNELS)
    train_heads(transfer, teacher, loader)

    common: Any = {"max_epochs": 2, "logger": False}
    trainer = L.Trainer(default_root_dir="runs/manual", **common)
    trainer.fit(Distillation(teacher, transfer), loader)

    common |= {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    trainer = L.Trainer(default_root_dir="runs/automatic", **common)
    trainer.fit(AutomaticDistillation(teacher, transfer), loader)


if __name__ == "__main__":
    main()
