"""GatedGradClip behaves as the optimizer it wraps, for four optimizers.

Each situation is a loop that runs twice, with the wrapper and with the plain optimizer, on copies
of one network. The plain one gets its gradients by hand: the task's alone where the gate is closed,
else task + gated transfer. Parameters, gradients, states and all that was seen must be the same.
"""

import contextlib
import copy
import io
import pickle
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


def network():
    torch.manual_seed(7)
    return nn.ModuleDict({"front": nn.Linear(5, 6), "back": nn.Linear(6, 3)}).double()


def losses(net, seed):
    """Return a task loss, and one of a much larger gradient that reaches the front alone."""
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    hidden = net.front(x).tanh()
    return (net.back(hidden) - x[:, :3]).square().mean(), 10 * (hidden - 1).square().sum()


def by_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


class Loop:
    """A network and its optimizer, wrapped or plain."""

    bound = 1.0

    def __init__(self, make, gate, *, wrapped):
        self.make, self.gate, self.wrapped = make, gate, wrapped
        self.net = network()
        self.hold(self.net.parameters())

    def hold(self, params):
        self.inner = self.make(params)
        self.optimizer = GatedGradClip(self.inner, self.gate) if self.wrapped else self.inner

    def backward(self, *seeds, scale=lambda loss: loss):
        """Call `backward` once a seed. By hand, leave in every p.grad what it should."""
        if self.wrapped:
            for seed in seeds:
                self.optimizer.backward(*map(scale, losses(self.net, seed)))
            return
        params = [p for p in self.net.parameters() if p.requires_grad]
        task, transfer = map(sum, zip(*(losses(self.net, seed) for seed in seeds), strict=True))
        of_task = torch.autograd.grad(task, params, retain_graph=True)
        of_transfer = torch.autograd.grad(transfer, params, allow_unused=True)
        for p, t, d in zip(params, of_task, of_transfer, strict=True):
            p.grad = t.clone()
            if d is not None and self.gate is not closed:
                p.grad += min(1.0, self.bound * t.norm() / d.norm()) * d

    def train(self, seeds):
        for seed in seeds:
            self.optimizer.zero_grad()
            self.backward(seed)
            self.optimizer.step()

    def values(self):
        """Return copies of parameters, gradients and the optimizer's state."""
        pairs = [(p.detach(), p.grad) for p in self.net.parameters()]
        return copy.deepcopy([pairs, self.optimizer.state_dict()])


def for_each(*rows):
    """Run a situation once for each row of arguments."""

    def enter(situation):
        situation.rows = rows
        return situation

    return enter


CLEARING = {
    "wrapper": lambda on: on.optimizer.zero_grad(),
    "wrapper in place": lambda on: on.optimizer.zero_grad(set_to_none=False),
    "model": lambda on: on.net.zero_grad(),
    "model in place": lambda on: on.net.zero_grad(set_to_none=False),
    "inner": lambda on: on.inner.zero_grad(),
}


