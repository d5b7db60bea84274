r"""Tiny ImageNet, WRN-22-4 teacher to WRN-10-4 student, end to end.

    python examples/tinyimagenet_wrn.py --out runs/tiny_wrn
    python examples/tinyimagenet_wrn.py --out runs/small --width 0.25 --classes 10 --epochs 20 \
        --first-epochs 8 --learning-rate 0.05

Everything is as in `cifar100_vgg.py` but the images, 64×64 pixels, and the networks, whose first
convolution has stride 2. Accuracy is measured on the labelled validation images.
"""

from __future__ import annotations

from parts.distributed import all_processes
from parts.script import main
from parts.settings import Experiment, Settings, Squash
from parts.three_stages import ThreeStages, WideBlock
from parts.tinyimagenet import load_tinyimagenet
from torch.nn import Parameter
from torch.optim import SGD

from graph_kd import GatedGradClip, GraphTransferLoss


def teacher(classes: int, width: float) -> ThreeStages:
    """WRN-22-4. Its sensing points are the outputs of the three stages, as the student's."""
    return ThreeStages(WideBlock, (3, 3, 3), classes, width, image_size=64, pre_activation=True)


def student(classes: int, width: float) -> ThreeStages:
    """WRN-10-4."""
    return ThreeStages(WideBlock, (1, 1, 1), classes, width, image_size=64, pre_activation=True)


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
    "WRN-22-4",
    "WRN-10-4",
    load_tinyimagenet,
    teacher,
    student,
    transfer_loss,
    optimizer,
    gated_optimizer,
)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
