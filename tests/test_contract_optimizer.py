"""GatedGradClip behaves as the optimizer it wraps, for four optimizers.

Each situation is a loop that runs twice, with the wrapper and with the plain optimizer, on copies
of one network. The plain one gets its gradients by hand: the task's alone where the gate is closed,
else task + gated transfer. Parameters, gradients, states and all that was seen must be the same.
"""

import contextlib
import copy
import importlib
import io
import pickle
import warnings
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, RMSprop, lr_scheduler

from graph_kd import GatedGradClip

OPTIMIZERS = {
    "SGD": partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": partial(Adam, lr=0.01, weight_decay=0.01),
    "AdamW": partial(AdamW, lr=0.01, weight_decay=0.1, amsgrad=True),
    "RMSprop": partial(RMSprop, lr=0.01, momentum=0.9, centered=True),
}
SCHEDULERS = {
    "StepLR": partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=7),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=6),
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 0.9**epoch),
    "ReduceLROnPlateau": partial(lr_scheduler.ReduceLROnPlateau, patience=1, factor=0.3),
}


def closed(_task_norm, _transfer_norm):
    """Let nothing of the transfer gradient through; a named function can be pickled."""
    return 0.0


class Net(nn.Module):
    """Two layers; the transfer loss reaches the first alone."""

    def __init__(self):
        super().__init__()
        self.front = nn.Conv2d(5, 6, 2)
        self.back = nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.front(x).flatten(1).tanh()
        return hidden, self.back(hidden)


def network():
    torch.manual_seed(7)
    return Net().double()


def losses(net, seed):
    """Return a task loss, and a transfer loss of a much larger gradient."""
    x = torch.randn(4, 5, 2, 2, generator=torch.Generator().manual_seed(seed))
    hidden, output = net(x.to(net.front.weight))
    return (output - x[:, :3, 0, 0]).square().mean(), 10 * (hidden - 1).square().sum()


sgd = partial(SGD, lr=0.1, momentum=0.9)


def gradients_by_hand(net, seeds, gate="norm", bound=1.0):
    """Leave in every p.grad what the wrapper should after a backward call for each seed."""
    params = [p for p in net.parameters() if p.requires_grad]
    both = [sum(parts) for parts in zip(*(losses(net, seed) for seed in seeds), strict=True)]
    task = torch.autograd.grad(both[0], params, retain_graph=True)
    transfer = torch.autograd.grad(both[1], params, allow_unused=True)
    for p, t, d in zip(params, task, transfer, strict=True):
        share = 0.0 if d is None or gate is closed else min(1.0, bound * t.norm() / d.norm())
        p.grad = t.clone() if d is None or gate is closed else t + share * d


class Loop:
    """A network and its optimizer, wrapped or plain."""

    def __init__(self, make, gate, *, wrapped):
        self.make, self.gate, self.wrapped = make, gate, wrapped
        self.net = network()
        self.optimizer = self.wrap(make(self.net.parameters()))

    def wrap(self, optimizer):
        return GatedGradClip(optimizer, self.gate) if self.wrapped else optimizer

    def another(self):
        return Loop(self.make, self.gate, wrapped=self.wrapped)

    def inner(self):
        return self.optimizer.optimizer if self.wrapped else self.optimizer

    def backward(self, *seeds):
        """Call `backward` once a seed; by hand it is a step's first and only one."""
        if not self.wrapped:
            return gradients_by_hand(self.net, seeds, self.gate)
        for seed in seeds:
            self.optimizer.backward(*losses(self.net, seed))
        return None

    def train(self, seeds):
        for seed in seeds:
            self.optimizer.zero_grad()
            self.backward(seed)
            self.optimizer.step()
        return self

    def values(self):
        """Return copies of parameters, gradients and the optimizer's state."""
        pairs = [(p.detach(), p.grad) for p in self.net.parameters()]
        return copy.deepcopy([pairs, self.optimizer.state_dict()])


SITUATIONS = {}


def situation(*rows):
    """Enter a function in the table, once for each row of arguments."""

    def enter(function):
        for row in rows or [()]:
            name = "-".join(getattr(value, "__name__", str(value)) for value in (function, *row))
            SITUATIONS[name] = (function, row)
        return function

    return enter


