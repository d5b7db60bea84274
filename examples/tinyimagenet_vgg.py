r"""Tiny ImageNet, VGG16 teacher to VGG7 student, end to end.

    python examples/tinyimagenet_vgg.py --out runs/tiny_vgg
    python examples/tinyimagenet_vgg.py --out runs/small --width 0.25 --classes 10 --epochs 20 \
        --first-epochs 8 --learning-rate 0.02

Everything is as in `cifar100_vgg.py` but the images, 64×64 pixels, for which the networks have one
pooling more. Accuracy is measured on the labelled validation images.
"""

from __future__ import annotations

from parts.distributed import all_processes
from parts.models import VGG
from parts.script import main
from parts.settings import Experiment, Settings, Squash
from parts.tinyimagenet import load_tinyimagenet
from torch.nn import Parameter
from torch.optim import SGD

from graph_kd import GatedGradClip, GraphTransferLoss


def teacher(classes: int, width: float) -> VGG:
    """VGG16. Its sensing points are the outputs of the five stages, as the student's."""
    return VGG((2, 2, 3, 3, 3), classes, width, image_size=64, hidden_layers=2)


def student(classes: int, width: float) -> VGG:
    """VGG7."""
    return VGG((1, 1, 1, 1, 1), classes, width, image_size=64, hidden_layers=1)


def transfer_loss(
    channels: tuple[int, ...],
    student_channels: tuple[int, ...] | None,
    squash: Squash,
    settings: Settings,
) -> GraphTransferLoss:
    """Graphs of the whole batch, one a head, between each two neighbouring sensing points."""
    return GraphTransferLoss(
        channels,
        settings.num_heads,
        student_channels=student_channels,
        squash=squash,
        process_group=all_processes(),
    )


def optimizer(params: list[Parameter], settings: Settings) -> SGD:
    """The authors', for teacher and student."""
    return SGD(params, settings.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)


def gated_optimizer(params: list[Parameter], settings: Settings) -> GatedGradClip:
    """The same, in the wrapper that merges the two gradients."""
    return GatedGradClip(
        optimizer(params, settings),
        settings.gate,
        bound=settings.bound,
        process_group=all_processes(),
    )


EXPERIMENT = Experiment(
    "Tiny ImageNet",
    "VGG16",
    "VGG7",
    load_tinyimagenet,
    teacher,
    student,
    transfer_loss,
    optimizer,
    gated_optimizer,
)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
