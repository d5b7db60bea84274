"""MHGD in Lightning Fabric: mixed precision, accumulation, clipping, a schedule and checkpoints.

    python examples/integrations/fabric_loop.py

The data are random and the teacher is untrained: put yours in their place. The same command goes
on from the checkpoint, if there is one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss

POINTS = ["0", "2", "4"]  # sensing points: with equal channels in teacher and student
CHANNELS = [8, 8, 8]
ACCUMULATE = 2


def network(kernel: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for incoming, channels in zip([3, *CHANNELS], CHANNELS, strict=False):
        layers += [nn.Conv2d(incoming, channels, kernel, padding=kernel // 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def train(
    fabric: L.Fabric, student: nn.Module, teacher: nn.Module, loader: Any, folder: Path, epochs: int
) -> None:
    loader = fabric.setup_dataloaders(loader)
    # The networks are not set up: Fabric's shell of a module insists on `fabric.backward`, which
    # takes one loss. Autocast is called below, and the process group replaces DDP.
    student.to(fabric.device)
    teacher.to(fabric.device).eval().requires_grad_(False)
    student_hooks, teacher_hooks = FeatureHooks(student, POINTS), FeatureHooks(teacher, POINTS)
    group = dist.group.WORLD  # None in a single process
    transfer = GraphTransferLoss(CHANNELS, process_group=group).to(fabric.device)

    inner = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    optimizer: Any = fabric.setup_optimizers(GatedGradClip(inner, process_group=group))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    scaler = getattr(fabric.strategy.precision, "scaler", None)  # of 16-mixed

    state: dict[str, Any] = {"student": student, "transfer": transfer, "optimizer": optimizer}
    state |= {"schedule": schedule, "epoch": 0}
    if (folder / "last.ckpt").exists():
        fabric.load(folder / "last.ckpt", state)
    else:
        train_heads(transfer, teacher, teacher_hooks, loader)

    for epoch in range(state["epoch"], epochs):
        for index, (images, labels) in enumerate(loader):
            with fabric.autocast():
                task = F.cross_entropy(student(images), labels)
                teacher(images)
                loss = transfer(student_hooks.features, teacher_hooks.features)
            losses = [task / ACCUMULATE, loss / ACCUMULATE]
            optimizer.backward(*(losses if scaler is None else map(scaler.scale, losses)))
            if (index + 1) % ACCUMULATE == 0:
                fabric.clip_gradients(student, optimizer, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        fabric.print(f"epoch {epoch}: task {task.item():.3f}, transfer {loss.item():.3f}")
        state["epoch"] = epoch + 1
        fabric.save(folder / "last.ckpt", state)


def train_heads(transfer: GraphTransferLoss, teacher: nn.Module, hooks: Any, loader: Any) -> None:
    """Train the attention heads on the frozen teacher; with real data, until convergence."""
    optimizer = torch.optim.SGD(transfer.parameters(), lr=0.1, momentum=0.9)
    for images, _ in loader:
        teacher(images)
        optimizer.zero_grad()
        transfer.estimator_loss(hooks.features).backward()
        optimizer.step()


def main() -> None:
    fabric = L.Fabric(precision="bf16-mixed")
    fabric.launch()
    fabric.seed_everything(0)  # every process makes the same student
    data = TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(4, (64,)))
    loader = DataLoader(data, batch_size=8, shuffle=True, drop_last=True)
    train(fabric, network(kernel=3), network(kernel=5), loader, Path("runs/fabric"), epochs=2)


if __name__ == "__main__":
    main()
