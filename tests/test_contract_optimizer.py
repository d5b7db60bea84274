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
from itertools import product

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
sgd = partial(SGD, lr=0.1, momentum=0.9)
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)
assert_near = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


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


def gradients_by_hand(net, seeds, gate="norm", bound=1.0):
    """Leave in every p.grad what the wrapper should after a backward call for each seed."""
    params = [p for p in net.parameters() if p.requires_grad]
    task, transfer = map(sum, zip(*(losses(net, seed) for seed in seeds), strict=True))
    task_gradients = torch.autograd.grad(task, params, retain_graph=True)
    transfer_gradients = torch.autograd.grad(transfer, params, allow_unused=True)
    for p, t, d in zip(params, task_gradients, transfer_gradients, strict=True):
        p.grad = t.clone()
        if d is not None and gate is not closed:
            p.grad += min(1.0, bound * t.norm() / d.norm()) * d


class Loop:
    """A network and its optimizer, wrapped or plain."""

    def __init__(self, make, gate, *, wrapped):
        self.make, self.gate, self.wrapped = make, gate, wrapped
        self.net = network()
        self.optimizer = self.wrap(make(self.net.parameters()))

    def wrap(self, optimizer):
        return GatedGradClip(optimizer, self.gate) if self.wrapped else optimizer

    def inner(self):
        return self.optimizer.optimizer if self.wrapped else self.optimizer

    def backward(self, *seeds, scale=lambda loss: loss):
        """Call `backward` once a seed; by hand it is a step's first and only one, unscaled."""
        if self.wrapped:
            for seed in seeds:
                self.optimizer.backward(*map(scale, losses(self.net, seed)))
        else:
            gradients_by_hand(self.net, seeds, self.gate)

    def train(self, seeds):
        for seed in seeds:
            self.optimizer.zero_grad()
            self.backward(seed)
            self.optimizer.step()

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
    on.optimizer.step()  # nothing to do yet, and nothing to warn of
    on.train(range(5))


@situation()
def closure(on):
    def evaluate(seed):
        on.optimizer.zero_grad()
        on.backward(seed)
        return losses(on.net, seed)[0].item()

    return [on.optimizer.step(partial(evaluate, seed)) for seed in range(3)]


CLEARING = {
    "wrapper": lambda on: on.optimizer.zero_grad(),
    "wrapper in place": lambda on: on.optimizer.zero_grad(set_to_none=False),
    "model": lambda on: on.net.zero_grad(),
    "model in place": lambda on: on.net.zero_grad(set_to_none=False),
    "inner": lambda on: on.inner().zero_grad(),
}


@situation(*[(by,) for by in CLEARING])
def clearing(on, by):
    """Also behind the wrapper's back: it leaves no stale sums."""
    for seed in range(3):
        on.backward(seed)
        on.optimizer.step()
        CLEARING[by](on)


@situation(*product([False, True], [None, 0.01], [1, 2]))
def scaling_clipping_accumulation(on, scaled, max_norm, calls):
    """Only the wrapper's losses are scaled: by powers of two it changes nothing."""
    enabled = scaled and on.wrapped
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=enabled)
    norms = []
    for step in range(4):
        on.optimizer.zero_grad()
        on.backward(*range(step * calls, (step + 1) * calls), scale=scaler.scale)
        scaler.unscale_(on.optimizer)
        if max_norm is not None:
            norms.append(nn.utils.clip_grad_norm_(on.net.parameters(), max_norm))
        scaler.step(on.optimizer)
        scaler.update()
    assert all(norm > max_norm for norm in norms)
    assert scaler.get_scale() == (2.0**12 if enabled else 1.0)
    return norms


# Schedulers, hooks.


@situation(*product(SCHEDULERS, [False, True]))
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


@situation(*product(["step", "state_dict", "load_state_dict"], ["pre", "post"]))
def hooks(on, method, when):
    """One that the wrapper has gets the wrapper, one of the inner optimizer gets that."""
    owners, seen = [], []

    def note(owner, optimizer, *_):
        owners.append(optimizer is owner)
        seen.append(copy.deepcopy([*on.net.parameters(), on.optimizer.param_groups[0]["lr"]]))

    handles = [
        getattr(owner, f"register_{method}_{when}_hook")(partial(note, owner))
        for owner in (on.optimizer, on.inner())
    ]
    for seed in range(2):
        on.train([seed])
        state = on.optimizer.state_dict()
        state["param_groups"][0]["lr"] /= 2
        on.optimizer.load_state_dict(state)
        for handle in handles:
            handle.remove()
    assert owners == [True, True]  # in the second round they are removed
    return seen