class Situations(Loop):
    """Each method is one; what it returns is compared too."""

    def steps(self):
        self.optimizer.step()  # nothing to do yet, and nothing to warn of
        self.train(range(5))

    @for_each([False], [True])
    def closure(self, by_a_hook):
        """A step hook may change the arguments."""

        def evaluate(seed):
            self.optimizer.zero_grad()
            self.backward(seed)
            return losses(self.net, seed)[0].item()

        if by_a_hook:
            other = partial(evaluate, 9)
            self.optimizer.register_step_pre_hook(lambda optimizer, *_: ((optimizer, other), {}))
        return [self.optimizer.step(partial(evaluate, seed)) for seed in range(3)]

    @for_each(*zip(CLEARING))
    def clearing(self, by):
        """Also behind the wrapper's back: it leaves no stale sums."""
        for seed in range(3):
            self.backward(seed)
            self.optimizer.step()
            gradient = weakref.ref(self.net.front.weight.grad)
            CLEARING[by](self)
            assert by != "wrapper" or gradient() is None  # its memory is free

    @for_each(*product([False, True], [None, 0.01], [1, 2]))
    def scaling_clipping_accumulation(self, scaled, max_norm, calls):
        """Only the wrapper's losses are scaled: by powers of two it changes nothing."""
        enabled = scaled and self.wrapped
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=enabled)
        norms = []
        for step in range(4):
            self.optimizer.zero_grad()
            self.backward(*range(step * calls, (step + 1) * calls), scale=scaler.scale)
            scaler.unscale_(self.optimizer)
            if max_norm is not None:
                norms.append(nn.utils.clip_grad_norm_(self.net.parameters(), max_norm))
            scaler.step(self.optimizer)
            scaler.update()
        assert all(norm > max_norm for norm in norms)
        assert scaler.get_scale() == (2.0**12 if enabled else 1.0)
        return norms

    @for_each(
        ["used and clipped"], ["added to"], ["replaced"], ["wrapped anew"], ["used by another"]
    )
    def gradients_changed_before_a_step(self, how):
        """They are still the wrapper's, which warns of nothing."""
        for seed in range(2):
            self.optimizer.zero_grad()
            self.backward(seed)
            if how == "used and clipped":
                self.optimizer.step()
                nn.utils.clip_grad_norm_(self.net.parameters(), 1e-3)
            elif how == "added to":
                losses(self.net, 5)[0].backward()
            elif how == "replaced":
                for p in self.net.parameters():
                    p.grad = p.grad.clone()
            elif how == "wrapped anew":
                self.hold(self.net.parameters())
            elif how == "used by another":
                another = copy.copy(self)
                another.hold(self.net.back.parameters())
                another.optimizer.step()
            self.optimizer.step()

    @for_each(*product(SCHEDULERS, [False, True]))
    def schedulers(self, name, on_inner):
        scheduler = SCHEDULERS[name](self.inner if on_inner else self.optimizer)
        rates = []
        for seed in range(6):
            self.train([seed])
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates.append(self.optimizer.param_groups[0]["lr"])
        assert len(set(rates)) > 1
        return rates

    def a_scheduler_stepped_too_early(self):
        scheduler = lr_scheduler.StepLR(self.optimizer, 1)
        message = r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"
        with pytest.warns(UserWarning, match=message):
            scheduler.step()

    @for_each(*product(["step", "state_dict", "load_state_dict"], ["pre", "post"]))
    def hooks(self, method, when):
        """One that the wrapper has gets the wrapper, one of the inner optimizer gets that."""
        owners, seen = [], []

        def note(owner, optimizer, *_):
            owners.append(optimizer is owner)
            seen.append(copy.deepcopy(self.optimizer.param_groups))

        handles = [
            getattr(owner, f"register_{method}_{when}_hook")(partial(note, owner))
            for owner in (self.optimizer, self.inner)
        ]
        for seed in range(2):
            self.train([seed])
            state = self.optimizer.state_dict()
            state["param_groups"][0]["lr"] /= 2
            self.optimizer.load_state_dict(state)
            for handle in handles:
                handle.remove()
        assert owners == [True, True]  # in the second round they are removed
        return seen

    def hooks_that_replace_the_state(self):
        def at_rate(rate, _optimizer, state):
            state["written"] = rate  # into a state to load: the caller's must not have it
            return {**state, "param_groups": [{**g, "lr": rate} for g in state["param_groups"]]}

        self.optimizer.register_state_dict_post_hook(partial(at_rate, 0.25))
        state = self.optimizer.state_dict()
        self.optimizer.register_load_state_dict_pre_hook(partial(at_rate, 0.5))
        self.optimizer.load_state_dict(state)
        return self.optimizer.param_groups[0]["lr"], state

    @for_each([False], [True])
    def resuming_from_a_file(self, by_the_other_kind):
        """A wrapper also loads the state of a plain optimizer, and the other way round."""
        resumed = Loop(self.make, self.gate, wrapped=self.wrapped != by_the_other_kind)
        for run in (self, resumed):
            run.scheduler = SCHEDULERS["CosineAnnealingLR"](run.optimizer)
        self.train(range(3))
        self.scheduler.step()
        for part in ("net", "optimizer", "scheduler"):
            state = by_file(getattr(self, part).state_dict())
            getattr(resumed, part).load_state_dict(state)
        for run in (self, resumed):
            run.scheduler.step()
            run.train(range(3, 6))
        (assert_near if by_the_other_kind else assert_equal)(resumed.values(), self.values())

    @for_each([copy.deepcopy], [by_pickle])
    def copies_of_model_and_optimizer(self, how):
        lr_scheduler.StepLR(self.optimizer, 10)  # replaces `step` on the instance
        self.optimizer.register_step_post_hook(lambda *_: None)  # is in no copy, and need not be
        self.backward(9)  # stands in `p.grad` when the copy is made, and is no part of it
        twin = copy.copy(self)
        twin.net, twin.optimizer = how((self.net, self.optimizer))
        before = self.values()
        twin.train(range(3))
        assert_equal(self.values(), before)
        self.train(range(3))
        assert_equal(twin.values(), self.values())

    def a_param_group_added_later(self):
        """One of its parameters is reached by no loss: it has neither gradient nor state."""
        spare = nn.Parameter(torch.ones(3))
        self.hold(self.net.back.parameters())
        self.optimizer.add_param_group({"params": [*self.net.front.parameters(), spare], "lr": 0.5})
        self.train(range(3))
        return spare.detach(), spare.grad, spare in self.optimizer.state

    def parameters_frozen_and_thawed(self):
        self.net.front.bias.requires_grad_(False)
        self.train(range(3))
        assert self.net.front.bias.grad is None
        self.net.front.bias.requires_grad_(True)
        self.train([3])

    def state_groups_and_defaults_assigned(self):
        optimizer, (group,) = self.optimizer, self.optimizer.param_groups
        front, back = (list(part.parameters()) for part in (self.net.front, self.net.back))
        optimizer.param_groups = [{**group, "params": front}, {**group, "params": back, "lr": 0.2}]
        optimizer.state = copy.copy(optimizer.state)
        optimizer.defaults = {**optimizer.defaults, "lr": 0.3}
        self.train(range(3))
        optimizer.load_state_dict(optimizer.state_dict())  # replaces these objects
        for name in ("param_groups", "state", "defaults"):
            assert getattr(optimizer, name) is getattr(self.inner, name)
        return optimizer.defaults["lr"], len(optimizer.state)

    def settings_replaced_between_steps(self):
        """The wrapped optimizer is one of them; a group of one process changes nothing."""
        self.train([0])
        if self.wrapped:
            self.optimizer.optimizer = self.make(self.net.parameters())
            self.optimizer.process_group = torch.distributed.group.WORLD
        else:
            self.hold(self.net.parameters())
        self.train([1, 2])

    def an_optimizer_that_needs_a_closure(self):
        self.make = partial(LBFGS, max_iter=4)
        self.hold(self.net.parameters())
        return self.closure(by_a_hook=False)


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = f"file://{tmp_path_factory.mktemp('store')}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


