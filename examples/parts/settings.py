"""The settings that the four scripts share, and what an experiment is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from parts.config import check_above_zero, check_at_least, check_device, flag
from parts.data import ImageSet
from parts.distributed import check_divisible
from parts.network import MOST_WIDTH, Network
from torch.nn import Parameter
from torch.optim import Optimizer

from graph_kd import GatedGradClip, GraphTransferLoss

__all__ = ["Experiment", "Settings", "Squash"]

Squash = Literal["tanh", "scaled"] | None
AMP = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """How networks are trained; each field is a flag of every script."""

    data_dir: Path | None = flag(None, "folder or archive of the data set; else it is downloaded")
    data_name: str | None = flag(None, "what to call it, where it is another in the same layout")
    epochs: int = flag(100, "epochs of each student")
    teacher_epochs: int | None = flag(None, "epochs of the teacher; else as many as a student's")
    first_epochs: int = flag(40, "epochs of the estimators, or of a method's own start, before")
    batch_size: int = flag(128, "images a step, of all processes")
    learning_rate: float = flag(0.1, "first learning rate")
    width: float = flag(1.0, "factor on every channel count")
    student_width: float = flag(1.0, "factor on a student's channels, times the width")
    classes: int | None = flag(None, "only the first N classes")
    limit_per_class: int | None = flag(None, "only the first N training images of each class")
    student_share: float = flag(1.0, "part of the teacher's images that the students learn from")
    split: Literal["test", "dev"] = flag("test", "measure on: test images, or a training tenth")
    num_heads: int = flag(8, "attention heads")
    gate: Literal["norm", "sigmoid"] = flag("norm", "how the transfer gradient is gated")
    bound: float = flag(1.0, "largest transfer norm, in task norms, late in training")
    amp: Literal["none", "bfloat16", "float16"] = flag("none", "precision of the networks")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to run")
    threads: int | None = flag(None, "CPU threads of torch; another number rounds otherwise")
    checkpoint_seconds: float = flag(30.0, "seconds between checkpoints at least")

    def __post_init__(self) -> None:
        check_at_least(self, epochs=1, first_epochs=0, batch_size=2, classes=2, limit_per_class=1)
        check_at_least(self, num_heads=1, teacher_epochs=1, threads=1, checkpoint_seconds=0)
        check_above_zero(self, "bound", "learning_rate", "width", "student_width", "student_share")
        for name, most in (("student_share", 1), ("width", MOST_WIDTH), ("student_width", 1)):
            if (got := getattr(self, name)) > most:
                raise ValueError(f"`--{name.replace('_', '-')}` must be ≤ {most}; got {got}.")
        if self.data_name is not None and not re.fullmatch(r"[\w.-]*\w[\w.-]*", self.data_name):
            raise ValueError(
                f"`--data-name` must be letters, digits, '.', '-' and '_', as it names a folder; "
                f"got {self.data_name!r}."
            )
        check_device(self)
        check_divisible(self.batch_size, self.device)

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """The type that the networks' forward passes run in; None is float32.

        (GPUs from Ampere on take a convolution's products in TF32 then, as torch lets them.)
        """
        return AMP[self.amp]

    def with_(self, **changes: Any) -> Settings:
        """Return the settings alone, without a script's own flags, some of them changed."""
        own = {f.name: getattr(self, f.name) for f in fields(Settings)}
        return Settings(**own | changes)


@dataclass(frozen=True)
class Experiment:
    """A data set, a teacher, a student and how MHGD joins them: what a script shows.

    Args:
        data_name: The data set, for records and pictures.
        teacher_name: The teacher's architecture, likewise.
        student_name: The student's.
        load: From `--data-dir` to training and test images.
        teacher: From the number of classes and the width to a fresh network.
        student: Likewise.
        transfer_loss: From the channels at the sensing points, what is done to the logits, the
            student's channels if it has heads of its own, and the settings to the loss.
        optimizer: From a network's parameters and the settings to the optimizer.
        gated_optimizer: Likewise for the student, where a second gradient joins the task's.
    """

    data_name: str
    teacher_name: str
    student_name: str
    load: Callable[[Path | None], tuple[ImageSet, ImageSet]]
    teacher: Callable[[int, float], Network]
    student: Callable[[int, float], Network]
    transfer_loss: Callable[
        [tuple[int, ...], tuple[int, ...] | None, Squash, Settings], GraphTransferLoss
    ]
    optimizer: Callable[[list[Parameter], Settings], Optimizer]
    gated_optimizer: Callable[[list[Parameter], Settings], GatedGradClip]

    def with_student(self, name: str, student: Callable[[int, float], Network]) -> Experiment:
        """Return the same with another student."""
        return replace(self, student_name=name, student=student)