# Steps, closures, clearing.


@situation()
def steps(on):
    on.train(range(5))


@situation()
def step_without_gradients(on):
    return on.optimizer.step()


@situation()
def closure(on):
    def evaluate(seed):
        on.optimizer.zero_grad()
        on.backward(seed)
        return losses(on.net, seed)[0].item()

    return [on.optimizer.step(partial(evaluate, seed)) for seed in range(3)]


@situation((True,), (False,))
def zero_grad(on, set_to_none):
    on.backward(0)
    on.optimizer.zero_grad(set_to_none=set_to_none)
    cleared = on.values()
    on.backward(1)
    return cleared


def each_gradient(change):
    def between(on):
        for p in on.net.parameters():
            p.grad = change(p.grad)

    return between


CLEARING = {
    "model": lambda on: on.net.zero_grad(),
    "model in place": lambda on: on.net.zero_grad(set_to_none=False),
    "inner": lambda on: on.inner().zero_grad(),
    "inner in place": lambda on: on.inner().zero_grad(set_to_none=False),
    "by hand": each_gradient(torch.Tensor.zero_),
    "wrapper": lambda on: on.optimizer.zero_grad(),
    "wrapper in place": lambda on: on.optimizer.zero_grad(set_to_none=False),
}


@situation(*[(by,) for by in CLEARING])
def clearing(on, by):
    """Also behind the wrapper's back: it leaves no stale sums."""
    for seed in range(3):
        on.backward(seed)
        on.optimizer.step()
        CLEARING[by](on)


@situation()
def accumulation(on):
    for seeds in ([0, 1], [2, 3, 4]):
        on.optimizer.zero_grad()
        on.backward(*seeds)
        on.optimizer.step()


@situation()
def clip_grad_norm(on):
    norms = []
    for seed in range(3):
        on.optimizer.zero_grad()
        on.backward(seed)
        norms.append(nn.utils.clip_grad_norm_(on.net.parameters(), 0.01))
        on.optimizer.step()
    assert min(norms) > 0.01
    return norms


