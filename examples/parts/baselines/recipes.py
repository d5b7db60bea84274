"""How each baseline was trained in the program of Lee & Song (KD_methods_with_TF): one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from parts.baselines.factor import FactorTransfer
from parts.baselines.logits import DeepMutualLearning, SoftLogits
from parts.baselines.maps import ActivationBoundary, AttentionTransfer, FitNet
from parts.baselines.relation import RelationalKD
from parts.baselines.shared import FSP, KDSVD, KDSVDF
from torch import Tensor, nn

__all__ = ["RECIPES", "Outputs", "Recipe"]

Build = Callable[[Sequence[int], Sequence[int]], nn.Module]


@dataclass(frozen=True)
class Outputs:
    """What a network shows of one batch.

    Args:
        maps: Feature maps at the sensing points, front to back, each ``b c h w``.
        embedding: What the classifier is given, ``b c``; the program's is the mean over space.
        logits: The answers, ``b c``.
    """

    maps: Sequence[Tensor]
    embedding: Tensor
    logits: Tensor

    @property
    def last_map(self) -> Tensor:
        """The map of the last sensing point."""
        return self.maps[-1]


@dataclass(frozen=True)
class Recipe:
    """What a training loop must know of a baseline.

    The schedules:

    - ``together``: every step on ``task_weight`` · task + ``weight`` · loss.
    - ``initialise``: 40 epochs on ``weight`` · loss alone, where weight decay takes only the
      weights that the loss reaches; then the task alone, with fresh momentum.
    - ``prepare``: 40 epochs on ``paraphraser_loss``, in which the student rests; then as
      ``together``.
    - ``mutual``: as ``together``, for two networks of which neither was trained before. Both take
      their step at once, where in the program the student sees the teacher after its step.

    Args:
        title: The method's name in the tables of the paper.
        build: From the channels of student and teacher at the sensing points to the loss, a module
            called with what ``takes`` names of the student, then of the teacher. Its parameters,
            if any, learn with the student; where the loss does not reach them their gradient stays
            None.
        takes: Which `Outputs` it compares.
        schedule: When it is used.
        weight: Factor on the loss.
        task_weight: Factor on the task's loss in the same step.
        first_rate: Factor on the learning rate of the first epochs. The program's is one.
        gated: Whether the program caps the loss's gradient at the task's, as it does for MHGD:
            `GatedGradClip` with gate "norm" and bound 1 / (1 + exp(-epoch)).
    """

    title: str
    build: Build
    takes: Literal["maps", "last_map", "embedding", "logits"]
    schedule: Literal["together", "initialise", "prepare", "mutual"]
    weight: float = 1.0
    task_weight: float = 1.0
    first_rate: float = 1.0
    gated: bool = False

    def loss(self, module: nn.Module, student: Outputs, teacher: Outputs) -> Tensor:
        """Return ``weight`` times the loss of what two networks show of one batch."""
        loss: Tensor = module(getattr(student, self.takes), getattr(teacher, self.takes))
        return self.weight * loss


RECIPES = {
    "soft-logits": Recipe(
        "Soft-logits",
        lambda *_: SoftLogits(temperature=4.0),
        takes="logits",
        schedule="together",
        weight=0.3,
        task_weight=0.7,
    ),
    "fitnet": Recipe("FitNet", FitNet, takes="maps", schedule="initialise"),
    "at": Recipe(
        "AT", lambda *_: AttentionTransfer(), takes="maps", schedule="together", weight=500.0
    ),
    # At the task's rate the first epochs diverge on the WRN, whose maps no batch norm bounds.
    "fsp": Recipe(
        "FSP",
        lambda *_: FSP(),
        takes="maps",
        schedule="initialise",
        weight=1e-3,
        first_rate=0.1,
    ),
    "dml": Recipe("DML", lambda *_: DeepMutualLearning(), takes="logits", schedule="mutual"),
    "kd-svd": Recipe("KD-SVD", lambda *_: KDSVD(), takes="maps", schedule="together", gated=True),
    # The program does not hold KD-SVDF: schedule and gate are ours, after KD-SVD.
    "kd-svdf": Recipe(
        "KD-SVDF", lambda *_: KDSVDF(), takes="maps", schedule="together", gated=True
    ),
    "ft": Recipe(
        "FT",
        lambda student, teacher: FactorTransfer(student[-1], teacher[-1]),
        takes="last_map",
        schedule="prepare",
        weight=500.0,
    ),
    "ab": Recipe("AB", ActivationBoundary, takes="maps", schedule="initialise", weight=3e-3),
    "rkd": Recipe("RKD", lambda *_: RelationalKD(), takes="embedding", schedule="together"),
}