NAMES_AND_ROWS = [
    pytest.param(name, row, id="-".join([name, *(getattr(v, "__name__", str(v)) for v in row)]))
    for name, situation in vars(Situations).items()
    if not name.startswith("__")
    for row in getattr(situation, "rows", [()])
]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("gate", [closed, "norm"], ids=["closed", "norm"])
@pytest.mark.parametrize(("name", "row"), NAMES_AND_ROWS)
def test_a_loop_runs_as_with_the_plain_optimizer(name, row, gate, make):
    runs = [Situations(make, gate, wrapped=wrapped) for wrapped in (True, False)]
    seen = [getattr(run, name)(*row) for run in runs]
    # Sums of several calls are rounded in another order.
    exact = gate is closed and name != "scaling_clipping_accumulation"
    compare = assert_equal if exact else assert_near
    compare(*seen)
    compare(*(run.values() for run in runs))


@pytest.mark.parametrize("make", [SGD, AdamW])
@pytest.mark.parametrize("transfers", [False, True])
@pytest.mark.parametrize("of_weights", [torch.contiguous_format, torch.channels_last])
def test_a_fused_optimizer_finds_gradients_laid_out_as_parameters(of_weights, transfers, make):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).to(memory_format=of_weights)
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


# What the plain optimizer has no counterpart of.


