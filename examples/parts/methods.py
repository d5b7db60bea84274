"""How each method trains a student: the schedules of the authors' program, and MHGD's.

Every function here trains in phases of an `Engine`, so that an interrupted run goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from math import exp
from typing import Any, cast

import torch
import torch.nn.functional as F
from parts.baselines.factor import FactorTransfer
from parts.baselines.recipes import RECIPES, Outputs, Recipe
from parts.distributed import average_gradients
from parts.engine import DivergedError, Engine, nesterov, step_decay
from parts.network import Network
from parts.runs import Stateful
from parts.settings import Experiment, Settings, Squash
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss

__all__ = ["METHODS", "MHGD", "title_of", "train_alone", "train_estimators", "train_student"]


@dataclass(frozen=True)
class MHGDForm:
    """A form of the method."""

    title: str
    squash: Squash = None
    soft_logits: bool = False
    own_heads: bool = False  # the student has attention heads of its own


MHGD = {
    "mhgd": MHGDForm("MHGD"),
    "mhgd-tanh": MHGDForm("MHGD, tanh", squash="tanh"),
    "mhgd-scaled": MHGDForm("MHGD, scaled", squash="scaled"),
    "mhgd-soft-logits": MHGDForm("MHGD + Soft-logits", soft_logits=True),
    "mhgd-own-heads": MHGDForm("MHGD, own heads", squash="scaled", own_heads=True),
}
METHODS = ("student", *RECIPES, *MHGD)


def title_of(method: str) -> str:
    """Return a method's name in tables."""
    if method in MHGD:
        return MHGD[method].title
    return RECIPES[method].title if method in RECIPES else method.capitalize()


def train_alone(
    phase: str,
    model: Network,
    epochs: int,
    engine: Engine,
    experiment: Experiment,
    settings: Settings,
) -> None:
    """Train a network on the task, as any loop does."""
    optimizer = experiment.optimizer(list(model.parameters()), settings)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels)

    _descend(phase, epochs, loss, optimizer, engine, model=model, decays=True)


def train_estimators(
    transfer: GraphTransferLoss, teacher: Network, engine: Engine, settings: Settings
) -> None:
    """Train the attention heads on the teacher, before any student learns from them."""
    # The authors' decay on the estimators is 5e-4 |w|² without the usual half, hence twice 5e-4.
    optimizer = nesterov(list(transfer.parameters()), settings.learning_rate, weight_decay=1e-3)
    with FeatureHooks(teacher, teacher.sensing_points) as of_teacher:

        def step(images: Tensor, _labels: Tensor) -> dict[str, Tensor]:
            with engine.autocast(), torch.no_grad():
                teacher(images)
            loss = transfer.estimator_loss(of_teacher.features)
            optimizer.zero_grad()
            # The loss is the whole batch's on every process, and so are its gradients.
            loss.backward()  # type: ignore[no-untyped-call] # torch's own has no types
            optimizer.step()
            return {"loss": loss}

        state: dict[str, Stateful] = {"estimators": transfer, "optimizer": optimizer}
        engine.run("estimators", settings.first_epochs, step, state)


def train_student(
    method: str,
    student: Network,
    teacher: Network,
    transfer: GraphTransferLoss | None,
    engine: Engine,
    experiment: Experiment,
    settings: Settings,
) -> dict[str, Any]:
    """Train the student by one of `METHODS`; return what the record should say beside accuracies.

    Args:
        method: One of `METHODS`.
        student: A fresh network.
        teacher: A trained network, or a fresh one for the schedule "mutual".
        transfer: The loss with trained estimators, for a form of MHGD.
        engine: Runs the phases.
        experiment: Gives the optimizers.
        settings: How to train.
    """
    if method == "student":
        train_alone("student", student, settings.epochs, engine, experiment, settings)
        return {}
    if transfer is not None:
        return _mhgd(MHGD[method], student, teacher, transfer, engine, experiment, settings)
    recipe = RECIPES[method]
    module = recipe.build(student.channels, teacher.channels).to(engine.device)
    mutual = recipe.schedule == "mutual"
    with Both(student, teacher, engine, teacher_learns=mutual) as both:

        def transfer_loss(images: Tensor) -> Tensor:
            return recipe.loss(module, *both(images))

        if recipe.schedule == "initialise":
            _initialise(student, recipe, module, transfer_loss, engine, experiment, settings)
        elif recipe.gated:
            return _gated(student, recipe, module, both, engine, experiment, settings)
        else:
            if isinstance(module, FactorTransfer):
                _prepare(module, both, engine, settings)
            _together(student, teacher, recipe, module, both, engine, experiment, settings)
    if recipe.schedule == "initialise":
        train_alone("student", student, settings.epochs, engine, experiment, settings)
    return {}


