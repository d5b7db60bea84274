"""Checks that every module shares: each error names the argument, the rule and what came."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_bool",
    "check_choice",
    "check_count",
    "check_finite",
    "check_floating",
    "check_positive",
]


def check_bool(name: str, value: Any) -> bool:
    """Return ``value`` if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False; got {value!r}.")
    return value


def check_count(name: str, value: Any, minimum: int = 1) -> int:
    """Return ``value`` if it is an int of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an int; got {value!r} ({type(value).__name__}).")
    if value < minimum:
        raise ValueError(f"`{name}` must be an int ≥ {minimum}; got {value}.")
    return int(value)


def check_positive(name: str, value: Any, *, or_zero: bool = False) -> float:
    """Return ``value`` as a float if it is a finite number above zero, or zero where it may be."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number; got {value!r} ({type(value).__name__}).")
    number = float(value)
    if not (0 < number < float("inf") or (or_zero and number == 0)):
        least = "≥ 0" if or_zero else "> 0"
        raise ValueError(f"`{name}` must be a finite number {least}; got {value}.")
    return number


def check_choice(
    name: str, value: Any, choices: tuple[str | None, ...], *, or_callable: bool
) -> None:
    """Accept one of ``choices``, or a callable where the argument takes one."""
    if value in choices or (or_callable and callable(value) and not isinstance(value, type)):
        return
    listed = ", ".join(map(repr, choices)) + " or a callable" * or_callable
    raise ValueError(f"`{name}` must be one of {listed}; got {value!r}.")


def check_floating(name: str, value: Any) -> Tensor:
    """Return ``value`` if it is a dense floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor; got {type(value).__name__}.")
    if value.is_nested or value.layout != torch.strided:  # most operations do not take them
        nested = value.is_nested
        convert = "to_padded_tensor(0.0)" if nested else "to_dense()"
        raise TypeError(
            f"`{name}` must be a dense tensor; got a {'nested' if nested else 'sparse'} one. "
            f"Convert it, with hooks by `select=lambda output: output.{convert}`."
            + " nn.TransformerEncoder(enable_nested_tensor=False) gives dense ones."
            * nested
        )
    if not torch.is_floating_point(value):
        convert = "dequantize" if value.is_quantized else "abs" if value.is_complex() else "float"
        raise TypeError(
            f"`{name}` must be a floating-point tensor; got {value.dtype}. "
            f"Convert it with `.{convert}()`."
        )
    return value


def check_finite(rows_bnc: Tensor, name: str) -> None:
    """Refuse NaN and infinity; waits for the device."""
    finite = torch.isfinite(rows_bnc).all(dim=2).all(dim=1)
    if not bool(finite.all()):
        samples = torch.nonzero(~finite).flatten().tolist()
        raise ValueError(
            f"`{name}` must be finite; got NaN or infinity in {len(samples)} of "
            f"{len(finite)} samples (the first is {samples[0]}). Look for the layer or the "
            f"step that diverged, or lower the learning rate."
        )
