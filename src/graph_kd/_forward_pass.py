"""Which forward pass features came from, and whether a loss may use them again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["ForwardPass", "HookedFeatures", "record_estimator_use", "record_use"]

# The id of the model and the names of the hooked layers. Hooks that are placed anew for every step
# are one source.
Source = tuple[int, tuple[str, ...]]


class ForwardPass:
    """One forward pass of a hooked model, and what its features were used for.

    It holds no features, neither its own nor those they were used with.
    """

    def __init__(self, source: Source, batch_norms: tuple[tuple[str, nn.Module], ...]) -> None:
        self.source = source
        self.batch_norms = batch_norms
        self.copy_ran = False
        self.used_for_estimators = False
        self.student_tensors: dict[Source | None, weakref.ref[Tensor]] = {}
        self.teacher_passes: dict[Source, weakref.ref[ForwardPass]] = {}


class HookedFeatures(list[Tensor]):
    """The features of one forward pass: a list that knows the pass.

    Copies and slices are plain lists.
    """

    def __init__(self, features: Iterable[Tensor], forward_pass: ForwardPass) -> None:
        super().__init__(features)
        self.forward_pass = forward_pass
        self.used_with: set[Source | None] = set()
        self.used_for_estimators = False

    def __reduce__(self) -> tuple[type[list[Tensor]], tuple[list[Tensor]]]:
        return list, (list(self),)


# Without it, a subclass of list is one opaque leaf to torch.func and torch.export.
pytree.register_pytree_node(
    HookedFeatures, lambda features: (list(features), None), lambda features, _: list(features)
)


def record_use(student: Any, teacher: Any) -> None:
    """Record a use of both features for one loss; raise if one of them is stale.

    A list that was used before may be used again: the user holds it on purpose. A list read anew
    must come from a new forward pass, unless it is used with the same partner, or with that of
    another model.
    """
    first = _first_tensor(student)
    if not isinstance(teacher, HookedFeatures) or first is None:
        return
    teacher_pass = teacher.forward_pass
    of_student = student.forward_pass.source if isinstance(student, HookedFeatures) else None
    before = teacher_pass.student_tensors.get(of_student)
    if before is not None and before() is not first and of_student not in teacher.used_with:
        raise _stale("teacher", teacher_pass, "with features of another step of the student")
    if isinstance(student, HookedFeatures):
        student_pass, of_teacher = student.forward_pass, teacher_pass.source
        earlier = student_pass.teacher_passes.get(of_teacher)
        if (
            earlier is not None
            and earlier() is not teacher_pass
            and of_teacher not in student.used_with
        ):
            raise _stale("student", student_pass, "with features of another step of the teacher")
        student_pass.teacher_passes[of_teacher] = weakref.ref(teacher_pass)
        student.used_with.add(of_teacher)
    teacher_pass.student_tensors[of_student] = weakref.ref(first)
    teacher.used_with.add(of_student)


def record_estimator_use(teacher: Any) -> None:
    """Record a use for the training of attention heads; raise if a copy of the model ran since."""
    if not isinstance(teacher, HookedFeatures):
        return
    record = teacher.forward_pass
    if record.used_for_estimators and record.copy_ran and not teacher.used_for_estimators:
        raise _stale("teacher", record, "for the attention heads")
    record.used_for_estimators = teacher.used_for_estimators = True


def _first_tensor(features: Any) -> Tensor | None:
    """Return the first map; None for what the loss refuses, and for an iterator, which ends."""
    if isinstance(features, Mapping):
        features = list(features.values())
    first = features[0] if isinstance(features, list | tuple) and features else None
    return first if isinstance(first, Tensor) else None


def _stale(role: str, record: ForwardPass, how: str) -> RuntimeError:
    _, layers = record.source
    return RuntimeError(
        f"The {role}'s features (layers {list(layers)}) were used before, {how}: the hooked model "
        "did not run since. Probably a copy of it runs (a deepcopy, an AveragedModel, a traced, "
        "quantised or half-precision copy): place the hooks on the model that runs. To use one "
        "batch's features again on purpose, read `features` once and pass that list each time."
    )