@situation(*[(max_norm, calls) for max_norm in (None, 0.02) for calls in (1, 2)])
def grad_scaler(on, max_norm, calls):
    """The plain loop has no scaler: by powers of two it changes nothing."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(4):
        seeds = range(step * calls, (step + 1) * calls)
        on.optimizer.zero_grad()
        if not on.wrapped:
            on.backward(*seeds)
            if max_norm is not None:
                nn.utils.clip_grad_norm_(on.net.parameters(), max_norm)
            on.optimizer.step()
            continue
        for seed in seeds:
            on.optimizer.backward(*(scaler.scale(loss) for loss in losses(on.net, seed)))
        scaler.unscale_(on.optimizer)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(on.net.parameters(), max_norm)
        scaler.step(on.optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**12 or not on.wrapped


# Schedulers, hooks.


@situation(*[(name, on_inner) for name in SCHEDULERS for on_inner in (False, True)])
def schedulers(on, name, on_inner):
    scheduler = SCHEDULERS[name](on.inner() if on_inner else on.optimizer)
    rates = []
    for seed in range(6):
        on.train([seed])
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        rates.append(on.optimizer.param_groups[0]["lr"])
    assert len(set(rates)) > 1
    return rates


@situation()
def a_scheduler_stepped_too_early(on):
    scheduler = lr_scheduler.StepLR(on.optimizer, 1)
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()


@situation()
def step_hooks(on):
    calls = []

    def note(name, optimizer, args, kwargs):
        calls.append((name, optimizer is on.optimizer, args, kwargs, *on.values()[0]))

    handles = [
        on.optimizer.register_step_pre_hook(partial(note, "before")),
        on.optimizer.register_step_post_hook(partial(note, "after")),
    ]
    on.train([0])
    for handle in handles:
        handle.remove()
    on.train([1])
    assert [call[:2] for call in calls] == [("before", True), ("after", True)]
    return [call[4:] for call in calls]


@situation()
def hooks_of_the_inner_optimizer(on):
    calls, inner = [], on.inner()
    inner.register_step_post_hook(lambda optimizer, *_: calls.append(optimizer is inner))
    inner.register_state_dict_post_hook(lambda optimizer, _: calls.append(optimizer is inner))
    on.train([0]).optimizer.state_dict()
    return calls


@situation()
def a_step_hook_that_changes_the_arguments(on):
    def evaluate():
        on.backward(0)
        return 42.0

    on.optimizer.register_step_pre_hook(lambda _, args, kwargs: ((*args, evaluate), kwargs))
    return on.optimizer.step()


@situation()
def state_dict_hooks(on):
    calls = []

    def replace(optimizer, state):
        calls.append(("post", optimizer is on.optimizer))
        return {**state, "note": "from the hook"}

    on.train([0])
    handles = [
        on.optimizer.register_state_dict_pre_hook(
            lambda optimizer: calls.append(("pre", optimizer is on.optimizer))
        ),
        on.optimizer.register_state_dict_post_hook(replace),
        on.optimizer.register_state_dict_post_hook(lambda *_: None),
    ]
    note = on.optimizer.state_dict()["note"]
    for handle in handles:
        handle.remove()
    assert (calls, note) == ([("pre", True), ("post", True)], "from the hook")


@situation()
def load_state_dict_hooks(on):
    calls = []

    def note(name, optimizer):
        calls.append((name, optimizer is on.optimizer, optimizer.param_groups[0]["lr"]))

    def replace(optimizer, given):
        note("pre", optimizer)
        given["note"] = "the caller's is left as it is"
        return {**given, "param_groups": [{**g, "lr": 0.5} for g in given["param_groups"]]}

    state = on.train([0]).optimizer.state_dict()
    on.optimizer.register_load_state_dict_pre_hook(replace)
    on.optimizer.register_load_state_dict_pre_hook(lambda *_: None)
    on.optimizer.register_load_state_dict_post_hook(partial(note, "post"))
    on.optimizer.load_state_dict(state)
    assert [call[:2] for call in calls] == [("pre", True), ("post", True)]
    assert set(state) == {"state", "param_groups"}
    return [call[2] for call in calls], state["param_groups"][0]["lr"]


# State: resuming, copies.


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def cosine(on):
    return SCHEDULERS["CosineAnnealingLR"](on.optimizer)


@situation()
def resuming_from_a_file(on):
    """Model, optimizer and scheduler go on bit-equal."""
    resumed = on.another()
    runs = [(on, cosine(on)), (resumed, cosine(resumed))]
    for seed in range(6):
        if seed == 3:
            parts, copies = ((run.net, run.optimizer, schedule) for run, schedule in runs)
            states = through_file([part.state_dict() for part in parts])
            for part, state in zip(copies, states, strict=True):
                part.load_state_dict(state)
        for run, schedule in runs if seed >= 3 else runs[:1]:
            run.train([seed])
            schedule.step()
    torch.testing.assert_close(resumed.values(), on.values(), rtol=0, atol=0)


@situation()
def the_state_of_the_other_kind(on):
    """A wrapper loads the state of a plain optimizer, and the other way round."""
    other = Loop(on.make, on.gate, wrapped=not on.wrapped).train(range(3))
    on.net.load_state_dict(other.net.state_dict())
    on.optimizer.load_state_dict(through_file(other.optimizer.state_dict()))
    on.train(range(3, 6))


def by_pickle(pair):
    return pickle.loads(pickle.dumps(pair))


@situation((copy.deepcopy,), (by_pickle,))
def copies_of_model_and_optimizer(on, how):
    lr_scheduler.StepLR(on.optimizer, 10)  # replaces `step` on the instance
    on.optimizer.register_step_post_hook(lambda *_: None)  # is in no copy, and need not be
    twin = on.another()
    on.backward(9)  # stands in `p.grad` when the copy is made, and is no part of it
    twin.net, twin.optimizer = how((on.net, on.optimizer))
    assert {id(p) for p in twin.optimizer.param_groups[0]["params"]} == {
        id(p) for p in twin.net.parameters()
    }
    before = on.values()
    twin.train(range(3))
    torch.testing.assert_close(on.values(), before, rtol=0, atol=0)
    on.train(range(3))
    torch.testing.assert_close(twin.values(), on.values(), rtol=0, atol=0)


# Param groups and parameters.


@situation()
def options_changed_in_param_groups(on):
    for seed, rate in enumerate([0.2, 0.002]):
        on.optimizer.param_groups[0].update(lr=rate, weight_decay=10 * rate)
        assert on.inner().param_groups[0]["lr"] == rate
        on.train([seed])


@situation()
def a_param_group_added_later(on):
    on.optimizer = on.wrap(on.make(on.net.back.parameters()))
    on.optimizer.add_param_group({"params": list(on.net.front.parameters()), "lr": 0.5})
    on.train(range(3))


@situation()
def parameters_frozen_and_thawed(on):
    on.net.front.bias.requires_grad_(False)
    on.train(range(3))
    frozen = on.net.front.bias.clone()
    assert on.net.front.bias.grad is None
    on.net.front.bias.requires_grad_(True)
    on.train([3])
    return frozen


@situation()
def a_parameter_that_no_loss_reaches(on):
    spare = nn.Parameter(torch.ones(3))
    on.optimizer.add_param_group({"params": [spare]})
    on.train(range(3))
    assert spare.grad is None
    return spare.detach(), spare in on.optimizer.state


@situation()
def state_groups_and_defaults_assigned(on):
    (group,) = on.optimizer.param_groups
    front, back = (list(part.parameters()) for part in (on.net.front, on.net.back))
    on.optimizer.param_groups = [{**group, "params": front}, {**group, "params": back, "lr": 0.2}]
    on.optimizer.state = copy.copy(on.optimizer.state)
    on.optimizer.defaults = {**on.optimizer.defaults, "lr": 0.3}
    on.train(range(3))
    on.optimizer.load_state_dict(on.optimizer.state_dict())  # replaces these objects
    for name in ("param_groups", "state", "defaults"):
        assert getattr(on.optimizer, name) is getattr(on.inner(), name)
    return on.optimizer.defaults["lr"], len(on.optimizer.state)


@situation()
def channels_last(on):
    on.net.to(memory_format=torch.channels_last)
    on.train(range(3))
    assert on.net.front.weight.is_contiguous(memory_format=torch.channels_last)


@situation()
def a_process_group_of_one(on):
    """Set between two steps, as every setting may be."""
    on.train([0])
    if on.wrapped:
        on.optimizer.process_group = torch.distributed.group.WORLD
    on.train([1, 2])


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = f"file://{tmp_path_factory.mktemp('store')}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def assert_runs_alike(name, make, gate):
    function, row = SITUATIONS[name]
    runs = [Loop(make, gate, wrapped=wrapped) for wrapped in (True, False)]
    seen = [function(on, *row) for on in runs]
    exact = gate is closed and name not in INEXACT
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(*seen, **tolerance)
    torch.testing.assert_close(*(on.values() for on in runs), **tolerance)


INEXACT = {"accumulation", *(name for name in SITUATIONS if name.startswith("grad_scaler"))}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("gate", [closed, "norm"], ids=["closed", "norm"])
@pytest.mark.parametrize("name", SITUATIONS)
def test_a_loop_runs_as_with_the_plain_optimizer(name, gate, make):
    assert_runs_alike(name, make, gate)


@pytest.mark.parametrize("make", [SGD, AdamW])
@pytest.mark.parametrize("transfers", [False, True])
def test_a_fused_optimizer_finds_gradients_laid_out_as_parameters(make, transfers):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    net, images = copy.deepcopy(plain), torch.randn(2, 3, 8, 8)
    images = images.contiguous(memory_format=torch.channels_last)  # convolutions follow it
    fused = make(plain.parameters(), lr=0.01, fused=True)
    optimizer = GatedGradClip(make(net.parameters(), lr=0.01, fused=True), lambda *_: 1.0)
    for _ in range(3):
        fused.zero_grad()
        optimizer.zero_grad()
        task, transfer = (net(images).square().mean() for _ in range(2))
        optimizer.backward(task, transfer if transfers else None)
        (plain(images).square().mean() * (1 + transfers)).backward()
        for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
            assert ours.grad.stride() == theirs.grad.stride() == ours.stride()
        fused.step()
        optimizer.step()
    torch.testing.assert_close(net.state_dict(), plain.state_dict())


def test_an_optimizer_that_needs_a_closure_can_be_wrapped():
    assert_runs_alike("closure", partial(LBFGS, max_iter=4), closed)


# What the plain optimizer has no counterpart of: settings, counts, frameworks, the warning.


def test_the_wrapper_is_an_optimizer_and_shows_its_settings():
    inner = sgd(network().parameters())
    optimizer = GatedGradClip(inner, "sigmoid", scope="global", bound=2)
    assert isinstance(optimizer, Optimizer)
    settings = "gate='sigmoid', scope='global', bound=2.0"
    assert repr(optimizer) == f"GatedGradClip({settings}, optimizer={inner!r})"


def test_zero_grad_frees_the_memory_of_the_gradients():
    on = Loop(sgd, "norm", wrapped=True)
    on.backward(0)
    merged = [weakref.ref(p.grad) for p in on.net.parameters()]
    on.optimizer.zero_grad()
    assert all(gradient() is None for gradient in merged)


@pytest.mark.parametrize("capturable", [True, False])
def test_the_count_of_skipped_steps_is_saved_and_a_plain_state_resets_it(capturable):
    net = network()
    optimizer = GatedGradClip(sgd(net.parameters()), capturable=capturable)
    for _ in range(2):
        optimizer.zero_grad()
        task, transfer = losses(net, 0)
        optimizer.backward(task, transfer * float("nan"))
    state = through_file(optimizer.state_dict())
    assert int(state["skipped"]) == 2
    counter = optimizer.skipped
    optimizer.load_state_dict(sgd(net.parameters()).state_dict())
    assert int(optimizer.skipped) == 0
    assert ("skipped" in optimizer.state_dict()) == capturable  # to look at a tensor would sync
    optimizer.load_state_dict(state)
    assert int(optimizer.skipped) == 2
    assert not capturable or optimizer.skipped is counter  # where a captured step counts
    sgd(net.parameters()).load_state_dict(state)  # the plain one leaves the rest alone


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, by_pickle])
def test_a_copy_has_settings_and_a_count_of_its_own(how, capturable, one_process):
    net = network()
    settings = {"bound": 0.5, "scope": "global", "process_group": one_process}
    optimizer = GatedGradClip(sgd(net.parameters()), closed, capturable=capturable, **settings)
    optimizer.backward(*(loss * float("inf") ** n for n, loss in enumerate(losses(net, 0))))
    twin = how(optimizer)
    assert repr(twin) == repr(optimizer)
    assert twin.process_group is (None if how is by_pickle else one_process)
    assert (int(twin.skipped), twin.gates, twin.capturable) == (1, [], capturable)
    twin.skipped += 1
    twin.bound = 9.0
    assert (int(optimizer.skipped), optimizer.bound) == (1, 0.5)
    saved = optimizer.state_dict()["skipped"]
    optimizer.skipped += 1
    assert int(saved) == 1


class GateThatKnowsItsOptimizer:
    """A gate that refers back: a cycle for copies."""

    def __call__(self, _task, _transfer):
        return self.optimizer.bound


@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle])
def test_copies_follow_a_gate_that_holds_the_optimizer(how):
    gate = GateThatKnowsItsOptimizer()
    gate.optimizer = GatedGradClip(sgd(network().parameters()), gate)
    twin = how(gate.optimizer)
    assert twin.gate is not gate
    assert twin.gate.optimizer is twin


def test_the_wrapped_optimizer_can_be_replaced():
    net = network()
    optimizer = GatedGradClip(sgd(net.parameters()))
    optimizer.optimizer = Adam(net.parameters(), lr=0.25)
    optimizer.backward(*losses(net, 0))
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert "exp_avg" in optimizer.state[net.front.weight]


def test_grad_scaler_skips_an_overflow_of_the_task_and_leaves_out_one_of_the_transfer():
    on, plain = Loop(sgd, "norm", wrapped=True), Loop(sgd, closed, wrapped=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for seed, of_task, of_transfer in ((0, 1.0, float("inf")), (1, float("inf"), 1.0)):
        on.optimizer.zero_grad()
        task, transfer = (scaler.scale(loss) for loss in losses(on.net, seed))
        on.optimizer.backward(of_task * task, of_transfer * transfer)
        scaler.step(on.optimizer)
        scaler.update()
    plain.train([0])
    for ours, theirs in zip(on.net.parameters(), plain.net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert scaler.get_scale() == 2.0**9
    assert on.optimizer.skipped == 1


class ScheduleFree(SGD):
    """The interface of schedule-free optimizers."""

    mode = None

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"


def test_train_and_eval_reach_a_schedule_free_optimizer_and_no_other():
    inner = ScheduleFree(network().parameters(), lr=0.1)
    optimizer = Mixed(GatedGradClip(inner))
    for mode in ("train", "eval", "train"):
        getattr(optimizer, mode)()
        assert inner.mode == mode
    other = GatedGradClip(sgd(network().parameters()))
    assert other.train() is other.eval() is None


# Frameworks mix their own class with the optimizer's, or wrap the optimizer.


def framework(name):
    """Import a framework, or skip the test."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        return pytest.skip(f"{name} is not installed, or not in order: {error}")


