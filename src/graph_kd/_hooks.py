"""Read features at sensing points, from models that do not return them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.jit._script import RecursiveScriptModule
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DataParallel, DistributedDataParallel

from graph_kd._forward_pass import ForwardPass
from graph_kd._select import Select, Untaken, check_select, take

__all__ = ["FeatureHooks", "named_modules", "unwrap"]


class FeatureHooks:
    """Collect the outputs of named layers during a forward pass.

    Outputs are kept as they are: with gradient where the layer gives it, until the next forward
    pass of the model begins. Names are those of the plain model: `DistributedDataParallel`,
    `torch.compile` and Fabric wrappers are seen through. Place hooks before a compiled
    model's first call; torch ignores those that come later. A copy of the model (an average of
    weights, say) leaves the hooks of the original alone, and so does a pickle.

    An in-place operation after a hooked layer, such as ``ReLU(inplace=True)``, changes what was
    collected, so reading it raises: hook that layer instead. Compiled code and inference mode can
    not tell; there a copy of the output is kept.

    Args:
        model: The model; its own forward must be called, it marks the beginning of a pass.
        layers: Dotted module names, as in ``model.named_modules()``, in the order wanted.
        select: What to take from a layer's output that is no tensor: an index, a key, the name of
            an attribute (of a dataclass or namedtuple), or a callable from output to tensor. One
            for all layers, or a list with one per layer. An index or a name leaves an output that
            is a tensor as it is; a callable is applied to every output. It is applied once a pass,
            and the rest of the output is not kept.

    Raises:
        TypeError: ``model`` is no module, a `DataParallel` or a ScriptModule, ``layers`` is a
            single string or names a layer of a ScriptModule, or ``select`` is of another kind. On
            access: a layer gave no tensor, or ``select`` took none from it.
        ValueError: ``layers`` is empty, repeats a name, or holds one the model does not have, or
            ``select`` is a list of another length.
        RuntimeError: on access, a layer did not run, or ran more than once, in the last forward,
            its output was changed in place since, or the last forward was a trace.

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
        if isinstance(layers, str):
            raise TypeError(f"`layers` must be a list of module names; got the string {layers!r}.")
        if not isinstance(layers, Iterable):
            raise TypeError(
                f"`layers` must be a list of module names; got {type(layers).__name__}."
            )
        self.layers = tuple(layers)
        if not self.layers:
            raise ValueError("`layers` must name at least one layer; got none.")
        modules = named_modules(plain)
        for name in self.layers:
            if name not in modules:
                raise ValueError(_unknown(name, list(modules)))
            if self.layers.count(name) > 1:
                raise ValueError(f"`layers` must name each layer once; got {name!r} twice.")
            _refuse_scripted(name, modules)
        selects = check_select(select, self.layers)
        self._source = (id(plain), self.layers)
        self._norms: tuple[tuple[str, nn.Module], ...] = tuple(
            (name, module)
            for name, module in modules.items()
            if isinstance(module, _NormBase) and module.track_running_stats
        )
        self._kept = _Kept(self.layers)
        self._handles = [plain.register_forward_pre_hook(_Begin(plain, self._kept))]
        for name, wanted in zip(self.layers, selects, strict=True):
            keep = _Keep(modules[name], self._kept.outputs[name], wanted)
            self._handles.append(modules[name].register_forward_hook(keep))

    @property
    def features(self) -> list[Tensor]:
        """The layers' outputs in the last forward pass, in the order of `layers`.

        They stay readable after `remove`. The losses notice when the hooked model no longer runs:
        features that are read anew for a second step, without a new forward pass, raise there. A
        list that is kept in a variable may be used again.
        """
        kept = self._kept
        if kept.is_copy:
            raise RuntimeError(
                "These hooks are a copy, and belong to no model. Place new ones on the model that "
                "runs: FeatureHooks(model, layers)."
            )
        features = [_feature(name, outputs) for name, outputs in kept.outputs.items()]
        if torch.compiler.is_compiling():
            return features
        if kept.record is None:
            kept.record = ForwardPass(self._source, self._norms)
        if kept.copy_runs > kept.record.copies:
            kept.record.copies = kept.copy_runs
            kept.stale_reads += 1
            if kept.stale_reads > 1:  # a copy runs, features are read, and so on: a training loop
                raise kept.record.stale("hooked model")
        kept.record.read(features)
        return features

    def remove(self) -> None:
        """Detach everything from the model; calling it twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.features)

    def __len__(self) -> int:
        return len(self.layers)

    def __enter__(self) -> FeatureHooks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"FeatureHooks(layers={list(self.layers)})"


class _Kept:
    """What one forward pass left. Compiled code only clears and sets it, and reads nothing."""

    is_copy = False

    def __init__(self, layers: Iterable[str]) -> None:
        self.outputs: dict[str, list[_Output]] = {name: [] for name in layers}
        self.record: ForwardPass | None = None  # made when the features are read
        self.copy_runs = 0
        self.stale_reads = 0  # each after another run of a copy

    def __reduce__(self) -> tuple[Any, ...]:
        return _Copied, (tuple(self.outputs),)  # copies and pickles hold no batch


class _Copied(_Kept):
    """What a copy of the hooks holds: the copied model does not know them."""

    is_copy = True


# What `take` returned and, where torch counts the changes of a tensor, its count at that time.
_Output = tuple[Any, int | None]


def _feature(name: str, kept: list[_Output]) -> Tensor:
    if not torch.compiler.is_compiling() and any(_is_symbolic(output) for output, _ in kept):
        raise RuntimeError(
            f"Layer {name!r} gave no values: the last forward pass was a trace (torch.fx, "
            "torch.export or alike). Run the model itself before reading `features`."
        )
    if not kept:
        raise RuntimeError(
            f"Layer {name!r} did not run in the last forward pass. Call the model itself "
            "before reading `features`, and name layers that its forward uses."
        )
    if len(kept) > 1:
        raise RuntimeError(
            f"Layer {name!r} ran {len(kept)} times in the last forward pass; a sensing "
            "point must run once. Give each use a module of its own, and call the model "
            "itself, which marks the beginning of a pass."
        )
    output, version = kept[0]
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


def _is_symbolic(output: Any) -> bool:
    found = output.found if isinstance(output, Untaken) else output
    return isinstance(found, FakeTensor | fx.Proxy)


class _Hook:
    """A hook on one module. A copy of the model keeps it, as the same object, and it stays idle."""

    def __init__(self, module: nn.Module) -> None:
        self.module: nn.Module | None = module

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"module": None}  # idle in a pickle too, which must not hold a batch's outputs

    @property
    def __name__(self) -> str:
        # torch.jit.script asks for it; others take an AttributeError for an answer.
        raise AttributeError(
            "torch.jit.script can not compile a model with hooks. Call `FeatureHooks.remove()` "
            "first, and before the model is copied."
        )


class _Begin(_Hook):
    """Forget the outputs of the pass before."""

    def __init__(self, module: nn.Module, kept: _Kept) -> None:
        super().__init__(module)
        self.kept = kept

    def __call__(self, module: nn.Module, _inputs: Any) -> None:
        if module is self.module:
            for outputs in self.kept.outputs.values():
                outputs.clear()
            self.kept.record = None
            self.kept.copy_runs = 0
            self.kept.stale_reads = 0
        elif self.module is not None:  # a pickle has neither
            self.kept.copy_runs += 1


class _Keep(_Hook):
    """Keep the output of a layer."""

    def __init__(self, module: nn.Module, kept: list[_Output], select: Select) -> None:
        super().__init__(module)
        self.kept = kept
        self.select = select

    def __call__(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        if module is not self.module:
            return
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # a backward pass computes a checkpoint again
        taken = output if isinstance(output, fx.Proxy) else take(output, self.select)
        version = None
        if isinstance(taken, Tensor):
            # Nothing counts the changes here, so no later one may reach what is kept.
            if torch.compiler.is_compiling() or taken.is_inference():
                taken = taken.clone()
            else:
                version = taken._version
        self.kept.append((taken, version))


def unwrap(model: nn.Module) -> nn.Module:
    """Return the plain model inside the wrappers of DDP, `torch.compile` and Fabric."""
    if isinstance(model, DataParallel):
        raise TypeError(
            "`model` must not be a DataParallel: its replicas live for one forward pass and hooks "
            "see the part of the batch that one of them gets. Use DistributedDataParallel, or hook "
            "the plain model (`model.module`) on one device."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "`model` must not be a ScriptModule: its layers run in C++, where hooks of Python are "
            "not called. Hook the plain model that was scripted or traced, and run that."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module; got {type(model).__name__}.")
    if isinstance(model, DistributedDataParallel):
        return unwrap(model.module)
    inside = getattr(model, "_orig_mod", None)
    if isinstance(getattr(model, "_original_module", None), nn.Module):  # Fabric has both
        inside = getattr(model, "_forward_module", None)
    return unwrap(inside) if isinstance(inside, nn.Module) else model


def _refuse_scripted(name: str, modules: dict[str, nn.Module]) -> None:
    parts = name.split(".") if name else []
    outer = [modules.get(".".join(parts[:n])) for n in range(len(parts))]
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
    nearest = [near for near in known if near and str(name).endswith(f".{near}")][-1:]
    nearest = nearest or difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    hint = (
        "The nearest names are " + ", ".join(repr(near) for near in nearest)
        if nearest
        else "See `model.named_modules()` for the names there are"
    )
    return f"`layers` must name modules of the model; it has no {name!r}. {hint}."
