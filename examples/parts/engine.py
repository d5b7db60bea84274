"""One epoch loop for every phase: batches in, a step of one's own, accuracy out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from parts.augment import Normalize, batches, random_crop_flip
from parts.data import ImageSet
from parts.distributed import is_main, mean_over_processes, share_of, sum_over_processes
from parts.runs import Run, Stateful
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR
from tqdm import tqdm  # type: ignore[import-untyped] # it ships no types

__all__ = ["DivergedError", "Engine", "accuracy", "nesterov", "step_decay"]


def nesterov(params: list[nn.Parameter], learning_rate: float, weight_decay: float = 5e-4) -> SGD:
    """Return the authors' optimizer: SGD with Nesterov momentum 0.9."""
    return SGD(params, lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=weight_decay)


def step_decay(optimizer: Optimizer, epochs: int) -> LRScheduler:
    """Return the authors' schedule: times 0.1 at 30, 60 and 80 % of the epochs.

    Rounded to the nearest epoch, where the program cuts off; alike for a multiple of ten epochs.
    """
    return MultiStepLR(optimizer, [max(1, round(epochs * part)) for part in (0.3, 0.6, 0.8)])


class DivergedError(RuntimeError):
    """The loss of a phase is not finite any more."""

    def __init__(self, phase: str, loss: float) -> None:
        super().__init__(
            f"The loss of phase {phase!r} must stay finite; it was {loss}. Lower the learning rate."
        )


@dataclass(frozen=True)
class Engine:
    """Run epochs over a training set and measure on a test set.

    Args:
        train_set: Images to train on, on the device.
        test_set: Images to measure on, on the device.
        batch_size: Images a step, of all processes.
        seed: Of the order of images and of the augmentation; the same for every phase, so that
            two students see the same batches.
        amp: Type that the models' forward passes run in; None is float32.
        run_of: Where epochs are written, and where an interrupted run goes on.
        normalize: What is made of pixels, for all networks alike.
    """

    train_set: ImageSet
    test_set: ImageSet
    batch_size: int
    seed: int
    amp: torch.dtype | None
    run_of: Run
    normalize: Normalize

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.train_set.images.device

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """Return a loss scaler; it does nothing but in float16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)

    def run(
        self,
        phase: str,
        epochs: int,
        step: Callable[[Tensor, Tensor], dict[str, Tensor]],
        state: dict[str, Stateful],
        *,
        model: nn.Module | None = None,
        scheduler: LRScheduler | None = None,
        before_epoch: Callable[[int], None] | None = None,
    ) -> None:
        """Call ``step(images, labels)``, which returns losses by name, for every batch.

        Each process steps on its share of the batch; the record has the means of an epoch over all
        of them. One named "loss" is among them, and must stay finite. ``state``
        is all that the phase changes and later phases need, but for ``model`` and ``scheduler``.
        With a ``model`` its test accuracy is measured after every epoch, and the last one is the
        phase's result. What an interrupted run has done already is taken over.
        """
        if self.run_of.is_done(phase):
            return
        state = dict(state)
        state |= {} if model is None else {"model": model}
        state |= {} if scheduler is None else {"scheduler": scheduler}
        order = torch.Generator().manual_seed(self.seed)
        done = self.run_of.restore(phase, state, order)
        steps = len(self.train_set.images) // self.batch_size
        with tqdm(
            total=epochs * steps,
            initial=done * steps,
            desc=phase,
            unit="step",
            dynamic_ncols=True,
            disable=not is_main(),
        ) as bar:
            for epoch in range(done, epochs):
                if before_epoch is not None:
                    before_epoch(epoch)
                if model is not None:
                    model.train()
                started, losses = time.perf_counter(), []
                for images, labels in batches(self.train_set, self.batch_size, order):
                    own = share_of(random_crop_flip(images, order))  # drawn for all alike
                    inputs = _channels_last(self.normalize(own))
                    of_step = step(inputs, share_of(labels))
                    losses.append(torch.stack([loss.detach() for loss in of_step.values()]))
                    bar.update()
                means = mean_over_processes(torch.stack(losses).mean(dim=0))
                mean_of = dict(zip(of_step, means.tolist(), strict=True))  # waits for the device
                if not math.isfinite(mean_of["loss"]):
                    raise DivergedError(phase, mean_of["loss"])
                seconds = time.perf_counter() - started
                values: dict[str, float | None] = {"epoch": epoch + 1}
                values |= {k: round(v, 5) if math.isfinite(v) else None for k, v in mean_of.items()}
                if scheduler is not None:
                    values["learning_rate"] = round(float(scheduler.get_last_lr()[0]), 8)
                    scheduler.step()
                if model is not None:
                    values["test_accuracy"] = self.test(model)
                last = epoch + 1 == epochs
                self.run_of.epoch(phase, values, seconds, state, order, last=last)
                bar.set_postfix({k: v for k, v in values.items() if k != "epoch"})

    def test(self, model: nn.Module) -> float:
        """Return the accuracy on the test set, per cent."""
        with self.autocast():
            return accuracy(model, self.test_set, self.normalize)


@torch.no_grad()
def accuracy(model: nn.Module, image_set: ImageSet, normalize: Normalize) -> float:
    """Return the top-1 accuracy in evaluation mode, per cent; the mode is put back."""
    training = model.training
    model.eval()
    own = replace(image_set, images=share_of(image_set.images), labels=share_of(image_set.labels))
    right = torch.stack(
        [
            (model(_channels_last(normalize(images))).argmax(dim=1) == labels).sum()
            for images, labels in batches(own, 512)
        ]
    ).sum()
    model.train(training)
    return round(100 * float(sum_over_processes(right)) / len(image_set.labels), 2)


def _channels_last(images_bchw: Tensor) -> Tensor:
    """Lay images out as the networks are: what convolutions are fastest on, CPU and GPU."""
    return images_bchw.contiguous(memory_format=torch.channels_last)