class Both:
    """Run student and teacher on a batch and return what each shows of it."""

    def __init__(
        self, student: Network, teacher: Network, engine: Engine, *, teacher_learns: bool = False
    ) -> None:
        self.student, self.teacher, self.engine = student, teacher, engine
        self.teacher_learns = teacher_learns
        teacher.train(teacher_learns).requires_grad_(teacher_learns)
        self.hooks = [
            FeatureHooks(network, [*network.sensing_points, network.embedding])
            for network in (student, teacher)
        ]

    def __call__(self, images: Tensor) -> tuple[Outputs, Outputs]:
        """Return the student's outputs and the teacher's."""
        return self._of(self.student, images), self.of_teacher(images)

    def of_teacher(self, images: Tensor) -> Outputs:
        """Return the teacher's alone."""
        with nullcontext() if self.teacher_learns else torch.no_grad():
            return self._of(self.teacher, images)

    def _of(self, network: Network, images: Tensor) -> Outputs:
        with self.engine.autocast():
            logits = network(images)
        *maps, embedding = self.hooks[network is self.teacher].features
        return Outputs(maps, embedding, logits.float())  # losses are taken in float32

    def __enter__(self) -> Both:
        return self

    def __exit__(self, *_error: object) -> None:
        for hooks in self.hooks:
            hooks.remove()


