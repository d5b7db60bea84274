"""Read features at sensing points, from models that do not return them."""

from __future__ import annotations

import difflib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.jit._script import RecursiveScriptModule
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DataParallel, DistributedDataParallel

from graph_kd._forward_pass import ForwardPass
from graph_kd._select import Select, Untaken, check_select, take

__all__ = ["FeatureHooks", "named_modules", "unwrap"]


class FeatureHooks:
    """Collect the outputs of named layers during a forward pass.

    Outputs are kept, not detached, until the next forward pass of the model begins. Names are those
    of the plain model: `DistributedDataParallel`, `torch.compile` and Fabric wrappers are seen
    through. Place hooks before a compiled model's first call; torch ignores those that come later.
    Running a copy of the model (an average of weights, say) does not change what was collected.

    An in-place operation after a hooked layer, such as ``ReLU(inplace=True)``, changes what was
    collected, so reading it raises: hook the ReLU instead. In compiled code and in inference mode a
    copy of the output is kept, so nothing raises.

    Args:
        model: The model. Call it as ``model(...)``, not ``model.forward(...)``: the call begins a
            pass.
        layers: Dotted module names, as in ``model.named_modules()``, in the order wanted.
        select: What to take from a layer's output that is no tensor: an index, a key, the name of
            an attribute (of a dataclass or namedtuple), or a callable from output to tensor. One
            for all layers, or a list with one per layer. An index or a name leaves an output that
            is a tensor as it is; a callable is applied to every output. Outputs are selected once a
            pass, and their rest is not kept.

    Raises:
        TypeError: ``model`` is a `DataParallel`, a ScriptModule or no module, ``layers`` is a
            single string or names a layer of a ScriptModule, or ``select`` is of another kind. On
            access: a layer gave no tensor, or ``select`` took none from it.
        ValueError: ``layers`` is empty, repeats a name, or holds one the model does not have, or
            ``select`` is a list of another length.
        RuntimeError: on access, a layer did not run, or ran more than once, in the last forward,
            its output was changed in place since, the last forward was a trace by torch.fx or
            torch.export, or the hooks are a copy.

    Example:
        >>> import torch
        >>> from graph_kd import FeatureHooks
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
        >>> with FeatureHooks(model, ["0", "1"]) as hooks:
        ...     output = model(torch.randn(2, 4))
        ...     [tuple(feature.shape) for feature in hooks.features]
        [(2, 8), (2, 8)]
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        *,
        select: Select | Sequence[Select] = None,
    ) -> None:
        plain = unwrap(model)
        modules = named_modules(plain)
        self.layers = _check_layers(layers, modules)
        selects = check_select(select, self.layers)
        self._source = (weakref.ref(plain), self.layers)
        self._norms: dict[str, nn.Module] = {
            name: module
            for name, module in modules.items()
            if isinstance(module, _NormBase) and module.track_running_stats
        }
        self._outputs: dict[str, list[_Output]] = {name: [] for name in self.layers}
        self._pass: ForwardPass | None = None  # made when the features are read
        self._copy_ran = False
        self._handles = [plain.register_forward_pre_hook(_Hook(plain, self._begin))]
        for name, wanted in zip(self.layers, selects, strict=True):
            keep = functools.partial(self._keep, self._outputs[name], wanted)
            self._handles.append(modules[name].register_forward_hook(_Hook(modules[name], keep)))

    @property
    def features(self) -> list[Tensor]:
        """The layers' outputs in the last forward pass, in the order of `layers`.

        They stay readable after `remove`. Reading one network's again for a second training step,
        without a new forward pass, makes `GraphTransferLoss.forward` raise. A list that is kept in
        a variable may be used again. Reading raises if only copies of the model run, step by step:
        place the hooks on the model that trains.
        """
        if not hasattr(self, "_outputs"):
            raise RuntimeError(
                "These hooks are a copy, and belong to no model. Place new ones on the model that "
                "runs: FeatureHooks(model, layers)."
            )
        features = [_feature(name, outputs) for name, outputs in self._outputs.items()]
        if not torch.compiler.is_compiling():
            if self._pass is None:
                self._pass = ForwardPass(self._source, self._norms)
            self._pass.read(features, self._copy_ran)
            self._copy_ran = False
        return features

    def remove(self) -> None:
        """Detach everything from the model; calling it twice does no harm."""
        for handle in self._handles:
            handle.remove()

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.features)

    def __len__(self) -> int:
        return len(self.layers)

    def __enter__(self) -> FeatureHooks:
        return self

    def __exit__(self, *_error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"FeatureHooks(layers={list(self.layers)})"

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles hold no batch, and can remove the idle hooks of the copied model.
        return {"layers": self.layers, "_handles": self._handles}

    # Called by hooks. Compiled code only clears and sets what is kept, and reads nothing.

    def _begin(self, own: bool, _inputs: Any) -> None:
        """Forget the outputs of the pass before, or note the run of a copy."""
        if not own:
            self._copy_ran = True
            return
        for outputs in self._outputs.values():
            outputs.clear()
        self._pass = None
        self._copy_ran = False

    def _keep(
        self, outputs: list[_Output], select: Select, own: bool, _inputs: Any, output: Any
    ) -> None:
        """Keep the output of a layer."""
        compiling = torch.compiler.is_compiling()
        if not own or (not compiling and torch._C._current_graph_task_id() != -1):
            return  # a copy, or a backward pass that computes a checkpoint again
        taken, version = take(output, select), None
        if isinstance(taken, Tensor):
            # Nothing counts the changes here, so no later one may reach what is kept.
            if compiling or taken.is_inference():
                taken = taken.clone()
            else:
                version = taken._version
        outputs.append((taken, version))


# What `take` returned and, where torch counts the changes of a tensor, its count at that time.
_Output = tuple[Any, int | None]


class _Hook:
    """Calls a method of `FeatureHooks`, and tells if the module is its own or that of a copy.

    Copies of the model keep the hook as the same object. A pickle keeps an idle one.
    """

    act: Callable[..., None] | None = None

    def __init__(self, module: nn.Module, act: Callable[..., None]) -> None:
        self.module, self.act = module, act

    def __call__(self, module: nn.Module, *passed: Any) -> None:
        if self.act is not None:
            self.act(module is self.module, *passed)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {}

    @property
    def __name__(self) -> str:
        # torch.jit.script asks for it; others take an AttributeError for an answer.
        raise AttributeError(
            "torch.jit.script can not compile a model with hooks. Call `FeatureHooks.remove()` "
            "first; for a copy, before copying."
        )


def _feature(name: str, kept: list[_Output]) -> Tensor:
    of_trace = (FakeTensor, FunctionalTensor, fx.Proxy)
    traced = any(isinstance(output, of_trace) for output, _ in kept)
    if traced and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"Layer {name!r} gave no values: the last forward pass was a trace (torch.fx, "
            "torch.export or alike). Run the model itself before reading `features`."
        )
    if not kept:
        raise RuntimeError(
            f"Layer {name!r} did not run in the last forward pass. Call the model itself "
            "before reading `features`, and name layers that its forward uses. If the model is "
            "compiled, place the hooks before its first call; torch ignores later ones."
        )
    if len(kept) > 1:
        raise RuntimeError(
            f"Layer {name!r} ran {len(kept)} times since the last forward pass began; a sensing "
            "point must run once. Call `model(...)`, not `model.forward(...)`, which begins no "
            "pass, nor the layer itself. If the layer is used twice, give each use a module of its "
            "own."
        )
    [(output, version)] = kept
    if isinstance(output, Untaken):
        raise output.error(name)
    if version is not None and output._version != version:
        raise RuntimeError(
            f"Layer {name!r} gave a tensor that was changed in place since (by a "
            "`ReLU(inplace=True)` or `x += ...` after it, say). Hook the layer that changes it "
            "instead, or make that operation out of place (`inplace=False`, `x = x + ...`)."
        )
    feature: Tensor = output
    return feature


def unwrap(model: nn.Module) -> nn.Module:
    """Return the plain model inside the wrappers of DDP, `torch.compile` and Fabric."""
    _refuse_parallel(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "`model` must not be a ScriptModule: its layers run in C++, where hooks of Python are "
            "not called. Hook the plain model that was scripted or traced, and run that."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module; got {type(model).__name__}.")
    if isinstance(model, DistributedDataParallel):
        return unwrap(model.module)
    fabric = isinstance(getattr(model, "_original_module", None), nn.Module)
    inside = getattr(model, "_forward_module" if fabric else "_orig_mod", None)
    return unwrap(inside) if isinstance(inside, nn.Module) else model


def _refuse_parallel(module: Any) -> None:
    if isinstance(module, DataParallel):
        raise TypeError(
            "`model` must not be or hold a DataParallel around a layer that is hooked: its "
            "replicas live for one forward pass and hooks see the part of the batch that one of "
            "them gets. Use DistributedDataParallel, or the plain module (`.module`) on one device."
        )


def _check_layers(layers: Any, modules: dict[str, nn.Module]) -> tuple[str, ...]:
    if isinstance(layers, (str, set, frozenset)) or not isinstance(layers, Iterable):
        got = f"the string {layers!r}" if isinstance(layers, str) else type(layers).__name__
        raise TypeError(f"`layers` must be a list of module names, ['stage1'] for one; got {got}.")
    names = tuple(layers)
    if not names:
        raise ValueError("`layers` must name at least one layer; got none.")
    for name in names:
        if isinstance(name, nn.Module):
            found = [known for known, module in modules.items() if module is name]
            its_name = f"its name is {found[0]!r}" if found else "the model does not have it"
            raise TypeError(
                f"`layers` must hold names of modules; got a module, {type(name).__name__}: "
                f"{its_name}."
            )
        if name not in list(modules):  # a name may be unhashable
            raise ValueError(_unknown(name, list(modules)))
        if names.count(name) > 1:
            raise ValueError(f"`layers` must name each layer once; got {name!r} twice.")
        _refuse_unhookable(name, modules)
    return names


def _refuse_unhookable(name: str, modules: dict[str, nn.Module]) -> None:
    parts = name.split(".")
    outer = [modules.get(".".join(parts[:n])) for n in range(len(parts))]
    for module in outer:
        _refuse_parallel(module)
    inside = any(isinstance(module, torch.jit.ScriptModule) for module in outer)
    if inside or isinstance(modules[name], RecursiveScriptModule):
        raise TypeError(
            f"`layers` must not name {name!r}: it is {'inside ' if inside else ''}a ScriptModule, "
            "which runs in C++, where hooks of Python are not called. Name a plain module around "
            "it, or keep this part of the model plain."
        )


# What torch.compile, FSDP and activation checkpointing call a submodule that they wrap.
_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return modules by every name they have, without the wrappers of compiled submodules."""
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parts = [part for part in name.split(".") if part not in _WRAPPED]
        modules.setdefault(".".join(parts), module)
    return modules


def _unknown(name: Any, known: list[str]) -> str:
    # A wrapper's name in front of the right one, or a name that is spelt alike.
    inner = [near for near in known if near and str(name).endswith(f".{near}")]
    close = difflib.get_close_matches(str(name), filter(None, known), n=3, cutoff=0)
    nearest = [max(inner, key=len)] if inner else close
    listed = ", ".join(map(repr, nearest))
    hint = f"The nearest names are {listed}" if nearest else "It has no submodules"
    return f"`layers` must name modules of the model; it has no {name!r}. {hint}."
