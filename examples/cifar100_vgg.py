r"""CIFAR-100, VGG16 teacher to VGG7 student, end to end.

    python examples/cifar100_vgg.py --out runs/vgg
    python examples/cifar100_vgg.py --out runs/small --width 0.25 --classes 20 --epochs 20 \
        --first-epochs 8 --learning-rate 0.02
    torchrun --nproc-per-node=2 examples/cifar100_vgg.py --out runs/vgg

The defaults are the schedule, optimizer and augmentation of the authors' program (Lee & Song, BMVC
2019), which they published for a ResNet: batches of 128, reflect-pad 4, random crop and flip, SGD
with Nesterov momentum 0.9 at 0.1, times 0.1 at 30, 60 and 80 % of 100 epochs, weight decay 5e-4; 40
epochs of the estimators alone before the student learns. The second command runs on two CPU cores.
The third shares every batch among two processes, on the CPU or a GPU each, and gives the record of
one. Without ``--data-dir`` CIFAR-100 is downloaded once. ``--method`` takes any of the methods that
the paper compares, and MHGD in each of its forms.

The same command again goes on where it was interrupted. What a run leaves in ``--out`` is said in
`parts/workshop.py` and `parts/runs.py`; the result is the accuracy after the last epoch.
"""

from __future__ import annotations

from parts.data import load_cifar100
from parts.distributed import all_processes
from parts.models import VGG
from parts.script import main
from parts.settings import Experiment, Settings, Squash
from torch.nn import Parameter
from torch.optim import SGD

from graph_kd import GatedGradClip, GraphTransferLoss


def teacher(classes: int, width: float) -> VGG:
    """VGG16. Its sensing points are the outputs of the five stages, as the student's."""
    return VGG((2, 2, 3, 3, 3), classes, width, image_size=32, hidden_layers=2)


def student(classes: int, width: float) -> VGG:
    """VGG7."""
    return VGG((1, 1, 1, 1, 1), classes, width, image_size=32, hidden_layers=1)


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
    "CIFAR-100",
    "VGG16",
    "VGG7",
    load_cifar100,
    teacher,
    student,
    transfer_loss,
    optimizer,
    gated_optimizer,
)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
