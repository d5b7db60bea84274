"""Read CIFAR pickles without importing what they name: an untrusted pickle could name anything."""

from __future__ import annotations

import pickle
from typing import Any, ClassVar

__all__ = ["CifarUnpickler", "PickledArray"]


class _PickledDtype:
    """Keep the type code of a pickled dtype; the rest of its state is nothing to single bytes."""

    def __init__(self, code: bytes | str, *_: object) -> None:
        self.code = code.decode() if isinstance(code, bytes) else code

    def __setstate__(self, state: object) -> None: ...


class PickledArray:
    """Keep what a pickle says of an array, so that NumPy never acts on unchecked input."""

    def __init__(self, *_: object) -> None:
        self.__setstate__((1, (), None, False, b""))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, dtype, self.fortran, raw = state
        self.code = getattr(dtype, "code", None)
        self.raw = raw if isinstance(raw, bytes | bytearray) else b""  # a list if it holds objects

    def __repr__(self) -> str:
        return f"dtype {self.code}, shape {self.shape}, {len(self.raw)} bytes"


def _array_from_buffer(raw: object, dtype: object, shape: object, order: object) -> PickledArray:
    array = PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


class CifarUnpickler(pickle.Unpickler):
    """Resolve the few names that a CIFAR pickle needs, to stand-ins, and refuse all others."""

    known: ClassVar[dict[tuple[str, str], Any]] = {
        ("_codecs", "encode"): str.encode,  # how Python 3 writes bytes in protocol 2
        ("numpy", "ndarray"): PickledArray,
        ("numpy", "dtype"): _PickledDtype,
        ("numpy.core.multiarray", "_reconstruct"): PickledArray,
        ("numpy._core.multiarray", "_reconstruct"): PickledArray,
        ("numpy.core.numeric", "_frombuffer"): _array_from_buffer,  # protocol 5
        ("numpy._core.numeric", "_frombuffer"): _array_from_buffer,
    }

    def find_class(self, module: str, name: str) -> object:
        """Return the stand-in of a known name."""
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"{module}.{name}, which no CIFAR pickle needs")
        return self.known[module, name]
