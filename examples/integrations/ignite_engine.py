"""MHGD in PyTorch-Ignite: an Engine with accumulation, a schedule, an average and checkpoints.

    python examples/integrations/ignite_engine.py

The data are random and the teacher is untrained: put yours in their place. The same command goes
on from the checkpoint, if there is one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver, EMAHandler
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


def train(student: nn.Module, teacher: nn.Module, loader: Any, folder: Path, epochs: int) -> Engine:
    teacher.eval().requires_grad_(False)
    student_hooks, teacher_hooks = FeatureHooks(student, POINTS), FeatureHooks(teacher, POINTS)
    transfer = GraphTransferLoss(CHANNELS)
    inner = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    optimizer = GatedGradClip(inner)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)

    def step(engine: Engine, batch: Any) -> dict[str, float]:
        images, labels = batch
        task = F.cross_entropy(student(images), labels)
        teacher(images)
        loss = transfer(student_hooks.features, teacher_hooks.features)
        optimizer.backward(task / ACCUMULATE, loss / ACCUMULATE)
        if engine.state.iteration % ACCUMULATE == 0:
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return {"task": task.item(), "transfer": loss.item()}

    trainer = Engine(step)
    average = EMAHandler(student, momentum=0.1)  # its copy of the student has no active hooks
    average.attach(trainer, event=Events.ITERATION_COMPLETED(every=ACCUMULATE))
    state: dict[str, Any] = {"student": student, "average": average.ema_model, "heads": transfer}
    state |= {"optimizer": optimizer, "schedule": schedule, "trainer": trainer}
    saver = DiskSaver(folder, create_dir=True, require_empty=False)
    checkpoint = Checkpoint(state, saver, filename_pattern="last.pt")
    trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)

    if (folder / "last.pt").exists():
        Checkpoint.load_objects(state, folder / "last.pt")
    else:
        train_heads(transfer, teacher, teacher_hooks, loader)
    trainer.run(loader, max_epochs=epochs)
    return trainer


def train_heads(transfer: GraphTransferLoss, teacher: nn.Module, hooks: Any, loader: Any) -> None:
    """Train the attention heads on the frozen teacher; with real data, until convergence."""
    optimizer = torch.optim.SGD(transfer.parameters(), lr=0.1, momentum=0.9)
    for images, _ in loader:
        teacher(images)
        optimizer.zero_grad()
        transfer.estimator_loss(hooks.features).backward()
        optimizer.step()


def main() -> None:
    data = TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(4, (64,)))
    loader = DataLoader(data, batch_size=8, shuffle=True, drop_last=True)
    trainer = train(network(kernel=3), network(kernel=5), loader, Path("runs/ignite"), epochs=2)
    print(trainer.state.output)


if __name__ == "__main__":
    main()