@situation()
def a_step_hook_that_changes_the_arguments(on):
    def evaluate():
        on.backward(0)
        return 42.0

    on.optimizer.register_step_pre_hook(lambda _, args, kwargs: ((*args, evaluate), kwargs))
    return on.optimizer.step()


@situation()
def hooks_that_replace_the_state(on):
    def at_rate(rate, _optimizer, state):
        state["written"] = rate  # into a state to load: the caller's must not have it
        return {**state, "param_groups": [{**g, "lr": rate} for g in state["param_groups"]]}

    on.optimizer.register_state_dict_post_hook(partial(at_rate, 0.25))
    state = on.optimizer.state_dict()
    on.optimizer.register_load_state_dict_pre_hook(partial(at_rate, 0.5))
    on.optimizer.load_state_dict(state)
    return on.optimizer.param_groups[0]["lr"], state


# State: resuming, copies.


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@situation((False,), (True,))
def resuming_from_a_file(on, by_the_other_kind):
    """A wrapper also loads the state of a plain optimizer, and the other way round."""
    resumed = Loop(on.make, on.gate, wrapped=on.wrapped != by_the_other_kind)

    def train(run, schedule, seeds):
        for seed in seeds:
            run.train([seed])
            schedule.step()

    schedules = [SCHEDULERS["CosineAnnealingLR"](run.optimizer) for run in (on, resumed)]
    train(on, schedules[0], range(3))
    parts = zip((on.net, on.optimizer), (resumed.net, resumed.optimizer), strict=True)
    for saved, loaded in (*parts, schedules):
        loaded.load_state_dict(through_file(saved.state_dict()))
    for run, schedule in zip((on, resumed), schedules, strict=True):
        train(run, schedule, range(3, 6))
    (assert_near if by_the_other_kind else assert_equal)(resumed.values(), on.values())


def by_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


@situation((copy.deepcopy,), (by_pickle,))
def copies_of_model_and_optimizer(on, how):
    lr_scheduler.StepLR(on.optimizer, 10)  # replaces `step` on the instance
    on.optimizer.register_step_post_hook(lambda *_: None)  # is in no copy, and need not be
    on.backward(9)  # stands in `p.grad` when the copy is made, and is no part of it
    twin = copy.copy(on)
    twin.net, twin.optimizer = how((on.net, on.optimizer))
    held = twin.optimizer.param_groups[0]["params"]
    assert all(p is q for p, q in zip(held, twin.net.parameters(), strict=True))
    before = on.values()
    twin.train(range(3))
    assert_equal(on.values(), before)
    on.train(range(3))
    assert_equal(twin.values(), on.values())


# Param groups, parameters, settings.


@situation()
def a_param_group_added_later(on):
    """One of its parameters is reached by no loss: it has neither gradient nor state."""
    spare = nn.Parameter(torch.ones(3))
    on.optimizer = on.wrap(on.make(on.net.back.parameters()))
    on.optimizer.add_param_group({"params": [*on.net.front.parameters(), spare], "lr": 0.5})
    on.train(range(3))
    assert spare.grad is None
    return spare.detach(), spare in on.optimizer.state


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
def settings_replaced_between_steps(on):
    """The wrapped optimizer is one of them; a group of one process changes nothing."""
    on.train([0])
    other = on.make(on.net.parameters())
    if on.wrapped:
        on.optimizer.optimizer = other
        on.optimizer.process_group = torch.distributed.group.WORLD
    else:
        on.optimizer = other
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
    # Sums of several calls are rounded in another order.
    exact = gate is closed and function is not scaling_clipping_accumulation
    compare = assert_equal if exact else assert_near
    compare(*seen)
    compare(*(on.values() for on in runs))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("gate", [closed, "norm"], ids=["closed", "norm"])
@pytest.mark.parametrize("name", SITUATIONS)
def test_a_loop_runs_as_with_the_plain_optimizer(name, gate, make):
    assert_runs_alike(name, make, gate)