def test_the_wrapper_is_an_optimizer_and_shows_its_settings():
    inner = sgd(network().parameters())
    optimizer = GatedGradClip(inner, "sigmoid", scope="global", bound=2)
    assert isinstance(optimizer, Optimizer)
    settings = "gate='sigmoid', scope='global', bound=2.0"
    assert repr(optimizer) == f"GatedGradClip({settings}, optimizer={inner!r})"


def overflow(optimizer, net):
    """Call `backward` with a transfer gradient that is not finite: a skipped step."""
    task, transfer = losses(net, 0)
    optimizer.backward(task, transfer * float("inf"))


@pytest.mark.parametrize("capturable", [True, False])
def test_the_count_of_skipped_steps_is_saved_and_a_plain_state_resets_it(capturable):
    net = network()
    plain = sgd(net.parameters())
    optimizer = GatedGradClip(sgd(net.parameters()), capturable=capturable)
    overflow(optimizer, net)
    counter, state = optimizer.skipped, optimizer.state_dict()
    optimizer.load_state_dict(plain.state_dict())
    assert int(optimizer.skipped) == 0
    assert int(state["skipped"]) == 1  # nothing writes to what was saved
    assert ("skipped" in optimizer.state_dict()) == capturable  # to look at a tensor would sync
    optimizer.load_state_dict(by_file(state))
    assert int(optimizer.skipped) == 1
    assert not capturable or optimizer.skipped is counter  # where a captured step counts
    plain.load_state_dict(state)  # the plain one leaves the rest alone


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


# Frameworks mix their own class with the optimizer's, or keep it from stepping.


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
    fabric = pytest.importorskip("lightning.fabric", reason="needs the extra `integrations`")
    return fabric.Fabric(accelerator="cpu", devices=1).setup_optimizers(optimizer)


ungated = partial(pytest.warns, UserWarning, match=r"optimizer.backward\(task_loss\) adds a task")


@pytest.mark.parametrize("shell", [Mixed, Copied, fabric_shell])
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
        second.bound = plain.bound = bound
        first.backward(*losses(on.net, seed))
        second.backward(*losses(on.net, seed + 10))
        plain.backward(seed, seed + 10)
        assert first.gates == second.gates != []
        first.step()
        plain.optimizer.step()
        assert_near(on.values(), plain.values())
        second.zero_grad()
        assert all(p.grad is None for p in on.net.parameters())
    losses(on.net, 0)[0].backward()
    with ungated():
        first.step()
    second.step()  # they warn once together; warnings are errors here
    for setting, value in {"gate": closed, "scope": "global", "process_group": None}.items():
        setattr(first, setting, value)
        assert getattr(second, setting) == value
    overflow(first, on.net)
    assert second.skipped == first.skipped == 1
    first.load_state_dict({**plain.optimizer.state_dict(), "skipped": 7})
    assert GatedGradClip.state_dict(second)["skipped"] == 7


def shallow(pair):
    return copy.copy(pair[0]), pair[1]


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("how", [shallow, copy.deepcopy, by_pickle])
@pytest.mark.parametrize("shell", [None, Mixed, Copied, fabric_shell])
def test_a_copy_has_settings_and_a_count_of_its_own(shell, how, capturable, monkeypatch):
    net, group = network(), torch.distributed.group.WORLD
    settings = {"bound": 0.5, "scope": "global", "process_group": group, "capturable": capturable}
    original = GatedGradClip(sgd(net.parameters()), closed, **settings)
    overflow(original, net)
    copied = original if shell is None else shell(original)
    if how is by_pickle and shell is not None:
        # Around a plain optimizer too, the class of a shell must be found by name.
        with pytest.raises((pickle.PicklingError, AttributeError), match=r"Can't (pickle|get)"):
            how(copied)
        type(copied).__module__, type(copied).__qualname__ = __name__, "FoundByName"
        monkeypatch.setitem(globals(), "FoundByName", type(copied))
    twin, original_or_its_twin = how((copied, original))
    assert type(twin) is type(copied)
    assert (twin.gate, twin.bound, twin.scope) == (closed, 0.5, "global")
    assert (int(twin.skipped), twin.gates, twin.capturable) == (1, [], capturable)
    assert twin.process_group is (None if how is by_pickle else group)
    twin.bound = twin.param_groups[0]["lr"] = 9.0
    twin.skipped += 1
    assert (original.bound, int(original.skipped)) == (0.5, 1)
    # A shallow copy shares the wrapped optimizer. What is copied together stays one.
    assert original.param_groups[0]["lr"] == (9.0 if how is shallow else 0.1)
    assert original_or_its_twin.bound == (0.5 if how is shallow else 9.0)


