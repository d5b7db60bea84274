"""A check of sensing points, for unit tests.

def test_my_sensing_points():
    assert_feature_hooks(
        student, teacher, ["stage1", "stage2"], ["block1", "block2"], torch.randn(4, 3, 32, 32)
    )
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from graph_kd._axes import Channels, watch_channels
from graph_kd._checks import check_count, check_floating
from graph_kd._features import channel_axis, check_channel_dim
from graph_kd._forward_pass import training_norms
from graph_kd._hooks import FeatureHooks, named_modules, unwrap
from graph_kd._select import Select, check_select

__all__ = ["assert_feature_hooks"]


def assert_feature_hooks(
    student: nn.Module,
    teacher: nn.Module,
    student_layers: Sequence[str],
    teacher_layers: Sequence[str],
    sample: Any,
    *,
    student_select: Select | Sequence[Select] = None,
    teacher_select: Select | Sequence[Select] = None,
    channel_dim: int | tuple[int | None, int | None] | None = None,
    student_channels: Sequence[int] | None = None,
) -> None:
    """Assert that the layers can serve as sensing points of a distillation.

    Checked: each layer runs once in a forward pass, in the order of the list, and gives a
    floating-point tensor, which no in-place operation changes afterwards; axis 0 is the batch, and
    the channels are on the axis where the loss looks for them; student and teacher have equal
    channels, or ``student_channels``, point by point; the student's features carry gradient to its
    own parameters, not to the teacher's; the teacher's batch norms are not in training mode; the
    forward pass adds no hook that stays.

    The models run twice each, in the mode they are in; the second time on one sample more, to see
    which axis is the batch. If a model raises on it, that check is left out. Buffers (running
    statistics), gradients and torch's random state are left as they were.

    Args:
        student: The model to be trained.
        teacher: The model it learns from.
        student_layers: Dotted module names in the student, front to back.
        teacher_layers: Dotted module names in the teacher, in the same order.
        sample: A batch as both models take it: a tensor ``b ...``, a mapping of keyword arguments
            or a tuple or list of positional ones. The batch is axis 0 of the first tensor that
            has more than one row.
        student_select: As in `FeatureHooks`, for the student. The channel axis of what a function
            selects is not checked.
        teacher_select: As in `FeatureHooks`, for the teacher.
        channel_dim: As in `GraphTransferLoss`: the channel axis of maps of rank 4 and 5, one value
            for both models or a pair (teacher, student).
        student_channels: As in `GraphTransferLoss`: the student's channels, one count per layer,
            if they differ from the teacher's.

    Raises:
        AssertionError: a check failed; the message names the layer.
    """
    inputs = _Inputs(sample)
    lists: dict[str, Any] = {"student_layers": student_layers, "teacher_layers": teacher_layers}
    lists |= {} if student_channels is None else {"student_channels": student_channels}
    for name, given in lists.items():
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise AssertionError(f"{name} must be a list, one entry per layer; got {given!r}.")
    if len(student_layers) != len(teacher_layers):
        raise AssertionError(
            f"student_layers and teacher_layers must pair up; got {len(student_layers)} "
            f"({list(student_layers)}) and {len(teacher_layers)} ({list(teacher_layers)})."
        )
    if student_channels is not None and len(student_channels) != len(student_layers):
        raise AssertionError(
            f"student_channels must have one count per layer; got {len(student_channels)} for "
            f"{len(student_layers)} layers."
        )
    with _assertions("Arguments"):
        of_teacher, of_student = check_channel_dim(channel_dim)
        for n, count in enumerate(student_channels or ()):
            check_count(f"student_channels[{n}]", count)
    ours = _Side("Student", student, student_layers, student_select, of_student)
    theirs = _Side("Teacher", teacher, teacher_layers, teacher_select, of_teacher)
    with _undisturbed(student, inputs), _undisturbed(teacher, inputs):
        pairs = list(zip(ours.read(inputs), theirs.read(inputs), strict=True))
        for n, (point, of_theirs) in enumerate(pairs):
            wanted = None if student_channels is None else student_channels[n]
            _check_channels(point, of_theirs, wanted)
            if not point.reaches(student):
                raise AssertionError(
                    f"{point.where} carries no gradient to the student's parameters. "
                    "Look for `detach`, `no_grad` or frozen parameters in front of it."
                )
            if point.reaches(teacher):
                raise AssertionError(
                    f"{point.where} carries gradient to the teacher's parameters: the "
                    "two models share them. Give the student parameters of its own."
                )
        ours.check_batch_axis(inputs)
        theirs.check_batch_axis(inputs)
    for name in training_norms(of_theirs.feature for _, of_theirs in pairs):
        raise AssertionError(
            f"Teacher: its norm {name!r} is in training mode, so its features depend on the "
            "batch and its running statistics move. Call `teacher.eval()` first."
        )


class _Inputs:
    """A sample, as the arguments of a model."""

    def __init__(self, sample: Any) -> None:
        several = isinstance(sample, list | tuple)
        self.named = dict(sample) if isinstance(sample, Mapping) else {}
        self.listed = list(sample) if several else [] if self.named else [sample]
        values = [*self.listed, *self.named.values()]
        tensors = [v for v in values if isinstance(v, Tensor) and v.ndim and len(v)]
        if not tensors:
            raise AssertionError(
                "sample must be a tensor with a batch axis that is not empty, or a mapping, tuple "
                f"or list that holds one; got {type(sample).__name__}."
            )
        # Position ids and alike may come once for the whole batch.
        self.size = next((len(t) for t in tensors if len(t) > 1), len(tensors[0]))
        self.gpus = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}

    def run(self, model: nn.Module) -> None:
        """Call the model."""
        try:
            model(*self.listed, **self.named)
        except Exception as error:
            advice = "Does the sample have a batch axis, and the model's dtype and device?"
            if len(self.listed) > 1 and "positional argument" in str(error):
                advice = (
                    f"The {len(self.listed)} entries of `sample` are its arguments; of a batch "
                    "(images, labels) pass the images alone."
                )
            told = f"{type(error).__name__}: {error}".rstrip(": ")
            raise RuntimeError(f"the forward pass raised {told}. {advice}") from error

    def one_more(self) -> _Inputs:
        """Return the sample with its first entry again at the end."""

        def more(value: Any) -> Any:
            batched = isinstance(value, Tensor) and value.shape[:1] == (self.size,)
            return torch.cat([value, value[:1]]) if batched else value

        named = {name: more(value) for name, value in self.named.items()}
        return _Inputs(named or [more(value) for value in self.listed])


class _Side:
    """One of the two models, and how its features are read."""

    def __init__(
        self, role: str, model: nn.Module, layers: Sequence[str], select: Any, axis: int | None
    ) -> None:
        self.role, self.model, self.layers = role, model, layers
        self.select, self.axis = select, axis
        self.where = f"{role}, layers {list(layers)}"
        self.channels: dict[str, Channels | None] = {}
        with _assertions(self.where):
            self.plain = unwrap(model)
        if any(map(is_lazy, [*model.parameters(), *model.buffers()])):
            raise AssertionError(
                f"{self.where}: the model has lazy layers without shapes. Run it on a batch first."
            )

    def run(self, inputs: _Inputs) -> list[Tensor]:
        """Return the features of one forward pass, which leaves no hooks behind."""
        attached = self.hook_count()
        with _assertions(self.where, self.role):
            hooks = FeatureHooks(self.model, self.layers, select=self.select)
            modules = named_modules(self.plain)
            with hooks, watch_channels(modules, self.layers) as self.channels:
                inputs.run(self.model)
                features = hooks.features
        if list(self.channels) != list(hooks.layers):
            raise AssertionError(
                f"{self.where}: list the layers front to back, as they run: {list(self.channels)}."
            )
        if self.hook_count() != attached:
            raise AssertionError(
                f"{self.where}: a hook stayed attached. The forward pass added it; remove it there."
            )
        return features

    def read(self, inputs: _Inputs) -> list[_Point]:
        """Return the features with their channel axes, which no module contradicts."""
        features = self.run(inputs)
        selects = check_select(self.select, self.layers)
        points = []
        for layer, feature, select in zip(self.layers, features, selects, strict=True):
            points.append(_Point(self, layer, feature, inputs.size))
            found = self.channels[layer]
            if not callable(select) and found is not None:
                points[-1].check_channel_axis(found)
        return points

    def check_batch_axis(self, inputs: _Inputs) -> None:
        """Assert that axis 0 grows with the batch."""
        try:
            with torch.no_grad():
                features = self.run(inputs.one_more())
        except Exception:  # noqa: BLE001 # a model may be made for one batch size
            return
        for layer, feature in zip(self.layers, features, strict=True):
            if len(feature) != inputs.size + 1:
                raise AssertionError(
                    f"{self.role} layer {layer!r} must have the batch on axis 0; with "
                    f"{inputs.size} samples and with {inputs.size + 1} it gave {len(feature)} "
                    f"entries there.{self.batch_first()}"
                )

    def hook_count(self) -> int:
        kinds = ("_forward_hooks", "_forward_pre_hooks")
        return sum(len(getattr(m, kind)) for m in self.plain.modules() for kind in kinds)

    def selecting(self, method: str) -> str:
        return f"`{self.role.lower()}_select=lambda output: output.{method}`."

    def batch_first(self) -> str:
        """Say what to do if axis 0 is a sequence or time."""
        return (
            " If the sequence comes first, build the layer with `batch_first=True`, or pass "
            + self.selecting("transpose(0, 1)")
        )


class _Point:
    """A feature: floating-point, with the batch on axis 0 and the channels on `axis`."""

    def __init__(self, side: _Side, layer: str, feature: Tensor, size: int) -> None:
        self.side, self.layer, self.feature = side, layer, feature
        self.where = f"{side.role} layer {layer!r}"
        with _assertions(self.where, side.role):
            check_floating("output", feature)
        self.shape = shape = tuple(feature.shape)
        if len(shape) not in (2, 3, 4, 5) or shape[0] != size:
            second = len(shape) > 2 and shape[1] == size
            raise AssertionError(
                f"{self.where} must give axes b c h w, b c t h w, b n c or b c with b = {size}, "
                f"as the sample; it gave shape {shape}.{side.batch_first() if second else ''}"
            )
        with _assertions(self.where):
            self.axis = channel_axis(feature, "feature", side.axis if len(shape) > 3 else None)
        self.channels = shape[self.axis]

    def check_channel_axis(self, found: Channels) -> None:
        """Assert that no module contradicts the channel axis."""
        there = found.axis_in(self.feature)
        if there not in (None, self.axis):
            raise AssertionError(
                f"{self.where} gave shape {self.shape}: axis {self.axis}, where the loss looks for "
                f"the channels, has {self.channels} entries, but {type(found.module).__name__} "
                f"gives {found.count} channels, on axis {there}. {self.fix(there)} If "
                f"axis {self.axis} does hold the channels, skip this check: pass "
                f"`{self.side.role.lower()}_select=lambda output: output`."
            )

    def fix(self, axis: int) -> str:
        """Say how to have the channels read from ``axis``."""
        if len(self.shape) == 3:
            advice = self.side.selecting("transpose(1, 2)")
            return f"Maps of rank 3 are read as tokens b n c: pass {advice}"
        value = -1 if axis == len(self.shape) - 1 else axis
        role = self.side.role
        pair = f"({value}, None)" if role == "Teacher" else f"(None, {value})"
        return f"Pass `channel_dim={value}`, or for the {role.lower()} alone `{pair}`."

    def reaches(self, model: nn.Module) -> bool:
        """Say if gradient flows to parameters of the model."""
        params = [p for p in model.parameters() if p.requires_grad]
        if not self.feature.requires_grad or not params:
            return False
        with _assertions(self.where):
            total = self.feature.sum()
            gradients = torch.autograd.grad(total, params, retain_graph=True, allow_unused=True)
        return any(gradient is not None for gradient in gradients)


def _check_channels(ours: _Point, theirs: _Point, wanted: int | None) -> None:
    has = f"{ours.where} has {ours.channels} channels (shape {ours.shape})"
    if wanted is not None and ours.channels != wanted:
        raise AssertionError(f"{has}; student_channels says {wanted}. Correct one of them.")
    if wanted is None and ours.channels != theirs.channels:
        hints = [
            f" If the {point.side.role.lower()}'s channels are on axis {axis}: {point.fix(axis)}"
            for point, other in ((ours, theirs), (theirs, ours))
            for axis in range(1, len(point.shape))
            if point.shape[axis] == other.channels
        ]
        raise AssertionError(
            f"{has}, teacher layer {theirs.layer!r} has {theirs.channels} (shape "
            f"{theirs.shape}); a sensing point needs the same number, or "
            f"`student_channels` here and in GraphTransferLoss.{''.join(hints)}"
        )


@contextmanager
def _undisturbed(model: nn.Module, inputs: _Inputs) -> Iterator[None]:
    """Put buffers and random state back on leaving, when no gradient needs the buffers any more."""
    # A scripted part can not take other buffers, so it needs none back.
    plain = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    before = [(module, dict(module._buffers)) for module in plain]
    content = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(inputs.gpus), torch.inference_mode(False), torch.enable_grad():
        try:
            yield
        finally:
            for module, buffers in before:
                module._buffers.update(buffers)
            with torch.no_grad():
                for buffer, saved in content:
                    buffer.copy_(saved)


@contextmanager
def _assertions(where: str, role: str = "") -> Iterator[None]:
    """Turn what a wrong model raises into an AssertionError that says where."""
    try:
        yield
    except Exception as error:
        message = str(error) or type(error).__name__
        message = message.replace("`select", f"`{role.lower()}_select") if role else message
        if role and message.startswith("Layer "):
            raise AssertionError(f"{role} l{message[1:]}") from error
        raise AssertionError(f"{where}: {message}") from error