def test_an_optimizer_that_needs_a_closure_can_be_wrapped():
    assert_runs_alike("closure", partial(LBFGS, max_iter=4), closed)


FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("make", [SGD, AdamW])
@pytest.mark.parametrize("transfers", [False, True])
@pytest.mark.parametrize("of_images", FORMATS)
@pytest.mark.parametrize("of_weights", FORMATS)
def test_a_fused_optimizer_finds_gradients_laid_out_as_parameters(
    of_weights, of_images, transfers, make
):
    """Autograd lays them out as the images."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    plain.to(memory_format=of_weights)
    net, images = copy.deepcopy(plain), torch.randn(2, 3, 8, 8).to(memory_format=of_images)
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


def overflow(optimizer, net):
    """Call `backward` with a transfer gradient that is not finite: a skipped step."""
    task, transfer = losses(net, 0)
    optimizer.backward(task, transfer * float("inf"))


@pytest.mark.parametrize("capturable", [True, False])
def test_the_count_of_skipped_steps_is_saved_and_a_plain_state_resets_it(capturable):
    net = network()
    optimizer = GatedGradClip(sgd(net.parameters()), capturable=capturable)
    overflow(optimizer, net)
    counter, state = optimizer.skipped, through_file(optimizer.state_dict())
    assert int(state["skipped"]) == 1
    plain = sgd(net.parameters())
    optimizer.load_state_dict(plain.state_dict())
    assert int(optimizer.skipped) == 0
    assert ("skipped" in optimizer.state_dict()) == capturable  # to look at a tensor would sync
    optimizer.load_state_dict(state)
    assert int(optimizer.skipped) == 1
    assert not capturable or optimizer.skipped is counter  # where a captured step counts
    plain.load_state_dict(state)  # the plain one leaves the rest alone


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, by_pickle])
def test_a_copy_has_settings_and_a_count_of_its_own(how, capturable, one_process):
    net, gate = network(), partial(closed)
    settings = {"bound": 0.5, "scope": "global", "process_group": one_process}
    optimizer = GatedGradClip(sgd(net.parameters()), gate, capturable=capturable, **settings)
    gate.optimizer = optimizer  # a cycle
    overflow(optimizer, net)
    twin = how(optimizer)
    assert repr(twin) == repr(optimizer)
    assert twin.gate.optimizer is (optimizer if how is copy.copy else twin)
    assert twin.process_group is (None if how is by_pickle else one_process)
    assert (int(twin.skipped), twin.gates, twin.capturable) == (1, [], capturable)
    twin.skipped += 1
    twin.bound = 9.0
    assert (int(optimizer.skipped), optimizer.bound) == (1, 0.5)
    saved = optimizer.state_dict()["skipped"]
    optimizer.skipped += 1
    assert int(saved) == 1


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
    torch.testing.assert_close(on.net.state_dict(), plain.net.state_dict())
    assert scaler.get_scale() == 2.0**9
    assert on.optimizer.skipped == 1


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
        return self._optimizer.step(closure)

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class Copied:
    """The classes are mixed, the __dict__ copied; a plain attribute is called as ours."""

    def __init__(self, optimizer):
        self.__dict__.update(optimizer.__dict__)
        self.__class__ = type("Shell", (type(self), type(optimizer)), {})
        self.optimizer = optimizer

    def step(self, closure=None):
        return self.optimizer.step(closure)


def fabric_shell(optimizer):
    fabric = framework("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    return fabric.setup_optimizers(optimizer)


def lightning_shell(optimizer):
    return framework("lightning.pytorch.core.optimizer").LightningOptimizer(optimizer)


SHELLS = {"mixed": Mixed, "copied": Copied, "fabric": fabric_shell}
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
        assert_near(on.values(), plain.values())
        second.zero_grad()
        assert all(p.grad is None for p in on.net.parameters())
    for setting, value in {"gate": closed, "scope": "global", "process_group": None}.items():
        setattr(first, setting, value)
        assert getattr(second, setting) == value
    overflow(first, on.net)
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


def test_train_and_eval_reach_a_schedule_free_optimizer_and_no_other():
    inner, calls = sgd(network().parameters()), []
    optimizer = Mixed(GatedGradClip(inner))
    assert optimizer.train() is optimizer.eval() is None
    inner.train, inner.eval = partial(calls.append, "train"), partial(calls.append, "eval")
    optimizer.train()
    optimizer.eval()
    assert calls == ["train", "eval"]


# Accumulation by a framework: an optimizer whose `step` and `zero_grad` often do nothing.


class Accumulates(SGD):
    """Steps and clears at every third call, as an optimizer that accelerate has prepared."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        return super().step(closure) if self.calls % 3 == 0 else None

    def zero_grad(self, set_to_none=True):
        if self.calls % 3 == 0:
            super().zero_grad(set_to_none)


