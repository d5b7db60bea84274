"""The losses of the ten methods that the poster compares with, and how each is trained.

Values and gradients are those of the authors' program (Lee & Song, KD_methods_with_TF) where it
contains the method. Each docstring says what differs from the method's own paper.

Axis letters: ``b`` sample, ``c d`` channel, ``h w`` space, ``i j k`` samples. ``p`` counts the
sensing points from 0; ``s`` is the student's tensor, ``t`` the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from common import soft_logits
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from graph_kd import SVDFeature, align_singular_vectors

Maps = Sequence[Tensor]  # one ``b c h w`` a sensing point, front to back
CANDIDATES = 4  # singular vectors of the student, one of which is aligned to the teacher's first
COINCIDE = 1e-12  # squared distance of unit embeddings below which they count as equal
SLOPE = 0.2  # of the leaky ReLUs of factor transfer


class Outputs(NamedTuple):
    """Maps at the sensing points, the input ``b c`` of the classifier, and logits ``b c``."""

    maps: Maps
    embedding: Tensor
    logits: Tensor

    @property
    def last_map(self) -> Tensor:
        """The map of the last sensing point."""
        return self.maps[-1]


def mutual(s: Tensor, t: Tensor) -> Tensor:
    """DML (Zhang et al. 2018): ½ mean_b [KL(p_t ‖ p_s) + KL(p_s ‖ p_t)] of logits.

    In the program both networks learn from this symmetric loss; in the paper, each from
    KL(p_other ‖ p_own).
    """

    def divergence(target: Tensor, estimate: Tensor) -> Tensor:
        logs = estimate.log_softmax(dim=1), target.log_softmax(dim=1)
        return F.kl_div(*logs, reduction="batchmean", log_target=True)

    return (divergence(t, s) + divergence(s, t)) / 2


class FitNet(nn.Module):
    """FitNet (Romero et al. 2015): Σ_p mean_bchw (r_p(s_p) - t_p)².

    All sensing points are compared, not one. r_p is a 1×1 convolution where channels differ; the
    program projects the teacher's map instead.
    """

    def __init__(self, of_student: Sequence[int], of_teacher: Sequence[int]) -> None:
        super().__init__()
        self.regressors = nn.ModuleList(
            nn.Identity() if s == t else nn.Conv2d(s, t, kernel_size=1, bias=False)
            for s, t in zip(of_student, of_teacher, strict=True)
        )

    def forward(self, student: Maps, teacher: Maps) -> Tensor:
        """Return the loss."""
        points = zip(self.regressors, student, teacher, strict=True)
        return torch.stack([F.mse_loss(regressor(s), t) for regressor, s, t in points]).sum()


def attention_transfer(student: Maps, teacher: Maps) -> Tensor:
    """AT (Zagoruyko & Komodakis 2017): Σ_p mean_bhw (q(s_p) - q(t_p))².

    q(x) = mean_c x², scaled to unit length over h w. The paper takes the length of the difference.
    """

    def attention(maps: Tensor) -> Tensor:
        return F.normalize(reduce(maps.square(), "b c h w -> b (h w)", "mean"), dim=1)

    points = zip(student, teacher, strict=True)
    return torch.stack([F.mse_loss(attention(s), attention(t)) for s, t in points]).sum()


class ActivationBoundary(nn.Module):
    """AB (Heo et al. 2019): a unit should be active, with a margin, where the teacher's is.

    Σ_p 2^p mean_b Σ_chw max(0, 1 - x)² where t_p > 0, max(0, 1 + x)² elsewhere; x is the output of
    the connector for s_p. The program takes the teacher's maps after the ReLU. The connector's
    batch norm uses the statistics of the batch in evaluation too.
    """

    def __init__(self, of_student: Sequence[int], of_teacher: Sequence[int]) -> None:
        super().__init__()
        self.connectors = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(s, t, kernel_size=1, bias=False),
                nn.BatchNorm2d(t, track_running_stats=False),
            )
            for s, t in zip(of_student, of_teacher, strict=True)
        )

    def forward(self, student: Maps, teacher: Maps) -> Tensor:
        """Return the loss."""
        losses = []
        for p, (connector, s, t) in enumerate(zip(self.connectors, student, teacher, strict=True)):
            response = connector(s)
            missing = F.relu(1 - torch.where(t > 0, response, -response))
            losses.append(2**p * missing.square().sum() / len(s))
        return torch.stack(losses).sum()


def fsp(student: Maps, teacher: Maps) -> Tensor:
    """FSP (Yim et al. 2017): Σ_p ½ mean_b Σ_cd (G_s - G_t)², G = mean_hw x_p,c x_p+1,d.

    The larger map is max pooled to the size of the one behind it.
    """

    def flow(front: Tensor, back: Tensor) -> Tensor:
        h, w = back.shape[2:]
        pooled = F.max_pool2d(front, (front.shape[2] // h, front.shape[3] // w))
        product: Tensor = einsum(pooled, back, "b c h w, b d h w -> b c d")
        return product / (h * w)

    flows = zip(pairwise(student), pairwise(teacher), strict=True)
    losses = [(flow(*s) - flow(*t)).square().sum() / (2 * len(s[0])) for s, t in flows]
    return torch.stack(losses).sum()


def aligned(student: Maps, teacher: Maps) -> list[tuple[Tensor, Tensor]]:
    """Return first right singular vectors, ``b c``, the student's aligned to the teacher's."""
    vectors = []
    for s, t in zip(student, teacher, strict=True):
        target = SVDFeature(k=1)(t)
        candidates = SVDFeature(min(CANDIDATES, s.shape[1], s.shape[2] * s.shape[3]))(s)
        both = align_singular_vectors(candidates, target), target
        vectors.append((rearrange(both[0], "b 1 c -> b c"), rearrange(both[1], "b 1 c -> b c")))
    return vectors


def kd_svd(student: Maps, teacher: Maps) -> Tensor:
    """KD-SVD (Lee et al. 2018): Σ_p Σ_bcd (K_s - K_t)², K = exp(-(v_p+1,d - v_p,c)² / 8).

    Without singular values: normalised over one vector, they are 1. The gradient is exact; the
    program's is not.
    """

    def relation(front: Tensor, back: Tensor) -> Tensor:
        difference = rearrange(back, "b d -> b d 1") - rearrange(front, "b c -> b 1 c")
        return (-difference.square() / 8).exp()

    losses = [
        (relation(front_s, back_s) - relation(front_t, back_t)).square().sum()
        for (front_s, front_t), (back_s, back_t) in pairwise(aligned(student, teacher))
    ]
    return torch.stack(losses).sum()


def kd_svdf(student: Maps, teacher: Maps) -> Tensor:
    """KD-SVDF (a baseline of Lee & Song 2019): Σ_p Σ_bc (v_s - v_t)², with the vectors of KD-SVD.

    The poster says only "L2 distance"; the square and the sums are ours.
    """
    return torch.stack([(s - t).square().sum() for s, t in aligned(student, teacher)]).sum()


def relational(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD (Park et al. 2019): 25 mean_ij h(D_s - D_t) + 50 mean_ijk h(A_s - A_t) of embeddings.

    h is Huber's loss, D the distances divided by their mean, A the cosines of the angles at i
    between j and k. The program scales embeddings to unit length. Memory and time grow with b³.
    """

    def relations(embedding: Tensor) -> tuple[Tensor, Tensor]:
        unit = F.normalize(embedding, dim=1)
        difference = rearrange(unit, "j c -> 1 j c") - rearrange(unit, "i c -> i 1 c")
        squared = difference.square().sum(dim=-1)
        distance = squared.clamp_min(COINCIDE).sqrt()
        distinct = rearrange(squared > COINCIDE, "i j -> i j 1")  # equal ones have no direction
        direction = torch.where(distinct, difference, 0) / rearrange(distance, "i j -> i j 1")
        cosine: Tensor = einsum(direction, direction, "i j c, i k c -> i j k")
        return distance / distance.mean(), cosine

    (distance_s, angle_s), (distance_t, angle_t) = relations(student), relations(teacher)
    return 25 * F.huber_loss(distance_s, distance_t) + 50 * F.huber_loss(angle_s, angle_t)


