"""A make-believe accelerator: what would a GPU be asked to do, and how often would the host wait for it?

    from second_device import SecondDevice
    with SecondDevice() as device:              # registers the device type "sim"
        model.to("sim"); x = torch.randn(8, 3, 32, 32, device="sim")
        with device.counting() as seen:
            model(x).sum().backward()
    seen.launches, seen.waits, seen.by_op, seen.where

Tensors on "sim" keep their data on the CPU, but say that they are elsewhere. So:
- code that mixes devices fails here as it would on CUDA (scalars aside, as there);
- every operation that would start a kernel is counted as one launch, views as none. Some launches start several
  kernels on a GPU (sort, eigh), so the count is a floor;
- every operation that makes the host read the device's memory (`item`, `bool`, `nonzero`, a copy to the CPU, the
  error checks of `linalg.eigh`) is counted as a wait, with the line that caused it. A step without waits is one that
  a CUDA graph can hold.
It says nothing about time. Forward passes of a model count as much as the code under test: subtract a run without it.

Needs torch >= 2.10 (python backends of PrivateUse1, an experimental interface).
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

NAME = "sim"
aten = torch.ops.aten

WAITS = {  # the host reads what the device wrote
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten._linalg_eigh.default,
    aten._linalg_svd.default,
    aten.linalg_eig.default,
    aten._linalg_eigvals.default,
    aten._linalg_check_errors.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}
FREE = {  # no kernel
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten._reshape_alias.default,
    aten.sym_size.int,
    aten.is_same_size.default,
    aten.resize_.default,
    aten.set_.source_Tensor,
    aten._version.default,
    aten._has_compatible_shallow_copy_type.default,
    aten._unsafe_view.default,
}
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


class SimTensor(torch.Tensor):
    """A tensor that says it is on the device "sim"; its data are `held`, on the CPU."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> SimTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def tolist(self):
        SecondDevice.active._wait("tolist")
        return self.held.tolist()

    def __repr__(self, **_) -> str:
        return f"sim({self.held!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if SecondDevice.active is None:
            raise RuntimeError("a tensor on `sim` is used outside `with SecondDevice()`")
        return SecondDevice.active.run(func, args, kwargs or {})


@dataclass
class Seen:
    launches: int = 0
    waits: int = 0
    by_op: Counter = field(default_factory=Counter)
    where: Counter = field(default_factory=Counter)  # of waits


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device=0):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=0):
        torch.set_rng_state(state)

    def synchronize(self, device=None):
        SecondDevice.active._wait("synchronize")


class _Again(TorchDispatchMode):
    """The device, inside an operator; a mode is off while it handles one."""

    def __init__(self, device: SecondDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.device.run(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    active: SecondDevice | None = None
    _registered = False

    def __init__(self) -> None:
        super().__init__()
        self._counts: list[Seen] = []
        if not SecondDevice._registered:
            backend_registration._setup_privateuseone_for_python_backend(
                NAME, backend_module=_Module()
            )
            SecondDevice._registered = True

    def __enter__(self):
        SecondDevice.active = self
        super().__enter__()
        return self

    def __exit__(self, *error):
        super().__exit__(*error)
        SecondDevice.active = None

    @contextlib.contextmanager
    def counting(self):
        seen = Seen()
        self._counts.append(seen)
        try:
            yield seen
        finally:
            self._counts.remove(seen)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        flat = torch.utils._pytree.arg_tree_leaves(*args, **kwargs)
        ours = [a for a in flat if isinstance(a, SimTensor)]
        asked = [a for a in flat if isinstance(a, torch.device) and a.type == NAME]
        if not ours and not asked:
            return func(*args, **kwargs)
        if (
            func.namespace not in ("aten", "prims", "prim")
            and func._schema.name in torch._library.custom_ops.OPDEFS
        ):
            with _Again(self):  # an operator written in python: count what it does
                return torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        if func not in WAITS and func._can_decompose():
            with _Again(self):  # made of other operators
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self._refuse_mixing(func, flat, ours)
        target = kwargs.get("device")
        to_host = (
            func is aten._to_copy.default
            and target is not None
            and torch.device(target).type == "cpu"
        )
        from_host = ours and func is aten.copy_.default and not isinstance(args[0], SimTensor)
        if to_host or from_host:
            self._wait(str(func))
        elif func in WAITS:
            self._wait(str(func))
            if func is not aten._local_scalar_dense.default:
                self._launch(func)
        elif func in INDEXING and any(
            isinstance(a, SimTensor) and a.dtype == torch.bool for a in flat[1:]
        ):
            self._wait(f"{func} by a mask")
            self._launch(func)
        elif func not in FREE and not func.is_view:
            self._launch(func)
        held = {id(t.held): t for t in ours}

        def down(a):
            if isinstance(a, SimTensor):
                return a.held
            return torch.device("cpu") if isinstance(a, torch.device) and a.type == NAME else a

        def up(a):
            if not isinstance(a, torch.Tensor) or isinstance(a, SimTensor):
                return a
            return held.get(id(a)) if id(a) in held else SimTensor(a)

        result = func(*tree_map(down, args), **tree_map(down, kwargs))
        if to_host or from_host or func in (aten._local_scalar_dense.default,):
            return result
        return tree_map(up, result)

    def _refuse_mixing(self, func, flat, ours):
        if func in (aten.copy_.default, aten._to_copy.default) or not ours:
            return
        for a in flat:
            foreign = isinstance(a, torch.Tensor) and not isinstance(a, SimTensor)
            if foreign and a.ndim > 0 and not (func in INDEXING and isinstance(flat[0], SimTensor)):
                raise RuntimeError(
                    f"{func}: expected all tensors on one device, found {NAME} and {a.device}"
                )

    def _launch(self, func):
        for seen in self._counts:
            seen.launches += 1
            seen.by_op[str(func)] += 1

    def _wait(self, what):
        if not self._counts:
            return
        stack = [
            f
            for f in traceback.extract_stack()
            if "/torch/" not in f.filename and f.filename != __file__
        ]
        place = (
            f"{what} at {stack[-1].filename.rsplit('/', 1)[-1]}:{stack[-1].lineno} {stack[-1].name}"
            if stack
            else what
        )
        for seen in self._counts:
            seen.waits += 1
            seen.where[place] += 1