def assert_accumulates(net, optimizer, backward, accumulate):
    """Train in steps of three calls, beside a plain loop."""
    plain = Loop(sgd, "norm", wrapped=False)
    for seed in range(6):
        with accumulate(net):
            backward(*losses(net, seed))
            optimizer.step()
            optimizer.zero_grad()
        if seed % 3 == 2:
            plain.backward(seed - 2, seed - 1, seed)
            plain.optimizer.step()
            assert_near(net.state_dict(), plain.net.state_dict())


def test_sums_outlive_a_zero_grad_that_clears_nothing():
    net = network()
    optimizer = GatedGradClip(Accumulates(net.parameters(), lr=0.1, momentum=0.9))
    assert_accumulates(net, optimizer, optimizer.backward, contextlib.nullcontext)


@pytest.mark.parametrize("scope", ["parameter", "global"])
def test_leaves_outside_take_part_while_zero_grad_clears_nothing(scope):
    net, twin = network(), network()
    wrapped = GatedGradClip(Accumulates(net.front.parameters(), lr=0.1), scope=scope)
    joint = GatedGradClip(sgd(twin.parameters()), scope=scope)
    for seed in range(2):
        wrapped.backward(*losses(net, seed))
        wrapped.step()
        wrapped.zero_grad()
        joint.backward(*losses(twin, seed))
    for optimizer, its_net in ((wrapped, net), (joint, twin)):
        # The transfer loss reaches the front alone.
        optimizer.backward(losses(its_net, 3)[1] / 9, losses(its_net, 4)[1])
    assert wrapped.gates == pytest.approx(joint.gates)
    assert_near(*([p.grad for p in its_net.parameters()] for its_net in (net, twin)))


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
    assert_accumulates(net, optimizer, ours.backward, accelerator.accumulate)
    optimizer.train()
    optimizer.eval()


# Gradients that did not come from the wrapper.

ungated = partial(
    pytest.warns, UserWarning, match=r"optimizer.backward\(task_loss\) is the step on"
)


def plain_step(on):
    losses(on.net, 0)[0].backward()
    on.optimizer.step()


def plain_step_by_closure(on):
    on.optimizer.step(lambda: losses(on.net, 0)[0].backward())


@pytest.mark.parametrize("step", [plain_step, plain_step_by_closure])
@pytest.mark.parametrize("clear", ["wrapper", "wrapper in place", "model", "inner", "nothing"])
def test_a_step_on_other_gradients_warns_once(clear, step):
    on = Loop(sgd, "norm", wrapped=True)
    if clear != "nothing":  # after gated steps too
        on.train(range(2))
        CLEARING[clear](on)
    with ungated():
        step(on)
    step(on)  # warnings are errors here
    on.optimizer.zero_grad()
    step(on)


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


def test_a_step_at_rate_zero_warns_of_nothing():
    """By one, torch.distributed.checkpoint makes the state."""
    on = Loop(partial(sgd, lr=0.0), "norm", wrapped=True)
    plain_step(on)


def replace_gradients(on):
    for p in on.net.parameters():
        p.grad = p.grad.clone()


def resume(on):
    state = on.optimizer.state_dict()
    on.optimizer = GatedGradClip(sgd(on.net.parameters()))
    on.optimizer.load_state_dict(state)


CHANGES = {
    "clipped": lambda on: nn.utils.clip_grad_norm_(on.net.parameters(), 1e-3),
    "added to": lambda on: losses(on.net, 5)[0].backward(),
    "replaced": replace_gradients,
    "used": lambda on: on.optimizer.step(),
    "used by another": lambda on: GatedGradClip(sgd(on.net.back.parameters())).step(),
    "resumed": resume,
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
