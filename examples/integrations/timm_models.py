"""MHGD between timm models: ConvNeXt → ResNet, Swin → Swin, ViT → ViT.

    python examples/integrations/timm_models.py

Any two models go together: the student has attention heads of its own, so channels may differ. The
models are tiny, random and untrained: use `timm.create_model(name, pretrained=True)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss

Read = Callable[[Tensor], tuple[Tensor, list[Tensor]]]  # images to logits and features
TINY: dict[str, Any] = {"num_classes": 4, "img_size": 32}


def intermediates(model: Any, indices: list[int]) -> Read:
    """Read features that timm itself returns, as ``b c h w``; no hooks are needed."""

    def read(images: Tensor) -> tuple[Tensor, list[Tensor]]:
        last, features = model.forward_intermediates(images, indices=indices)
        return model.forward_head(last), features

    return read


def hooked(model: nn.Module, layers: list[str]) -> Read:
    """Read the outputs of layers, in the layout that they have."""
    hooks = FeatureHooks(model, layers)

    def read(images: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits = model(images)
        return logits, hooks.features

    return read


def train(
    student: nn.Module,
    of_student: Read,
    of_teacher: Read,
    transfer: GraphTransferLoss,
    batches: Any,
) -> None:
    heads = torch.optim.SGD(transfer.estimators.parameters(), lr=0.1, momentum=0.9)
    for images, _ in batches:  # on the teacher alone; with real data, until the loss has converged
        with torch.no_grad():
            features = of_teacher(images)[1]
        heads.zero_grad()
        transfer.estimator_loss(features).backward()
        heads.step()

    trained = [*student.parameters(), *transfer.student_heads.parameters()]
    optimizer = GatedGradClip(torch.optim.AdamW(trained, lr=1e-3), bound=3.0)
    for images, labels in batches:
        logits, features = of_student(images)
        with torch.no_grad():
            target = of_teacher(images)[1]
        task, loss = F.cross_entropy(logits, labels), transfer(features, target)
        optimizer.zero_grad()
        optimizer.backward(task, loss)
        optimizer.step()
    print(f"task {task.item():.3f}, transfer {loss.item():.3f}")


def convnext_to_resnet(batches: Any) -> None:
    """Maps ``b c h w`` after the last three stages of each, by `forward_intermediates`."""
    teacher = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 12, 16, 24)).eval()
    student = timm.create_model("resnet10t", channels=(8, 8, 8, 8), num_classes=4)
    transfer = GraphTransferLoss([12, 16, 24], student_channels=[8, 8, 8], squash="scaled")
    of_student, of_teacher = intermediates(student, [2, 3, 4]), intermediates(teacher, [1, 2, 3])
    train(student, of_student, of_teacher, transfer, batches)


def swin_to_swin(batches: Any) -> None:
    """Maps ``b h w c`` of hooked stages: the channel axis has to be named."""
    shape = {"patch_size": 2, "window_size": 4, "depths": (2, 2, 2), "num_heads": (2, 2, 2), **TINY}
    name, layers = "swin_tiny_patch4_window7_224", ["layers.0", "layers.1", "layers.2"]
    teacher = timm.create_model(name, embed_dim=12, **shape).eval()
    student = timm.create_model(name, embed_dim=8, **shape)
    transfer = GraphTransferLoss(
        [12, 24, 48], student_channels=[8, 16, 32], channel_dim=-1, squash="scaled"
    )
    train(student, hooked(student, layers), hooked(teacher, layers), transfer, batches)


def vit_to_vit(batches: Any) -> None:
    """Tokens ``b n c`` of hooked blocks: the class token counts as one more position."""
    shape, name = {"patch_size": 8, "num_heads": 2, **TINY}, "vit_tiny_patch16_224"
    teacher = timm.create_model(name, embed_dim=12, depth=6, **shape).eval()
    student = timm.create_model(name, embed_dim=8, depth=3, **shape)
    of_teacher = hooked(teacher, ["blocks.1", "blocks.3", "blocks.5"])
    of_student = hooked(student, ["blocks.0", "blocks.1", "blocks.2"])
    transfer = GraphTransferLoss([12, 12, 12], student_channels=[8, 8, 8], squash="scaled")
    train(student, of_student, of_teacher, transfer, batches)


def main() -> None:
    batches = [(torch.randn(8, 3, 32, 32), torch.randint(4, (8,))) for _ in range(4)]
    for pair in (convnext_to_resnet, swin_to_swin, vit_to_vit):
        pair(batches)


if __name__ == "__main__":
    main()
