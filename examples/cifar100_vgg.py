r"""CIFAR-100, VGG16 teacher to VGG7 student, end to end: teacher, student alone, MHGD.

    python examples/cifar100_vgg.py --out runs/vgg
    python examples/cifar100_vgg.py --out runs/small --width 0.25 --limit-per-class 100 \
        --learning-rate 0.02 --epochs 40
    torchrun --nproc-per-node=2 examples/cifar100_vgg.py --out runs/vgg

The defaults are the schedule, optimizer and augmentation of the authors' program (Lee & Song, BMVC
2019), which they published for a ResNet: batches of 128, reflect-pad 4, random crop and flip, SGD
with Nesterov momentum 0.9 at 0.1, times 0.1 at 30, 60 and 80 % of 100 epochs, weight decay 5e-4; 40
epochs of the estimators alone before the student learns. The logits are the poster's (the program
takes ``--squash tanh``). The second command runs on two CPU cores. The third shares every batch
among two processes, on the CPU or a GPU each, and gives the record of one. Without ``--data-dir``
CIFAR-100 is downloaded once.

What a run leaves in ``--out``: ``epochs.jsonl`` (a line an epoch), ``record.json`` (settings,
versions, commit, all accuracies, seconds), ``curves.png`` and the networks' checkpoints. The result
is the accuracy after the last epoch; the best one is reported beside it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from parts.augment import batches
from parts.batch_norm import synchronise_batch_norm
from parts.config import check_above_zero, check_at_least, flag, parse, plain
from parts.data import load_cifar100
from parts.distributed import (
    all_processes,
    average_gradients,
    check_divisible,
    end_all,
    first_on_each_machine,
    processes,
)
from parts.engine import Engine, nesterov, step_decay
from parts.files import load_model, save_model
from parts.models import VGG
from parts.plots import plot_curves
from parts.records import Record
from torch import Tensor

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss

TEACHER = (2, 2, 3, 3, 3)  # convolutions of each stage: VGG16
STUDENT = (1, 1, 1, 1, 1)  # VGG7
SENSING_POINTS = ["stages.0", "stages.1", "stages.2", "stages.3", "stages.4"]
AMP = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
Method = Literal["student", "mhgd"]


@dataclass(frozen=True)
class Config:
    """Settings of a run; each is a flag."""

    out: Path = flag(Path("runs/cifar100_vgg"), "folder of the run; must not hold one")
    data_dir: Path | None = flag(None, "folder or archive of CIFAR-100, python or binary layout")
    method: tuple[Method, ...] = flag(("student", "mhgd"), "students to train")
    seed: int = flag(0, "seed of weights, order and augmentation")
    epochs: int = flag(100, "epochs of the teacher and of each student")
    estimator_epochs: int = flag(40, "epochs of the estimators alone")
    batch_size: int = flag(128, "images a step, of all processes")
    learning_rate: float = flag(0.1, "first learning rate")
    width: float = flag(1.0, "factor on every channel count")
    limit_per_class: int | None = flag(None, "train on the first N images of each class")
    teacher_checkpoint: Path | None = flag(None, "a teacher of an earlier run instead of training")
    num_heads: int = flag(8, "attention heads")
    squash: Literal["none", "tanh", "scaled"] = flag("none", "what is done to the graphs' logits")
    gate: Literal["norm", "sigmoid"] = flag("norm", "how the transfer gradient is gated")
    bound: float = flag(1.0, "largest transfer norm, in task norms, late in training")
    amp: Literal["none", "bfloat16", "float16"] = flag("none", "precision of the networks")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to run")

    def __post_init__(self) -> None:
        check_at_least(self, epochs=1, estimator_epochs=0, batch_size=2, num_heads=1)
        check_at_least(self, limit_per_class=1)
        check_above_zero(self, "bound", "learning_rate", "width")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"`--device` must be one of this machine; got {self.device}."
            ) from error
        check_divisible(self.batch_size, self.device)


def network(convs: tuple[int, int, int, int, int], classes: int, config: Config) -> VGG:
    """Return a fresh network; the same seed gives every student the same first weights."""
    torch.manual_seed(config.seed)
    return synchronise_batch_norm(VGG(convs, classes, config.width).to(config.device))


def train_alone(phase: str, model: VGG, engine: Engine, config: Config) -> None:
    """Train a network on the task, as any loop does."""
    optimizer = nesterov(list(model.parameters()), config.learning_rate)
    scaler = engine.scaler()

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with engine.autocast():
            task = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        scaler.scale(task).backward()  # type: ignore[no-untyped-call] # torch's own has no types
        average_gradients(model.parameters())
        scaler.step(optimizer)
        scaler.update()
        return task

    scheduler = step_decay(optimizer, config.epochs)
    engine.run(phase, config.epochs, step, model=model, scheduler=scheduler)


def train_mhgd(student: VGG, teacher: VGG, engine: Engine, config: Config) -> None:
    """Train the estimators on the teacher, then the student on the task and the graphs."""
    squash = None if config.squash == "none" else config.squash
    group = all_processes()  # None for one; the graphs span the batch of all
    transfer = GraphTransferLoss(
        student.channels, config.num_heads, squash=squash, process_group=group
    )
    transfer.to(config.device)
    teacher.eval().requires_grad_(requires_grad=False)
    of_teacher = FeatureHooks(teacher, SENSING_POINTS)
    of_student = FeatureHooks(student, SENSING_POINTS)

    # The authors' decay on the estimators is 5e-4 |w|² without the usual half, hence twice 5e-4.
    heads = nesterov(list(transfer.parameters()), config.learning_rate, weight_decay=1e-3)

    def estimator_step(images: Tensor, _labels: Tensor) -> Tensor:
        with engine.autocast():
            teacher(images)
        loss = transfer.estimator_loss(of_teacher.features)
        heads.zero_grad()
        # The loss is the whole batch's on every process, and so are its gradients.
        loss.backward()  # type: ignore[no-untyped-call] # torch's own has no types
        heads.step()
        return loss

    engine.run("estimator", config.estimator_epochs, estimator_step)

    optimizer = GatedGradClip(
        nesterov(list(student.parameters()), config.learning_rate),
        config.gate,
        bound=config.bound,
        process_group=group,
    )
    scaler = engine.scaler()

    def open_gate(epoch: int) -> None:
        optimizer.bound = config.bound / (1 + exp(-epoch))  # from a half to one times `bound`

    def student_step(images: Tensor, labels: Tensor) -> Tensor:
        with engine.autocast():
            teacher(images)
            task = F.cross_entropy(student(images), labels)
        graphs = transfer(of_student.features, of_teacher.features)
        optimizer.zero_grad()
        optimizer.backward(scaler.scale(task), scaler.scale(graphs))
        scaler.step(optimizer)
        scaler.update()
        return task

    scheduler = step_decay(optimizer, config.epochs)
    engine.run(
        "mhgd",
        config.epochs,
        student_step,
        model=student,
        scheduler=scheduler,
        before_epoch=open_gate,
    )
    engine.record.phase("mhgd", skipped_transfer_gradients=optimizer.skipped)
    of_teacher.remove()
    of_student.remove()


def run(config: Config) -> dict[str, float]:
    """Run every phase and return the last accuracies, per cent."""
    with first_on_each_machine():
        train_set, test_set = (s.to(config.device) for s in load_cifar100(config.data_dir))
    train_set = train_set.take_per_class(config.limit_per_class)
    batches(train_set, config.batch_size, torch.Generator())  # an impossible size fails here
    classes = train_set.num_classes
    about = {"network": "VGG16", "width": config.width, "classes": classes}
    teacher = network(TEACHER, classes, config)
    if config.teacher_checkpoint is not None:
        load_model(config.teacher_checkpoint, teacher, about, name="--teacher-checkpoint")

    record = Record(config.out, plain(config), torch.device(config.device))
    engine = Engine(train_set, test_set, config.batch_size, config.seed, AMP[config.amp], record)
    if config.teacher_checkpoint is None:
        train_alone("teacher", teacher, engine, config)
        save_model(config.out / "teacher.pt", teacher, about)
    result = {"teacher": engine.test(teacher)}
    record.phase("teacher", last_accuracy=result["teacher"])
    print(f"The teacher that teaches: {result['teacher']:.2f} %")

    for method in dict.fromkeys(config.method):  # each once
        student = network(STUDENT, classes, config)
        if method == "student":
            train_alone("student", student, engine, config)
        else:
            train_mhgd(student, teacher, engine, config)
        result[method] = engine.test(student)
        save_model(config.out / f"{method}.pt", student, about | {"network": "VGG7"})
    plot_curves(config.out / "curves.png", record.content)
    return result


def main() -> None:
    """Run the command line; what the user can mend ends in one line."""
    with processes():
        try:
            config = parse(Config, __doc__)
            result = run(config)
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            end_all(f"{Path(sys.argv[0]).name}: {error}")
        for name, accuracy in result.items():
            print(f"{name:8} {accuracy:6.2f} %  (test accuracy, last epoch)")
        print(f"Record, curves and checkpoints: {config.out}")


if __name__ == "__main__":
    main()