@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle])
def test_copies_follow_a_gate_that_holds_the_optimizer(how):
    gate = partial(closed)
    gate.optimizer = GatedGradClip(sgd(network().parameters()), gate)
    twin = how(gate.optimizer)
    assert twin.gate.optimizer is twin


def test_train_and_eval_reach_a_schedule_free_optimizer_and_no_other():
    inner, calls = sgd(network().parameters()), []
    optimizer = Mixed(GatedGradClip(inner))
    assert optimizer.train() is optimizer.eval() is None
    inner.train, inner.eval = partial(calls.append, "train"), partial(calls.append, "eval")
    optimizer.train()
    optimizer.eval()
    assert calls == ["train", "eval"]


class Accumulates(SGD):
    """Steps and clears at every third call, as an optimizer that accelerate has prepared."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        return super().step(closure) if self.calls % 3 == 0 else None

    def zero_grad(self, set_to_none=True):
        if self.calls % 3 == 0:
            super().zero_grad(set_to_none)


def assert_accumulates(net, optimizer, accumulate):
    """Train in steps of three calls, beside a plain loop."""
    plain = Loop(sgd, "norm", wrapped=False)
    for seed in range(6):
        with accumulate(net):
            optimizer.backward(*losses(net, seed))
            optimizer.step()
            optimizer.zero_grad()
        if seed % 3 == 2:
            plain.backward(seed - 2, seed - 1, seed)
            plain.optimizer.step()
            assert_near(net.state_dict(), plain.net.state_dict())


def test_sums_outlive_a_zero_grad_that_clears_nothing():
    net = network()
    unused = torch.zeros(1, requires_grad=True)
    inner = Accumulates([*net.parameters(), unused], lr=0.1, momentum=0.9)
    assert_accumulates(net, GatedGradClip(inner), contextlib.nullcontext)


def test_leaves_outside_take_part_while_zero_grad_clears_nothing():
    seen = []
    for held in (["front"], ["front", "back"]):
        net = network()
        params = [p for part in held for p in net[part].parameters()]
        optimizer = GatedGradClip(Accumulates(params, lr=0.1), scope="global")
        for seed in range(2):
            optimizer.backward(*losses(net, seed))
            optimizer.step()
            optimizer.zero_grad()
        # These losses reach the front alone; the norm is that of all task gradients so far.
        optimizer.backward(losses(net, 3)[1] / 9, losses(net, 4)[1])
        seen.append([*optimizer.gates, *(p.grad for p in net.parameters())])
    assert_near(*seen)


def test_accelerate_may_prepare_the_wrapped_optimizer():
    accelerate = pytest.importorskip("accelerate", reason="needs the extra `integrations`")
    accelerator, net = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3), network()
    optimizer = GatedGradClip(accelerator.prepare(sgd(net.parameters())))
    assert_accumulates(net, optimizer, accelerator.accumulate)


def plain_step(on):
    """Step on gradients that did not come from the wrapper."""
    losses(on.net, 0)[0].backward()
    on.optimizer.step()


def plain_closure(on):
    on.optimizer.step(losses(on.net, 0)[0].backward)


@pytest.mark.parametrize("step", [plain_step, plain_closure])
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


def test_a_step_at_rate_zero_warns_of_nothing():
    """By one, torch.distributed.checkpoint makes the state."""
    on = Loop(partial(sgd, lr=0.0), "norm", wrapped=True)
    plain_step(on)
    on.optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.1})
    with ungated():
        plain_step(on)
