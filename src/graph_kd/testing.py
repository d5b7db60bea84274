"""What users call in unit tests of their own teacher and student.

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

from graph_kd._axes import Channels, watch_channels
from graph_kd._features import channel_axis, check_channel_dim
from graph_kd._forward_pass import training_norms
from graph_kd._hooks import FeatureHooks, named_modules, unwrap
from graph_kd._select import Select

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

    Each layer fires once in a forward pass and gives a floating-point tensor, which no in-place
    operation changes afterwards; axis 0 is the batch, and the channels are on the axis where the
    loss looks for them; student and teacher have the same number of channels, point by point; the
    student's features carry gradient to its parameters and none to the teacher's; the teacher's
    batch norms are not in training mode; no hook stays behind.

    The models run twice each, in the mode they are in; the second time on one sample more, to see
    which axis is the batch. A model that refuses it is believed. Buffers (running statistics),
    gradients and the random state are left as they were.

    Args:
        student: The model to be trained.
        teacher: The model it learns from.
        student_layers: Dotted module names in the student, front to back.
        teacher_layers: Dotted module names in the teacher, in the same order.
        sample: A batch as both models take it: a tensor ``b ...``, a mapping of keyword arguments
            or a tuple or list of positional ones. The batch size is that of its first tensor.
        student_select: As in `FeatureHooks`, for the student.
        teacher_select: As in `FeatureHooks`, for the teacher.
        channel_dim: As in `GraphTransferLoss`: the channel axis of maps of rank 4 and 5, one value
            for both models or a pair (teacher, student).
        student_channels: As in `GraphTransferLoss`: the student's channels, one count per layer,
            where they are not the teacher's.

    Raises:
        AssertionError: a check failed; the message names the layer.
    """
    size = _batch_size(sample)
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
    ours = _Side("Student", student, student_layers, student_select, of_student)
    theirs = _Side("Teacher", teacher, teacher_layers, teacher_select, of_teacher)
    with _undisturbed(student, sample), _undisturbed(teacher, sample):
        student_features = ours.run(sample)
        teacher_features = theirs.run(sample)
        for side, features in ((ours, student_features), (theirs, teacher_features)):
            for layer, feature in zip(side.layers, features, strict=True):
                side.check_axes(layer, feature, size)
        for point, (student_map, teacher_map) in enumerate(
            zip(student_features, teacher_features, strict=True)
        ):
            layer, teacher_layer = student_layers[point], teacher_layers[point]
            wanted = None if student_channels is None else student_channels[point]
            _check_channels(ours, layer, student_map, theirs, teacher_layer, teacher_map, wanted)
            if not _reaches(student_map, student, layer):
                raise AssertionError(
                    f"Student layer {layer!r} carries no gradient to the student's parameters. "
                    "Look for `detach`, `no_grad` or frozen parameters in front of it."
                )
            if _reaches(student_map, teacher, layer):
                raise AssertionError(
                    f"Student layer {layer!r} carries gradient to the teacher's parameters: the "
                    "two models share them. Give the student parameters of its own."
                )
        ours.check_batch_axis(sample, size)
        theirs.check_batch_axis(sample, size)
    for name in training_norms(teacher_features):
        raise AssertionError(
            f"Teacher: its norm {name!r} is in training mode, so its features depend on the "
            "batch and its running statistics move. Call `teacher.eval()` first."
        )


class _Side:
    """One of the two models, and how its features are read."""

    def __init__(
        self, role: str, model: nn.Module, layers: Sequence[str], select: Any, axis: int | None
    ) -> None:
        self.role, self.model, self.layers = role, model, layers
        self.select, self.axis = select, axis
        self.where = f"{role}, layers {list(layers)}"
        self.argument = f"{role.lower()}_select"
        self.channels: dict[str, Channels] = {}
        with _assertions(self.where):
            unwrap(model)

    def run(self, sample: Any) -> list[Tensor]:
        """Return the features, each a floating-point tensor."""
        attached = _hook_count(self.model)
        with _assertions(self.where, self.role):
            self.hooks = FeatureHooks(self.model, self.layers, select=self.select)
            modules = named_modules(unwrap(self.model))
            with self.hooks, watch_channels(modules, self.layers) as self.channels:
                _call(self.model, sample)
                features = self.hooks.features
        if _hook_count(self.model) != attached:
            raise AssertionError(f"{self.where}: a hook stayed attached.")
        for layer, feature in zip(self.layers, features, strict=True):
            if not feature.is_floating_point():
                hint = f" Pass `{self.argument}=lambda output: output.dequantize()`."
                raise AssertionError(
                    f"{self.role} layer {layer!r} must give a floating-point tensor; it gave "
                    f"{feature.dtype}.{hint if feature.is_quantized else ''}"
                )
        return features

    def channel_axis(self, layer: str, feature: Tensor) -> int:
        """Return the axis where the loss looks for the channels."""
        with _assertions(f"{self.role} layer {layer!r}"):
            return channel_axis(feature, "feature", self.axis if feature.ndim > 3 else None)

    def check_axes(self, layer: str, feature: Tensor, size: int) -> None:
        """Assert that axis 0 has the batch's size and no module contradicts the channel axis."""
        where, shape = f"{self.role} layer {layer!r}", tuple(feature.shape)
        if feature.ndim not in (2, 3, 4, 5) or shape[0] != size:
            second = feature.ndim > 2 and shape[1] == size
            raise AssertionError(
                f"{where} must give axes b c h w, b c t h w, b n c or b c with b = {size}, "
                f"as the sample; it gave shape {shape}.{self.batch_first() if second else ''}"
            )
        axis = self.channel_axis(layer, feature)
        select = self.select
        if isinstance(select, list | tuple):
            select = select[list(self.layers).index(layer)]
        found = None if callable(select) else self.channels.get(layer)
        there = None if found is None else found.axis_in(shape)
        if found is not None and there is not None and there != axis:
            raise AssertionError(
                f"{where} gave shape {shape}: axis {axis}, where the loss looks for the channels, "
                f"has {shape[axis]} entries, but {type(found.module).__name__} gives {found.count} "
                f"channels, on axis {there}. {self.fix(feature, there)}"
            )

    def check_batch_axis(self, sample: Any, size: int) -> None:
        """Assert that axis 0 grows with the batch."""
        try:
            with torch.no_grad():
                features = self.run(_one_more(sample, size))
        except Exception:  # noqa: BLE001 # a model may be made for one batch size
            return
        for layer, feature in zip(self.layers, features, strict=True):
            if len(feature) != size + 1:
                raise AssertionError(
                    f"{self.role} layer {layer!r} must have the batch on axis 0; with {size} "
                    f"samples and with {size + 1} it gave {len(feature)} entries there."
                    f"{self.batch_first()}"
                )

    def batch_first(self) -> str:
        """Say what to do if axis 0 is a sequence or time."""
        return (
            " If the sequence comes first, build the layer with `batch_first=True`, or pass "
            f"`{self.argument}=lambda output: output.transpose(0, 1)`."
        )

    def fix(self, feature: Tensor, axis: int) -> str:
        """Say how to have the channels read from ``axis``."""
        if feature.ndim == 3:
            return (
                "Maps of rank 3 are read as tokens b n c: pass "
                f"`{self.argument}=lambda output: output.transpose(1, 2)`."
            )
        value = -1 if axis == feature.ndim - 1 else axis
        pair = f"({value}, None)" if self.role == "Teacher" else f"(None, {value})"
        return f"Pass `channel_dim={value}`, or for the {self.role.lower()} alone `{pair}`."


