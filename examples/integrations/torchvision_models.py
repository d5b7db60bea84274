"""MHGD between torchvision models, by its feature extractors: ResNet-34 → ResNet-18 and MobileNet.

    python examples/integrations/torchvision_models.py

The models are untrained: pass `weights="DEFAULT"` to the teacher. The data are random.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import mobilenet_v3_small, resnet18, resnet34
from torchvision.models.feature_extraction import create_feature_extractor

from graph_kd import GatedGradClip, GraphTransferLoss

# Layers of each network, and the names that pair them.
RESNET = {"layer1": "front", "layer2": "middle", "layer4": "back", "fc": "logits"}
MOBILENET = {
    "features.1": "front",
    "features.4": "middle",
    "features.9": "back",
    "classifier.3": "logits",
}


def train(
    student: nn.Module, student_nodes: Any, teacher: nn.Module, transfer: Any, batches: Any
) -> None:
    of_teacher = create_feature_extractor(teacher.eval().requires_grad_(False), RESNET)
    of_student = create_feature_extractor(student, student_nodes)  # it shares the parameters

    heads = torch.optim.SGD(transfer.estimators.parameters(), lr=0.1, momentum=0.9)
    for images, _ in batches:  # on the teacher alone; with real data, until the loss has converged
        target = of_teacher(images)
        target.pop("logits")  # what is left is paired by its keys
        heads.zero_grad()
        transfer.estimator_loss(target).backward()
        heads.step()

    trained = [*student.parameters(), *transfer.student_heads.parameters()]
    bound = 3.0 if transfer.student_heads else 1.0
    optimizer = GatedGradClip(torch.optim.SGD(trained, lr=0.01, momentum=0.9), bound=bound)
    for images, labels in batches:
        features, target = of_student(images), of_teacher(images)
        logits, _ = features.pop("logits"), target.pop("logits")
        task, loss = F.cross_entropy(logits, labels), transfer(features, target)
        optimizer.zero_grad()
        optimizer.backward(task, loss)
        optimizer.step()
    print(f"task {task.item():.3f}, transfer {loss.item():.3f}")


def main() -> None:
    batches = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(2)]
    teacher = resnet34(num_classes=10)
    # Equal channels: the student is compared by the teacher's own attention heads.
    transfer = GraphTransferLoss([64, 128, 512])
    train(resnet18(num_classes=10), RESNET, teacher, transfer, batches)
    # Other channels: the student has attention heads of its own.
    channels = [16, 40, 96]
    transfer = GraphTransferLoss([64, 128, 512], student_channels=channels, squash="scaled")
    train(mobilenet_v3_small(num_classes=10), MOBILENET, teacher, transfer, batches)


if __name__ == "__main__":
    main()
