"""Products of the precision that singular vectors need, whatever other layers may do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

__all__ = ["converted", "has_float64", "whole_float32"]


@cache
def has_float64(device: torch.device) -> bool:
    """Say whether a device has float64; Apple's has not."""
    if device.type in ("cpu", "cuda"):  # an error there has another cause
        return True
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor; what exceeds the range of float16 becomes its largest number."""
    if dtype == torch.float16:
        most = torch.finfo(dtype).max
        tensor = tensor.clamp(-most, most)
    return tensor.to(dtype)


@contextmanager
def whole_float32(device: torch.device) -> Iterator[None]:
    """Multiply in whole float32: no autocast, no TF32."""
    with torch.autocast(device.type, enabled=False):
        backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
        if hasattr(backend, "matmul") and hasattr(backend.matmul, "fp32_precision"):
            before = backend.matmul.fp32_precision
            backend.matmul.fp32_precision = "ieee"
            try:
                yield
            finally:
                backend.matmul.fp32_precision = "none"  # what was inherited stays inherited
                if backend.matmul.fp32_precision != before:
                    backend.matmul.fp32_precision = before
        else:  # before torch 2.9
            old = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(old)