def _check_channels(
    ours: _Side,
    layer: str,
    student_map: Tensor,
    theirs: _Side,
    teacher_layer: str,
    teacher_map: Tensor,
    wanted: int | None,
) -> None:
    count = student_map.shape[ours.channel_axis(layer, student_map)]
    teachers = teacher_map.shape[theirs.channel_axis(teacher_layer, teacher_map)]
    has = f"Student layer {layer!r} has {count} channels (shape {tuple(student_map.shape)})"
    if wanted is not None and count != wanted:
        raise AssertionError(f"{has}, but student_channels says {wanted}.")
    if wanted is None and count != teachers:
        hints = [
            f" If the {side.role.lower()}'s channels are on axis {axis}: {side.fix(feature, axis)}"
            for side, feature, number in (
                (ours, student_map, teachers),
                (theirs, teacher_map, count),
            )
            for axis in range(1, feature.ndim)
            if feature.shape[axis] == number
        ]
        raise AssertionError(
            f"{has}, teacher layer {teacher_layer!r} has {teachers} (shape "
            f"{tuple(teacher_map.shape)}); a sensing point needs the same number, or "
            f"`student_channels` here and in GraphTransferLoss.{''.join(hints)}"
        )


def _tensors(sample: Any) -> list[Tensor]:
    if isinstance(sample, Tensor):
        return [sample]
    values = sample.values() if isinstance(sample, Mapping) else sample
    known = isinstance(sample, Mapping | list | tuple)
    return [v for v in values if isinstance(v, Tensor)] if known else []


def _batch_size(sample: Any) -> int:
    tensors = _tensors(sample)
    if not tensors or tensors[0].ndim == 0:
        raise AssertionError(
            "sample must be a tensor with a batch axis, or a mapping, tuple or list that holds "
            f"one; got {type(sample).__name__}."
        )
    # Position ids and alike may come once for the whole batch.
    return next((len(t) for t in tensors if t.ndim and len(t) > 1), len(tensors[0]))


def _call(model: nn.Module, sample: Any) -> None:
    if isinstance(sample, Mapping):
        model(**sample)
    elif isinstance(sample, list | tuple):
        model(*sample)
    else:
        model(sample)


def _one_more(sample: Any, size: int) -> Any:
    """Return the sample with its first entry again at the end."""

    def more(value: Any) -> Any:
        batched = isinstance(value, Tensor) and value.ndim > 0 and len(value) == size
        return torch.cat([value, value[:1]]) if batched else value

    if isinstance(sample, Mapping):
        return {name: more(value) for name, value in sample.items()}
    return [more(value) for value in sample] if isinstance(sample, list | tuple) else more(sample)


@contextmanager
def _undisturbed(model: nn.Module, sample: Any) -> Iterator[None]:
    """Put buffers and random state back on leaving, when no gradient needs the buffers any more."""
    # A scripted part can not take other buffers, so it needs none back.
    plain = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    before = [(module, dict(module._buffers)) for module in plain]
    content = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {tensor.device for tensor in _tensors(sample) if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices), torch.enable_grad():
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
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        message = str(error).replace("`select=", f"`{role.lower()}_select=") if role else str(error)
        if role and message.startswith("Layer "):
            raise AssertionError(f"{role} l{message[1:]}") from error
        raise AssertionError(f"{where}: {message}") from error


def _hook_count(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in unwrap(model).modules()
    )


def _reaches(feature: Tensor, model: nn.Module, layer: str) -> bool:
    params = [p for p in model.parameters() if p.requires_grad]
    if not feature.requires_grad or not params:
        return False
    with _assertions(f"Student layer {layer!r}"):
        gradients = torch.autograd.grad(feature.sum(), params, retain_graph=True, allow_unused=True)
    return any(gradient is not None for gradient in gradients)
