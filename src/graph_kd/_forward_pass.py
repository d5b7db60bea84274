"""Which forward pass features came from, and whether a loss may use them again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["ForwardPass", "check_fresh", "check_learns", "training_norms"]

# The model and the names of the hooked layers. Hooks that are placed anew for every step are one
# source. Weak references stay different where a new model takes the id of one that is gone.
Source = tuple[weakref.ref[nn.Module], tuple[str, ...]]

# Of tensors that hooks gave, in whatever list they arrive.
_PASS_OF: MutableMapping[Tensor, ForwardPass] = WeakTensorKeyDictionary()


class Use(NamedTuple):
    """Features used with those of a partner; how often they had been read, also after copies."""

    reads: int
    reads_after_copies: int
    partner: weakref.ref[Any]


class ForwardPass:
    """One forward pass of a hooked model, and what its features were used for.

    It holds no features, neither its own nor those they were used with.
    """

    def __init__(self, source: Source, norms: dict[str, nn.Module]) -> None:
        self.source = source
        self.norms = norms
        self.reads = self.reads_after_copies = 0
        self.uses: dict[Source | None, Use] = {}

    def read(self, features: Iterable[Tensor], copy_ran: bool) -> None:
        """Note that features are read, and whether a copy of the model ran since they last were."""
        self.reads_after_copies += copy_ran
        if self.reads_after_copies > 1:  # a copy runs, features are read, and so on: a loop
            raise self.stale("hooked model")
        self.reads += 1
        for feature in features:
            _PASS_OF[feature] = self

    def refuse_stale(self, role: str, partner: ForwardPass | Tensor) -> None:
        """Refuse features that are read anew for a second step."""
        before = self.uses.get(getattr(partner, "source", None))
        if before is not None and self.reads > before.reads:
            copy_ran = self.reads_after_copies > before.reads_after_copies
            if (role == "teacher" and copy_ran) or before.partner() is not partner:
                raise self.stale(role)

    def use(self, partner: ForwardPass | Tensor) -> None:
        """Note a use for one loss."""
        source = getattr(partner, "source", None)
        self.uses[source] = Use(self.reads, self.reads_after_copies, weakref.ref(partner))

    def stale(self, role: str) -> RuntimeError:
        """Return the error for features of an earlier step."""
        _, layers = self.source
        return RuntimeError(
            f"The {role}'s features (layers {list(layers)}) are those of an earlier step: the "
            "hooked model did not run since. Call it on each batch. If a copy of it runs (a "
            "deepcopy, an AveragedModel, a traced, quantised or half-precision copy), place the "
            "hooks on that copy. To use one batch again, read `features` once and pass that list."
        )


def check_fresh(student: list[Any], teacher: list[Any]) -> None:
    """Raise if hooked features serve a second training step without a new forward pass.

    A list that was used before may be used again: the user holds it on purpose. Features read anew
    must come from a new forward pass, unless they are used with the same partner, or with that of
    another model. A teacher that trains its heads is its own partner: any number of steps on one
    batch may be meant, until a copy of it runs. A loss of two networks without gradient is no step.
    """
    if torch.compiler.is_compiling():
        return
    ours, theirs = _pass_of(student), _pass_of(teacher)
    if theirs is None or not (torch.is_grad_enabled() or ours is theirs):
        return
    partner = student[0] if ours is None else ours
    theirs.refuse_stale("teacher", partner)
    if ours is not None:
        ours.refuse_stale("student", theirs)
        ours.use(theirs)
    theirs.use(partner)


def check_learns(features: list[Any]) -> None:
    """Refuse hooked features without gradient, of a model that has parameters to train.

    With own heads, which do get a gradient, nothing else would tell that the student does not.
    """
    found = None if torch.compiler.is_compiling() else _pass_of(features)
    if found is None or not torch.is_grad_enabled() or any(f.requires_grad for f in features):
        return
    of_model, layers = found.source
    model = of_model()
    if model is not None and any(param.requires_grad for param in model.parameters()):
        raise RuntimeError(
            f"The student's features (layers {list(layers)}) carry no gradient: its last forward "
            "pass ran without (in an evaluation, say). Run it on the batch again before the "
            "transfer loss. If the loss is for a log, compute it under `torch.no_grad()`."
        )


def training_norms(features: Iterable[Any]) -> list[str]:
    """Name the norms of the hooked model whose running statistics move, now.

    They are collected when the hooks are placed; their mode is looked up in this call, so call it
    right after the forward pass. Features that no hooks gave have none.
    """
    found = _pass_of(features)
    return [] if found is None else [name for name, norm in found.norms.items() if norm.training]


def _pass_of(features: Iterable[Any]) -> ForwardPass | None:
    passes = (_PASS_OF.get(f) for f in features if isinstance(f, Tensor))
    return next((found for found in passes if found is not None), None)