class Mixed:
    """Lightning and Fabric since 2.0: the classes are mixed, attributes looked up."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Shell", (type(self), type(optimizer)), {})

    @property
    def optimizer(self):
        return self._optimizer

    def step(self, closure=None):
        return self._optimizer.step() if closure is None else self._optimizer.step(closure)

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class Copied(Mixed):
    """Lightning before 2.0: the classes are mixed, the __dict__ is copied."""

    def __init__(self, optimizer):
        attributes = optimizer.__dict__.items()
        self.__dict__.update((name, value) for name, value in attributes if name != "step")
        super().__init__(optimizer)

    def __getattr__(self, name):
        raise AttributeError(name)


class Named:
    """The wrapped optimizer is a plain attribute called as ours."""

    def __init__(self, optimizer):
        self.__dict__.update(optimizer.__dict__)
        self.__class__ = type("Shell", (type(self), type(optimizer)), {})
        self.optimizer = optimizer

    def step(self, closure=None):
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)


def fabric_shell(optimizer):
    fabric = framework("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    return fabric.setup_optimizers(optimizer)


def lightning_shell(optimizer):
    return framework("lightning.pytorch.core.optimizer").LightningOptimizer(optimizer)


SHELLS = {"mixed": Mixed, "copied": Copied, "named": Named, "fabric": fabric_shell}
shells = pytest.mark.parametrize("shell", SHELLS.values(), ids=SHELLS.keys())
ALL_SHELLS = {**SHELLS, "lightning": lightning_shell}
all_shells = pytest.mark.parametrize("shell", ALL_SHELLS.values(), ids=ALL_SHELLS.keys())


@shells
@pytest.mark.parametrize("way", range(4))
def test_a_shell_and_its_original_are_one_optimizer(shell, way):
    on, plain = (Loop(sgd, "norm", wrapped=wrapped) for wrapped in (True, False))
    shelled = shell(on.optimizer)
    both = shelled, on.optimizer
    first, second = both[way // 2], both[way % 2]
    assert isinstance(shelled, GatedGradClip)
    assert shelled.optimizer is on.optimizer
    for seed, bound in enumerate([1.0, 0.5, 0.2]):
        first.zero_grad()
        second.bound = bound
        first.backward(*losses(on.net, seed))
        second.backward(*losses(on.net, seed + 10))
        gradients_by_hand(plain.net, [seed, seed + 10], "norm", bound)
        assert first.gates == second.gates != []
        first.step()
        plain.optimizer.step()
        torch.testing.assert_close(on.values(), plain.values(), rtol=1e-9, atol=1e-12)
        second.zero_grad()
        assert all(p.grad is None for p in on.net.parameters())
    for setting, value in {"gate": closed, "scope": "global", "process_group": None}.items():
        setattr(first, setting, value)
        assert getattr(second, setting) == value
    first.backward(*(loss * float("inf") ** n for n, loss in enumerate(losses(on.net, 0))))
    assert second.skipped == first.skipped == 1
    first.load_state_dict({**plain.optimizer.state_dict(), "skipped": 7})
    assert second.skipped == 7
    assert GatedGradClip.state_dict(second)["skipped"] == 7


@all_shells
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_shells_can_be_copied_as_around_a_plain_optimizer(shell, how):
    assert how(shell(sgd(network().parameters()))).param_groups[0]["lr"] == 0.1
    original = GatedGradClip(sgd(network().parameters()), bound=0.5)
    original.skipped = 3
    twin, shelled = (how(shell(original)), shell(original))
    assert type(twin).__mro__[1:] == type(shelled).__mro__[1:]
    assert (twin.bound, twin.skipped, twin.gates) == (0.5, 3, [])
    twin.bound, twin.skipped = 0.1, 4
    assert (original.bound, original.skipped) == (0.5, 3)
    if how is copy.deepcopy:
        twin.param_groups[0]["lr"] = 9.0
        assert original.param_groups[0]["lr"] == 0.1


def test_shell_and_original_copied_together_stay_one():
    original = GatedGradClip(sgd(network().parameters()))
    shelled, twin = copy.deepcopy((Mixed(original), original))
    shelled.bound = 0.25
    assert (twin.bound, original.bound) == (0.25, 1.0)


@shells
def test_shells_survive_a_pickle_whenever_they_do_around_a_plain_optimizer(shell, monkeypatch):
    plain, original = sgd(network().parameters()), GatedGradClip(sgd(network().parameters()))
    original.skipped = 3
    with pytest.raises((pickle.PicklingError, AttributeError), match=r"Can't (pickle|get)"):
        pickle.dumps(shell(plain))
    for optimizer in (plain, original):
        shelled = shell(optimizer)
        # A class that can be found by name makes the difference.
        type(shelled).__module__, type(shelled).__qualname__ = __name__, "FoundByName"
        monkeypatch.setitem(globals(), "FoundByName", type(shelled))
        twin = by_pickle(shelled)
        assert twin.param_groups[0]["lr"] == 0.1
    assert twin.skipped == 3


# Accumulation by a framework: an optimizer whose `step` and `zero_grad` often do nothing.


class Accumulates(SGD):
    """Steps and clears when told to, as an optimizer that accelerate has prepared."""

    sync = True

    def step(self, closure=None):
        return super().step(closure) if self.sync else None

    def zero_grad(self, set_to_none=True):
        if self.sync:
            super().zero_grad(set_to_none)


def compare_accumulation(net, optimizer, backward, accumulating):
    """Train in steps of three calls, beside a plain loop."""
    twin = copy.deepcopy(net)
    plain = sgd(twin.parameters())
    for seed in range(6):
        with accumulating(seed % 3 == 2):
            backward(*losses(net, seed))
            optimizer.step()
            optimizer.zero_grad()
        if seed % 3 == 2:
            gradients_by_hand(twin, range(seed - 2, seed + 1))
            plain.step()
            for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_sums_outlive_a_zero_grad_that_clears_nothing():
    net = network()
    inner = Accumulates(net.parameters(), lr=0.1, momentum=0.9)
    optimizer = GatedGradClip(inner)

    @contextlib.contextmanager
    def accumulating(last):
        inner.sync = last
        yield

    compare_accumulation(net, optimizer, optimizer.backward, accumulating)


@pytest.mark.parametrize("scope", ["parameter", "global"])
def test_leaves_outside_take_part_while_zero_grad_clears_nothing(scope):
    net, twin = network(), network()
    inner = Accumulates(net.front.parameters(), lr=0.1)
    inner.sync = False
    wrapped = GatedGradClip(inner, scope=scope)
    joint = GatedGradClip(sgd(twin.parameters()), scope=scope)
    for seed in range(3):
        wrapped.backward(*losses(net, seed))
        wrapped.zero_grad()
        joint.backward(*losses(twin, seed))
    for optimizer, its_net in ((wrapped, net), (joint, twin)):
        # The transfer loss reaches the front alone.
        optimizer.backward(losses(its_net, 3)[1] / 9, losses(its_net, 4)[1])
    assert wrapped.gates == pytest.approx(joint.gates)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("prepared", ["inside", "outside"])
def test_accelerate_accumulates_as_a_plain_loop(prepared):
    accelerate = framework("accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
        net = network()
        if prepared == "inside":
            optimizer = ours = GatedGradClip(accelerator.prepare(sgd(net.parameters())))
        else:
            optimizer = accelerator.prepare(GatedGradClip(sgd(net.parameters())))
            ours = optimizer.optimizer  # an AcceleratedOptimizer has no `backward`
    compare_accumulation(net, optimizer, ours.backward, lambda _last: accelerator.accumulate(net))
    optimizer.train()
    optimizer.eval()


# Gradients that did not come from the wrapper.

ungated = partial(
    pytest.warns, UserWarning, match=r"optimizer.backward\(task_loss\) is the step on"
)


def plain_step(optimizer, net):
    losses(net, 0)[0].backward()
    optimizer.step()


@pytest.mark.parametrize("clear", ["wrapper", "wrapper in place", "model", "inner", "nothing"])
def test_a_step_on_other_gradients_warns_once(clear):
    on = Loop(sgd, "norm", wrapped=True)
    if clear != "nothing":  # after gated steps too
        on.train(range(2))
        CLEARING[clear](on)
    with ungated():
        plain_step(on.optimizer, on.net)
    plain_step(on.optimizer, on.net)  # warnings are errors here
    on.optimizer.zero_grad()
    plain_step(on.optimizer, on.net)


@all_shells
def test_shells_warn_once_together(shell):
    net = network()
    original = GatedGradClip(sgd(net.parameters()))
    shelled = shell(original)
    losses(net, 0)[0].backward()
    with ungated():
        GatedGradClip.step(shelled)
    original.step()
    GatedGradClip.step(shelled)


def test_a_closure_that_calls_plain_backward_warns_once():
    net = network()
    optimizer = GatedGradClip(sgd(net.parameters()))

    def closure():
        optimizer.zero_grad()
        losses(net, 0)[0].backward()

    with ungated():
        optimizer.step(closure)
    optimizer.step(closure)


def resume(on):
    state = on.optimizer.state_dict()
    on.optimizer = GatedGradClip(sgd(on.net.parameters()))
    on.optimizer.load_state_dict(state)


def only_zeros_at_rate_zero(on):
    """What torch.distributed.checkpoint does to make the state."""
    on.net = network()  # no wrapper has gated its gradients
    on.optimizer = GatedGradClip(sgd(on.net.parameters(), lr=0.0))
    for p in on.net.parameters():
        p.grad = torch.zeros_like(p)


CHANGES = {
    "clipped": lambda on: nn.utils.clip_grad_norm_(on.net.parameters(), 1e-3),
    "clipped by value": lambda on: nn.utils.clip_grad_value_(on.net.parameters(), 1e-3),
    "scaled in place": each_gradient(lambda gradient: gradient.mul_(0.5)),
    "added to": lambda on: losses(on.net, 5)[0].backward(),
    "replaced": each_gradient(torch.nan_to_num),
    "used": lambda on: on.optimizer.step(),
    "used by another": lambda on: GatedGradClip(sgd(on.net.back.parameters())).step(),
    "resumed": resume,
    "zeros": only_zeros_at_rate_zero,
}


@pytest.mark.parametrize("between", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("with_transfer", [True, False])
def test_gated_gradients_may_be_changed_and_used_twice_without_a_warning(between, with_transfer):
    on = Loop(sgd, "norm", wrapped=True)
    for seed in range(2):
        on.optimizer.zero_grad()
        on.optimizer.backward(*losses(on.net, seed)[: 1 + with_transfer])
        between(on)
        on.optimizer.step()  # warnings are errors here
