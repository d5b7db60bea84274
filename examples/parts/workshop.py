"""Everything trained for one teacher and one seed: a folder a network, each trained once.

    teacher/            the teacher
    estimators/         the attention heads, trained on it
    VGG7/student/       the student alone
    VGG7/fsp/ …         the student by each method

What a run of other settings shares with an earlier one is not trained again: a bound, a gate, a
number of heads, a share of the images or a split that is not the default is in the folder's name.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from parts.augment import Normalize, batches
from parts.baselines.recipes import RECIPES
from parts.batch_norm import synchronise_batch_norm
from parts.data import ImageSet
from parts.distributed import first_on_each_machine
from parts.engine import Engine
from parts.files import load_model
from parts.methods import MHGD, train_alone, train_estimators, train_student
from parts.network import Network
from parts.runs import Run, hold, read_record
from parts.settings import Experiment, Settings, Squash
from torch import nn

from graph_kd import GraphTransferLoss

__all__ = ["Workshop"]

DEFAULTS = Settings(device="cpu")  # an import must not wake a GPU


class Images(NamedTuple):
    """The images to learn from, those to measure on, and a checksum of both."""

    train: ImageSet
    test: ImageSet
    digest: int


@dataclass(frozen=True)
class Workshop:
    """Train networks of an experiment, and what they need, where that is not done yet.

    Args:
        experiment: What to train.
        settings: How.
        seed: Of weights, order and augmentation.
        root: Folder of all of it.
    """

    experiment: Experiment
    settings: Settings
    seed: int
    root: Path

    def train(self, name: str) -> dict[str, Any] | None:
        """Train "teacher", "estimators" or a method's student, after all that it needs.

        Returns:
            Its record; None where another process is at it, or at what it needs.

        Raises:
            ValueError: a folder holds a run of other settings, or a damaged file.
            RuntimeError: the loss has diverged.
        """
        for needed in self.needs(name):
            if self.train(needed) is None:
                return None
        with hold(self.folder(name)) as mine:
            if not mine:
                return None
            settings = self.settings
            device = torch.device(settings.device)
            run = Run(self.folder(name), self.about(name), device, settings.checkpoint_seconds)
            if not run.finished:
                self._train(name, run)
            return run.content

    def folder(self, name: str) -> Path:
        """Return the folder of a network."""
        above = self.root
        if name not in ("teacher", "estimators"):
            above /= self.experiment.student_name
        return above / ",".join([name, *self.marks(name)])

    def marks(self, name: str) -> list[str]:
        """Return what tells a network from others of one workshop: settings not the default."""
        return [
            f"{field}={value}"
            for field in self._fields(name)
            if (value := getattr(self.settings, field)) != getattr(DEFAULTS, field)
        ]

    def about(self, name: str) -> dict[str, Any]:
        """Return all that makes a network what it is, plain types."""
        images = self._images
        return self.about_without_images(name) | {
            "images": images.digest,
            "classes": images.train.num_classes,
        }

    def record(self, name: str) -> dict[str, Any] | None:
        """Return the record of a network, if it is finished; the images are not looked at.

        Raises:
            ValueError: the folder holds a run of other settings, or a damaged file.
        """
        record = read_record(self.folder(name), self.about_without_images(name))
        return record if record is not None and record["finished"] else None

    def about_without_images(self, name: str) -> dict[str, Any]:
        """Return what can be said without reading the data set."""
        settings = self.settings
        about: dict[str, Any] = {
            "data": self.settings.data_name or self.experiment.data_name,
            "teacher": self.experiment.teacher_name,
            "seed": self.seed,
            "batch_size": settings.batch_size,
            "learning_rate": settings.learning_rate,
            "width": settings.width,
            "amp": settings.amp,
        }
        # Records of before `--student-width` do not have it.
        about |= {
            field: getattr(settings, field)
            for field in self._fields(name)
            if field != "student_width" or settings.student_width != 1
        }
        if name == "teacher":
            about["teacher_epochs"] = self._teacher_epochs
        else:
            about["first_epochs"] = settings.first_epochs
        if name not in ("teacher", "estimators"):
            about["epochs"] = settings.epochs
            if name in RECIPES and RECIPES[name].first_rate != 1:
                about["first_rate"] = RECIPES[name].first_rate
            about |= {"student": self.experiment.student_name, "method": name}
        return about

    @property
    def _teacher_epochs(self) -> int:
        epochs = self.settings.teacher_epochs
        return self.settings.epochs if epochs is None else epochs

    def _fields(self, name: str) -> list[str]:
        """Return the settings that tell networks of one workshop apart."""
        fields = ["split"]
        if name != "teacher":
            fields.append("student_share")
        if name == "estimators" or name in MHGD:
            fields.append("num_heads")
        if name in MHGD:
            fields += ["gate", "bound"]
        if name not in ("teacher", "estimators"):
            fields.append("student_width")
        return fields

    def needs(self, name: str) -> tuple[str, ...]:
        """Return what must be trained before a network."""
        if name == "estimators":
            return ("teacher",)
        if name in MHGD:
            return ("teacher", "estimators")
        alone = name in ("teacher", "student") or RECIPES[name].schedule == "mutual"
        return () if alone else ("teacher",)

    @property
    def _images(self) -> Images:
        s = self.settings
        return _loaded(
            self.experiment.load, s.data_dir, s.classes, s.limit_per_class, s.split, s.device
        )

    def _train(self, name: str, run: Run) -> None:
        settings = self.settings
        train_set, test_set, _ = self._images
        if name != "teacher":
            train_set = train_set.take_share(settings.student_share)
        batches(train_set, settings.batch_size, torch.Generator())  # too few images fail here
        normalize = Normalize(self._images.train)  # the same where students have a share of them
        engine = Engine(
            train_set, test_set, settings.batch_size, self.seed, settings.amp_dtype, run, normalize
        )
        if name == "teacher":
            model, result = self._teacher(engine)
        elif name == "estimators":
            model, result = self._estimators(engine)
        else:
            model, result = self._student(name, engine)
        run.finish(model.state_dict(), **result)

    def _teacher(self, engine: Engine) -> tuple[nn.Module, dict[str, Any]]:
        teacher = self._network(self.experiment.teacher)
        epochs = self._teacher_epochs
        train_alone("teacher", teacher, epochs, engine, self.experiment, self.settings)
        return teacher, _accuracies(engine.run_of, "teacher")

    def _estimators(self, engine: Engine) -> tuple[nn.Module, dict[str, Any]]:
        teacher, accuracy = self._trained_teacher(engine)
        transfer = self._transfer(teacher, None)
        train_estimators(transfer, teacher, engine, self.settings)
        return transfer, accuracy

    def _student(self, method: str, engine: Engine) -> tuple[nn.Module, dict[str, Any]]:
        result: dict[str, Any] = {}
        if self.needs(method):
            teacher, result = self._trained_teacher(engine)
        else:
            teacher = self._network(self.experiment.teacher)
        width = self.settings.width * self.settings.student_width
        student, transfer = self._network(self.experiment.student, width), None
        if method in MHGD:
            transfer = trained = self._transfer(teacher, MHGD[method].squash)
            self._take("estimators", trained)
            if MHGD[method].own_heads:
                transfer = self._transfer(teacher, MHGD[method].squash, student.channels)
                transfer.estimators = trained.estimators
        result |= train_student(
            method, student, teacher, transfer, engine, self.experiment, self.settings
        )
        return student, _accuracies(engine.run_of, "student") | result

    def _trained_teacher(self, engine: Engine) -> tuple[Network, dict[str, Any]]:
        """Return the teacher, frozen, and its accuracy, measured again before it teaches."""
        teacher = self._network(self.experiment.teacher)
        self._take("teacher", teacher)
        teacher.eval().requires_grad_(requires_grad=False)
        accuracy = engine.test(teacher)
        print(f"Seed {self.seed}, {engine.run_of.folder.name}: the teacher has {accuracy:.2f} %")
        return teacher, {"teacher_accuracy": accuracy}

    def _network(
        self, build: Callable[[int, float], Network], width: float | None = None
    ) -> Network:
        """Return a fresh network; the same seed gives every student the same first weights."""
        torch.manual_seed(self.seed)
        network = build(self._images.train.num_classes, width or self.settings.width)
        network.to(self.settings.device, memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's own overloads leave it out
        return synchronise_batch_norm(network)

    def _transfer(
        self,
        teacher: Network,
        squash: Squash,
        student_channels: tuple[int, ...] | None = None,
    ) -> GraphTransferLoss:
        torch.manual_seed(self.seed)
        loss = self.experiment.transfer_loss(
            teacher.channels, student_channels, squash, self.settings
        )
        return loss.to(self.settings.device)

    def _take(self, name: str, module: nn.Module) -> None:
        """Fill a module with what an earlier run has trained."""
        folder = self.folder(name)
        fix = f" Delete {folder} to train it again."
        load_model(folder / "model.pt", module, self.about(name), name=name, fix=fix)


@lru_cache(maxsize=2)  # a table's workshops share one or two
def _loaded(
    load: Callable[[Path | None], tuple[ImageSet, ImageSet]],
    data_dir: Path | None,
    classes: int | None,
    limit_per_class: int | None,
    split: str,
    device: str,
) -> Images:
    """Return the images of some settings, on the device.

    ``split="dev"`` keeps every tenth training image of a class apart and measures on these: what is
    chosen by them has not seen the test images.
    """
    with first_on_each_machine():
        train_set, test_set = (s.take_classes(classes) for s in load(data_dir))
    if split == "dev":
        train_set, test_set = train_set.hold_out(10)
        if not len(test_set.images):
            raise ValueError("`--split dev` must have ten training images of a class; got fewer.")
    train_set = train_set.take_per_class(limit_per_class)
    digest = 0
    for part in (train_set, test_set):
        for tensor in (part.images, part.labels):
            digest = zlib.crc32(tensor.contiguous().numpy(), digest)  # type: ignore[arg-type] # numpy's types do not say that arrays are buffers
    return Images(train_set.to(device), test_set.to(device), digest)


def _accuracies(run: Run, phase: str) -> dict[str, Any]:
    """Return the result, which is the last epoch's, and the best one beside it."""
    accuracies = [epoch["test_accuracy"] for epoch in run.phase(phase)["epochs"]]
    return {"accuracy": accuracies[-1], "best_accuracy": max(accuracies)}
