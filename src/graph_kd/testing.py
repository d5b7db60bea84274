"""What users call in unit tests of their own teacher and student.

def test_my_sensing_points():
    assert_feature_hooks(
        student, teacher, ["stage1", "stage2"], ["block1", "block2"], torch.randn(4, 3, 32, 32)
    )
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from graph_kd._features import channel_axis
from graph_kd._hooks import FeatureHooks, unwrap

__all__ = ["assert_feature_hooks"]


def assert_feature_hooks(
    student: nn.Module,
    teacher: nn.Module,
    student_layers: Sequence[str],
    teacher_layers: Sequence[str],
    sample: Tensor,
) -> None:
    """Assert that the layers can serve as sensing points of a distillation.

    Each layer fires once in a forward pass and gives a floating-point tensor with a batch axis;
    student and teacher have the same number of channels, point by point; the student's features
    carry gradient to its parameters and none to the teacher's; no hook stays behind.

    The models run once each, in the mode they are in. Buffers (running statistics), gradients and
    the random state are left as they were.

    Args:
        student: The model to be trained.
        teacher: The model it learns from.
        student_layers: Dotted module names in the student, front to back.
        teacher_layers: Dotted module names in the teacher, in the same order.
        sample: A batch as both models take it, ``b ...``.

    Raises:
        AssertionError: a check failed; the message names the layer.
    """
    if not isinstance(sample, Tensor):
        raise AssertionError(f"sample must be a tensor; got {type(sample).__name__}.")
    if len(student_layers) != len(teacher_layers):
        raise AssertionError(
            f"student_layers and teacher_layers must pair up; got {len(student_layers)} "
            f"({list(student_layers)}) and {len(teacher_layers)} ({list(teacher_layers)})."
        )
    with _assertions(f"Student, layers {list(student_layers)}"):
        unwrap(student)
    with _assertions(f"Teacher, layers {list(teacher_layers)}"):
        unwrap(teacher)
    with _undisturbed(student, sample), _undisturbed(teacher, sample):
        student_features = _run("Student", student, student_layers, sample)
        teacher_features = _run("Teacher", teacher, teacher_layers, sample)
        for point, (student_map, teacher_map) in enumerate(
            zip(student_features, teacher_features, strict=True)
        ):
            layer, teacher_layer = student_layers[point], teacher_layers[point]
            ours, theirs = (m.shape[channel_axis(m, "", None)] for m in (student_map, teacher_map))
            if ours != theirs:
                raise AssertionError(
                    f"Student layer {layer!r} has {ours} channels (shape "
                    f"{tuple(student_map.shape)}), teacher layer {teacher_layer!r} has {theirs} "
                    f"(shape {tuple(teacher_map.shape)}); a sensing point needs the same number."
                )
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


@contextmanager
def _undisturbed(model: nn.Module, sample: Tensor) -> Iterator[None]:
    """Put buffers and random state back on leaving, when no gradient needs the buffers any more."""
    before = [(module, dict(module._buffers)) for module in model.modules()]
    content = [(b, b.clone()) for _, buffers in before for b in buffers.values() if b is not None]
    devices = [sample.device] if sample.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        try:
            yield
        finally:
            for module, buffers in before:
                module._buffers.update(buffers)
            with torch.no_grad():
                for buffer, saved in content:
                    buffer.copy_(saved)


def _run(role: str, model: nn.Module, layers: Sequence[str], sample: Tensor) -> list[Tensor]:
    """Return the model's features at ``layers``, checked one by one."""
    where = f"{role}, layers {list(layers)}"
    with _assertions(where):
        attached = _hook_count(model)
        with FeatureHooks(model, layers) as hooks:
            model(sample)
            features = hooks.features
    if _hook_count(model) != attached:
        raise AssertionError(f"{where}: a hook stayed attached.")
    for layer, feature in zip(layers, features, strict=True):
        where = f"{role} layer {layer!r}"
        if not isinstance(feature, Tensor) or not feature.is_floating_point():
            what = feature.dtype if isinstance(feature, Tensor) else type(feature).__name__
            raise AssertionError(f"{where} must give a floating-point tensor; it gave {what}.")
        if feature.ndim not in (2, 3, 4, 5) or len(feature) != len(sample):
            raise AssertionError(
                f"{where} must give axes b c h w, b c t h w, b n c or b c with b = {len(sample)}, "
                f"as the sample; it gave shape {tuple(feature.shape)}."
            )
    return features


@contextmanager
def _assertions(where: str) -> Iterator[None]:
    """Turn what a wrong model raises into an AssertionError that says where."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise AssertionError(f"{where}: {error}") from error


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