def _mhgd(
    form: MHGDForm,
    student: Network,
    teacher: Network,
    transfer: GraphTransferLoss,
    engine: Engine,
    experiment: Experiment,
    settings: Settings,
) -> dict[str, Any]:
    """The student's phase of MHGD: the task's gradient, and the graphs' behind the gate."""
    soft = RECIPES["soft-logits"]
    soft_logits = soft.build((), ())
    with Both(student, teacher, engine) as both:

        def losses(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            of_student, of_teacher = both(images)
            task = _finite(F.cross_entropy(of_student.logits, labels))
            if form.soft_logits:
                task = soft.task_weight * task + soft.loss(soft_logits, of_student, of_teacher)
            return task, transfer(of_student.maps, of_teacher.maps)

        return _descend_gated(student, losses, engine, experiment, settings, transfer)


def _gated(
    student: Network,
    recipe: Recipe,
    module: nn.Module,
    both: Both,
    engine: Engine,
    experiment: Experiment,
    settings: Settings,
) -> dict[str, Any]:
    """Every step on the task and the loss, the latter's gradient gated as MHGD's is."""

    def losses(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        of_student, of_teacher = both(images)
        task = _finite(F.cross_entropy(of_student.logits, labels))
        return task, recipe.loss(module, of_student, of_teacher)

    program = settings.with_(gate="norm", bound=1.0)  # these methods' gate has no other form
    return _descend_gated(student, losses, engine, experiment, program)


def _finite(task: Tensor) -> Tensor:
    """Refuse a loss that has diverged before its maps reach a decomposition, which would, too."""
    if not bool(task.isfinite()):
        raise DivergedError("student", task.item())
    return task


def _together(
    student: Network,
    teacher: Network,
    recipe: Recipe,
    module: nn.Module,
    both: Both,
    engine: Engine,
    experiment: Experiment,
    settings: Settings,
) -> None:
    """Every step on the task and the loss; both networks' where neither was trained before."""
    learning = [student, module, teacher] if both.teacher_learns else [student, module]
    params = [p for part in learning for p in part.parameters() if p.requires_grad]

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        of_student, of_teacher = both(images)
        task = F.cross_entropy(of_student.logits, labels)
        if both.teacher_learns:
            task = task + F.cross_entropy(of_teacher.logits, labels)
        return recipe.task_weight * task + recipe.loss(module, of_student, of_teacher)

    _descend(
        "student",
        settings.epochs,
        loss,
        experiment.optimizer(params, settings),
        engine,
        model=student,
        others={"module": module, "teacher": teacher}
        if both.teacher_learns
        else {"module": module},
        decays=True,
    )


def _initialise(
    student: Network,
    recipe: Recipe,
    module: nn.Module,
    transfer_loss: Callable[[Tensor], Tensor],
    engine: Engine,
    experiment: Experiment,
    settings: Settings,
) -> None:
    """Epochs on the loss alone, before those on the task."""
    params = [*student.parameters(), *module.parameters()]
    slower = settings.with_(learning_rate=recipe.first_rate * settings.learning_rate)
    _descend(
        "initialise",
        settings.first_epochs,
        lambda images, _labels: transfer_loss(images),
        experiment.optimizer(params, slower),
        engine,
        others={"student": student, "module": module},
    )


def _prepare(module: FactorTransfer, both: Both, engine: Engine, settings: Settings) -> None:
    """Epochs of the paraphraser on the teacher alone."""
    # The program's decay is 5e-4 |w|² of the kernels, without the usual half.
    kernels: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    for name, param in module.paraphraser.named_parameters():
        (biases if name.endswith("bias") else kernels).append(param)
    optimizer = nesterov(kernels, settings.learning_rate, weight_decay=1e-3)
    optimizer.add_param_group({"params": biases, "weight_decay": 0.0})
    _descend(
        "paraphraser",
        settings.first_epochs,
        lambda images, _labels: module.paraphraser_loss(both.of_teacher(images).last_map),
        optimizer,
        engine,
        others={"module": module},
    )
    module.paraphraser.requires_grad_(requires_grad=False)


def _descend(
    phase: str,
    epochs: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    engine: Engine,
    *,
    model: Network | None = None,
    others: dict[str, Any] | None = None,
    decays: bool = False,
) -> None:
    """Run a phase of ordinary steps on one loss."""
    scaler = engine.scaler()
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def step(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with engine.autocast():
            value = loss(images, labels)
        optimizer.zero_grad()
        scaler.scale(value).backward()  # type: ignore[no-untyped-call] # torch's own has no types
        average_gradients(params)
        scaler.step(optimizer)
        scaler.update()
        return {"loss": value}

    engine.run(
        phase,
        epochs,
        step,
        {"optimizer": optimizer, "scaler": cast(Any, scaler), **(others or {})},
        model=model,
        scheduler=step_decay(optimizer, epochs) if decays else None,
    )


def _descend_gated(
    student: Network,
    losses: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    engine: Engine,
    experiment: Experiment,
    settings: Settings,
    transfer: GraphTransferLoss | None = None,
) -> dict[str, Any]:
    """Run the student's phase on the task and on a gated loss."""
    own_heads = nn.ModuleList() if transfer is None else transfer.student_heads
    params = [*student.parameters(), *own_heads.parameters()]
    optimizer = experiment.gated_optimizer(params, settings)
    scaler = engine.scaler()
    gated = Gated(optimizer, scaler)

    def open_gate(epoch: int) -> None:
        optimizer.bound = settings.bound / (1 + exp(-epoch))  # from a half to one times `bound`

    def step(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        task, transfer = losses(images, labels)
        optimizer.zero_grad()
        optimizer.backward(scaler.scale(task), scaler.scale(transfer))
        scaler.step(optimizer)
        scaler.update()
        return {"loss": task, "transfer_loss": transfer}

    engine.run(
        "student",
        settings.epochs,
        step,
        {"gated": gated, "own_heads": own_heads},
        model=student,
        scheduler=step_decay(optimizer, settings.epochs),
        before_epoch=open_gate,
    )
    return {"skipped_transfer_gradients": optimizer.skipped}


@dataclass(frozen=True)
class Gated:
    """What a gated phase changes beside the student, for its checkpoint."""

    optimizer: GatedGradClip
    scaler: GradScaler

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain types."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.optimizer.skipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.scaler.load_state_dict(state_dict["scaler"])
        self.optimizer.skipped = state_dict["skipped"]