class FactorTransfer(nn.Module):
    """FT (Kim et al. 2018): mean_bchw |f(encoder(t)) - f(translator(s))| of the last maps.

    f scales each position to unit length over channels. The paraphraser (encoder and decoder) is
    first trained on the teacher alone by `paraphraser_loss`. Widths and leaky ReLUs are the
    program's. Height and width must be even; the teacher must have at least 8 channels.
    """

    def __init__(self, of_student: Sequence[int], of_teacher: Sequence[int]) -> None:
        super().__init__()
        wide, half, quarter, eighth = (of_teacher[-1] // n for n in (1, 2, 4, 8))
        if not eighth:
            raise ValueError(f"`of_teacher` must end in at least 8 channels; got {wide}.")

        def encoder(incoming: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(incoming, half, kernel_size=3, padding=1),
                nn.LeakyReLU(SLOPE),
                nn.Conv2d(half, quarter, kernel_size=3, stride=2, padding=1),
                nn.LeakyReLU(SLOPE),
                nn.Conv2d(quarter, eighth, kernel_size=3, padding=1),
            )

        self.paraphraser = nn.ModuleDict({"encoder": encoder(wide)})
        self.paraphraser["decoder"] = nn.Sequential(
            nn.LeakyReLU(SLOPE),
            nn.ConvTranspose2d(eighth, quarter, kernel_size=3, padding=1),
            nn.LeakyReLU(SLOPE),
            nn.ConvTranspose2d(quarter, half, kernel_size=3, stride=2, padding=1, output_padding=1),
            nn.LeakyReLU(SLOPE),
            nn.ConvTranspose2d(half, wide, kernel_size=3, padding=1),
            nn.LeakyReLU(SLOPE),
        )
        self.translator = encoder(of_student[-1])

    def paraphraser_loss(self, teacher: Tensor) -> Tensor:
        """Return mean_bchw |t - decoder(encoder(t))|."""
        factor = self.paraphraser["encoder"](teacher.detach())
        return F.l1_loss(self.paraphraser["decoder"](factor), teacher.detach())

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss; the paraphraser gets no gradient."""
        with torch.no_grad():
            target = F.normalize(self.paraphraser["encoder"](teacher), dim=1)
        return F.l1_loss(F.normalize(self.translator(student), dim=1), target)


class Plain(nn.Module):
    """A loss without weights as a module."""

    def __init__(self, function: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, student: Any, teacher: Any) -> Tensor:
        """Return the loss."""
        return self.function(student, teacher)


@dataclass(frozen=True)
class Recipe:
    """How the authors' program trains with a loss.

    The schedules: "together": every step uses both losses. "initialise": the first epochs use
    ``weight`` · loss alone, the others the task alone. "prepare": the first epochs train the
    paraphraser, the others are as in together. "mutual": together, for two new networks.

    Args:
        title: The method's name in tables.
        make: From the channels of student and teacher to the loss, a function or a class.
        takes: Which of the `Outputs` it compares.
        same: Axes of these that must be equal in student and teacher.
        schedule: When each loss is used.
        weight, task_weight: Factors on the loss and on the task's.
        first_rate: Factor on the learning rate of the first epochs.
        gated: Whether the gate limits its gradient, as it does for MHGD.
    """

    title: str
    make: Callable[..., Any]
    takes: Literal["maps", "last_map", "embedding", "logits"]
    same: str
    schedule: Literal["together", "initialise", "prepare", "mutual"] = "together"
    weight: float = 1.0
    task_weight: float = 1.0
    first_rate: float = 1.0
    gated: bool = False

    def build(self, of_student: Sequence[int], of_teacher: Sequence[int]) -> nn.Module:
        """Return the loss for networks with these channels at the sensing points."""
        if isinstance(self.make, type):
            module: nn.Module = self.make(of_student, of_teacher)
            return module
        return Plain(self.make)

    def loss(self, module: nn.Module, student: Outputs, teacher: Outputs) -> Tensor:
        """Return ``weight`` times the loss, in float32; the teacher gets a gradient if it learns.

        Raises:
            ValueError: shapes do not fit.
        """
        given, target = getattr(student, self.takes), getattr(teacher, self.takes)
        several = self.takes == "maps"
        pairs = list(zip(given, target, strict=True)) if several else [(given, target)]
        ready = []
        for p, (s, t) in enumerate(pairs):
            for axis, got, wanted in zip("bchw", s.shape, t.shape, strict=False):
                if axis in self.same and got != wanted:
                    raise ValueError(
                        f"{self.title} needs equal `{axis}` in student and teacher at sensing "
                        f"point {p}; got {tuple(s.shape)} and {tuple(t.shape)}. Choose other "
                        "sensing points, or another student."
                    )
            t = t if self.schedule == "mutual" else t.detach()
            ready.append([x.to(torch.promote_types(x.dtype, torch.float32)) for x in (s, t)])
        both = zip(*ready, strict=True) if several else ready[0]
        with torch.autocast(ready[0][0].device.type, enabled=False):
            value: Tensor = module(*both)
        return self.weight * value


RECIPES = {
    "soft-logits": Recipe("Soft-logits", soft_logits, "logits", "b c", weight=0.3, task_weight=0.7),
    "fitnet": Recipe("FitNet", FitNet, "maps", "b h w", "initialise"),
    "at": Recipe("AT", attention_transfer, "maps", "b h w", weight=500.0),
    # With a first_rate of 1 FSP diverges on the WRN: no batch norm follows its sensing points.
    "fsp": Recipe("FSP", fsp, "maps", "b c", "initialise", weight=1e-3, first_rate=0.1),
    "dml": Recipe("DML", mutual, "logits", "b c", "mutual"),
    "kd-svd": Recipe("KD-SVD", kd_svd, "maps", "b c", gated=True),
    "kd-svdf": Recipe("KD-SVDF", kd_svdf, "maps", "b c", gated=True),  # as KD-SVD: our choice
    "ft": Recipe("FT", FactorTransfer, "last_map", "b h w", "prepare", weight=500.0),
    "ab": Recipe("AB", ActivationBoundary, "maps", "b h w", "initialise", weight=3e-3),
    "rkd": Recipe("RKD", relational, "embedding", "b"),
}
