"""MHGD in Hugging Face accelerate: accumulation, clipping, a schedule and checkpoints.

    accelerate launch examples/integrations/accelerate_loop.py

The data are random and the teacher is untrained: put yours in their place. The student is narrower
than its teacher and has attention heads of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss

POINTS = ["0", "2", "4"]  # sensing points
TEACHER, STUDENT = [12, 12, 12], [8, 8, 8]  # their channels


def network(channels: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for incoming, outgoing in zip([3, *channels], channels, strict=False):
        layers += [nn.Conv2d(incoming, outgoing, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 4))


def train(
    accelerator: Accelerator,
    student: nn.Module,
    teacher: nn.Module,
    loader: Any,
    folder: Path,
    epochs: int,
) -> None:
    teacher.to(accelerator.device).eval().requires_grad_(False)
    student_hooks, teacher_hooks = FeatureHooks(student, POINTS), FeatureHooks(teacher, POINTS)
    group = dist.group.WORLD  # None in a single process
    transfer = GraphTransferLoss(
        TEACHER, student_channels=STUDENT, squash="scaled", process_group=group
    ).to(accelerator.device)

    own_heads = transfer.student_heads.parameters()  # trained together with the student
    inner = torch.optim.SGD([*student.parameters(), *own_heads], lr=0.1, momentum=0.9)
    # `backward` is called on this handle.
    gated = GatedGradClip(inner, bound=3.0, process_group=group)
    schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(gated, T_max=100)
    # Wrap before `prepare`: `save_state` then saves the wrapper, not the inner optimizer alone.
    student, optimizer, loader, schedule = accelerator.prepare(student, gated, loader, schedule)
    accelerator.register_for_checkpointing(transfer)  # or a resume has other heads, silently
    scaler = accelerator.scaler  # of mixed_precision="fp16"

    first = len(list(folder.glob("epoch_*")))
    if first:
        accelerator.load_state(str(folder / f"epoch_{first - 1}"))
    else:
        train_heads(transfer, teacher, teacher_hooks, loader)

    for epoch in range(first, epochs):
        for images, labels in loader:
            # DDP must not average gradients on its own: GatedGradClip does, both of them.
            with accelerator.accumulate(student), accelerator.no_sync(student):
                with accelerator.autocast():
                    task = F.cross_entropy(student(images), labels)
                    teacher(images)
                loss = transfer(student_hooks.features, teacher_hooks.features)
                losses = [x / accelerator.gradient_accumulation_steps for x in (task, loss)]
                gated.backward(*(losses if scaler is None else map(scaler.scale, losses)))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: task {task.item():.3f}, transfer {loss.item():.3f}")
        accelerator.save_state(str(folder / f"epoch_{epoch}"))


def train_heads(transfer: GraphTransferLoss, teacher: nn.Module, hooks: Any, loader: Any) -> None:
    """Train the attention heads on the frozen teacher; with real data, until convergence."""
    optimizer = torch.optim.SGD(transfer.estimators.parameters(), lr=0.1, momentum=0.9)
    for images, _ in loader:
        teacher(images)
        optimizer.zero_grad()
        transfer.estimator_loss(hooks.features).backward()
        optimizer.step()


def main() -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(0)  # every process makes the same networks
    data = TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(4, (64,)))
    loader = DataLoader(data, batch_size=8, shuffle=True, drop_last=True)
    folder = Path("runs/accelerate")
    train(accelerator, network(STUDENT), network(TEACHER), loader, folder, epochs=2)


if __name__ == "__main__":
    main()
