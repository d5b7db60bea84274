"""GatedGradClip behaves as the optimizer it wraps, for four optimizers.

In the first part every loop runs twice, with the wrapper and with the plain optimizer. The gate is
a constant, 0 or 1, so that the plain loss is task + gate · transfer. Parameters, gradients, states
and all else that was seen must be the same. Then comes what has no plain counterpart.
"""

import copy
import io
import math
import pickle
import weakref
from collections import defaultdict
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, RMSprop, lr_scheduler

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss


def constant(factor, *_norms):
    return factor


GATES = {"closed": partial(constant, 0.0), "opened": partial(constant, 1.0)}
OPTIMIZERS = {
    "SGD": partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01, fused=True),
    "Adam": partial(Adam, lr=0.01, weight_decay=0.01),
    "AdamW": partial(AdamW, lr=0.01, weight_decay=0.1, amsgrad=True, fused=True),
    "RMSprop": partial(RMSprop, lr=0.01, momentum=0.9, centered=True),
}


def network():
    """Return two layers with different memory formats: fused optimizers mind them."""
    torch.manual_seed(7)
    net = nn.ModuleDict({"front": nn.Conv2d(2, 3, 2), "back": nn.Conv2d(3, 2, 2)}).double()
    net.back.to(memory_format=torch.channels_last)
    net.spare = nn.Parameter(torch.ones(3))  # no loss reaches it
    return net


def losses(net, seed):
    """Return a task loss, and a transfer loss that reaches the front alone."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 2, 3, 3, dtype=torch.float64, generator=generator)
    hidden = net.front(images.to(memory_format=torch.channels_last)).tanh()
    return (net.back(hidden) - 1).square().mean(), (hidden - 1).square().sum()


def by_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


class Loop:
    """A network and its optimizer, wrapped or plain, and what was seen of them."""

    def __init__(self, make, gate, *, wrapped):
        self.make, self.gate, self.wrapped = make, gate, wrapped
        self.net, self.seen = network(), []
        self.hold(self.net.parameters())

    def hold(self, params):
        self.inner = self.make(params)
        self.optimizer = GatedGradClip(self.inner, self.gate) if self.wrapped else self.inner

    def backward(self, seed, scale=lambda loss: loss):
        task, transfer = losses(self.net, seed)
        if self.wrapped:
            self.optimizer.backward(scale(task), scale(transfer))
        else:
            scale(task + self.gate() * transfer).backward()

    def evaluate(self, seed):
        """Do what a closure does."""
        self.optimizer.zero_grad()
        self.backward(seed)
        return losses(self.net, seed)[0].item()

    def train(self, seeds):
        for seed in seeds:
            self.evaluate(seed)
            self.optimizer.step()

    def see(self, *values):
        self.seen.append(copy.deepcopy(values))

    def assert_same(self, other):
        """Compare everything: with the closed gate bit by bit."""
        for run in (self, other):
            run.see([(p.detach(), p.grad) for p in run.net.parameters()])
            run.see(run.optimizer.state_dict())
        rtol, atol = (0, 0) if self.gate is GATES["closed"] else (1e-9, 1e-12)
        torch.testing.assert_close(self.seen, other.seen, rtol=rtol, atol=atol)


class Events(Loop):
    """What may happen between `backward` and `step`, a method each."""

    def gradients_used_and_clipped(self):
        self.optimizer.step()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1e-3)

    def losses_scaled_and_gradients_accumulated(self):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
        self.optimizer.zero_grad()
        self.backward(5, scaler.scale)
        self.backward(6, scaler.scale)
        scaler.unscale_(self.optimizer)
        scaler.step(self.optimizer)
        scaler.update()
        self.see(scaler.get_scale())

    def gradients_added_to(self):
        losses(self.net, 5)[0].backward()

    def gradients_replaced(self):
        for p in self.net.parameters():
            p.grad = copy.deepcopy(p.grad)

    def gradients_used_by_another(self):
        another = copy.copy(self)
        another.hold(self.net.back.parameters())
        another.optimizer.step()

    def wrapped_anew(self):
        self.hold(self.net.parameters())

    def wrapped_optimizer_replaced(self):
        if self.wrapped:
            self.optimizer.optimizer = self.make(self.net.parameters())
        else:
            self.hold(self.net.parameters())

    def param_group_added(self):
        self.hold(self.net.back.parameters())
        self.optimizer.add_param_group({"params": self.net.front.parameters(), "lr": 0.5})

    def parameter_frozen_or_thawed(self):
        bias = self.net.front.bias
        self.see(bias.grad)
        bias.requires_grad_(not bias.requires_grad)

    def groups_state_and_defaults_assigned(self):
        optimizer, group = self.optimizer, self.optimizer.param_groups[0]
        parts = [list(part.parameters()) for part in (self.net.front, self.net.back)]
        optimizer.param_groups = [{**group, "params": part, "lr": 0.2} for part in parts]
        optimizer.state = defaultdict(dict)
        optimizer.defaults = {**optimizer.defaults, "lr": 0.3}
        optimizer.load_state_dict(optimizer.state_dict())  # replaces these objects
        for name in ("param_groups", "state", "defaults"):
            assert getattr(optimizer, name) is getattr(self.inner, name)
        self.see(optimizer.defaults)

    def closures_called(self):
        self.see(self.optimizer.step(partial(self.evaluate, 5)))
        another = copy.copy(self)
        another.make = partial(LBFGS, max_iter=4)  # calls it several times a step
        another.hold(self.net.front.parameters())
        self.see(another.optimizer.step(partial(another.evaluate, 6)))

    def hooks_registered_and_removed(self):
        """One of the wrapper gets the wrapper, one of the inner optimizer gets that."""
        handles = [
            getattr(owner, f"register_{method}_{when}_hook")(partial(self._hook, owner))
            for owner in (self.optimizer, self.inner)
            for method in ("step", "state_dict", "load_state_dict")
            for when in ("pre", "post")
        ]
        state = self.optimizer.state_dict()
        self.optimizer.load_state_dict(state)
        self.optimizer.step()
        self.see(state)
        for handle in handles:
            handle.remove()

    def _hook(self, owner, optimizer, *given):
        """Note what is seen, and return something else in place of what is given."""
        self.see(optimizer is owner, self.optimizer.param_groups)
        if not given:
            return None
        if len(given) == 2:  # the arguments of `step`: put in a closure
            return (optimizer, partial(self.evaluate, 5)), {}
        (state,) = given
        state["hooks"] = state.get("hooks", 0) + 1  # the caller's state to load stays as it is
        groups = [{**group, "lr": 0.9 * group["lr"]} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    def resumed_from_files(self):
        """Each kind loads the state of the other. The plain loop is left alone."""
        if self.wrapped:
            plain = self.make(self.net.parameters())
            plain.load_state_dict(by_file(self.optimizer.state_dict()))
            self.hold(self.net.parameters())
            self.optimizer.load_state_dict(by_file(plain.state_dict()))

    def copied_and_pickled(self):
        """A copy trains on, without the gradients, and so does the original as if alone."""
        self.optimizer.register_step_post_hook(lambda *_: None)  # is in no copy, and need not be
        lr_scheduler.StepLR(self.optimizer, 10)  # replaces `step` on the instance
        for twin in (copy.deepcopy(self), by_pickle(self)):
            twin.optimizer.step()
            twin.train([5])
            self.see(twin.net.state_dict(), twin.optimizer.state_dict())


@pytest.fixture(params=zip(OPTIMIZERS, [*GATES] * 2, strict=True), ids="-".join)
def both(request):
    """Return the loop with the wrapper and the plain one."""
    make, gate = OPTIMIZERS[request.param[0]], GATES[request.param[1]]
    return [Events(make, gate, wrapped=wrapped) for wrapped in (True, False)]


CLEARING = {
    "cleared": lambda on: on.optimizer.zero_grad(),
    "cleared in place": lambda on: on.optimizer.zero_grad(set_to_none=False),
    "cleared by the inner": lambda on: on.inner.zero_grad(),
    "cleared by the model": lambda on: on.net.zero_grad(),
    "cleared by the model in place": lambda on: on.net.zero_grad(set_to_none=False),
}
EVENTS = [name for name in vars(Events) if not name.startswith("_")]


@pytest.mark.parametrize("event", [*CLEARING, *EVENTS])
def test_a_step_is_that_of_the_plain_optimizer_whatever_happened_before(both, event):
    for on in both:
        on.optimizer.step()  # nothing to do yet, and nothing to warn of
        for seed in range(4):
            on.evaluate(seed)
            if event in CLEARING:
                CLEARING[event](on)
                on.backward(9)  # there are no stale sums
            else:
                getattr(on, event)()
            on.optimizer.step()
    Loop.assert_same(*both)


SCHEDULERS = {
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=7),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=6),
    "ReduceLROnPlateau": partial(lr_scheduler.ReduceLROnPlateau, patience=1, factor=0.3),
}


@pytest.mark.parametrize("on_inner", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_the_wrapper_and_of_the_inner_optimizer_set_the_rates(both, name, on_inner):
    for on in both:
        early = lr_scheduler.StepLR(on.optimizer, 10)
        with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step"):
            early.step()
        scheduler = SCHEDULERS[name](on.inner if on_inner else on.optimizer)
        for seed in range(6):
            on.train([seed])
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            on.see(on.optimizer.param_groups[0]["lr"])
    Loop.assert_same(*both)


# What the plain optimizer has no counterpart of.


def one_number(**settings):
    """Return a parameter of one number, and a wrapper that moves it by its gradient."""
    param = torch.zeros(1, requires_grad=True)
    return param, GatedGradClip(SGD([param], lr=1.0), **settings)


def backward(optimizer, param, task, transfer):
    """Call `backward` with losses of the given gradients."""
    optimizer.backward(task * param.sum(), transfer * param.sum())


def test_the_wrapper_shows_its_settings():
    group = torch.distributed.ProcessGroup(0, 1)
    _, optimizer = one_number(gate="sigmoid", scope="global", bound=2, process_group=group)
    assert optimizer.process_group is group
    settings = "gate='sigmoid', scope='global', bound=2.0"
    assert repr(optimizer) == f"GatedGradClip({settings}, optimizer={optimizer.optimizer!r})"


def test_train_and_eval_reach_a_schedule_free_optimizer_and_no_other():
    _, optimizer = one_number()
    assert optimizer.train() is optimizer.eval() is None
    inner, calls = optimizer.optimizer, []
    inner.train, inner.eval = partial(calls.append, "train"), partial(calls.append, "eval")
    optimizer.train()
    optimizer.eval()
    assert calls == ["train", "eval"]


@pytest.mark.parametrize("capturable", [True, False])
def test_the_count_of_skipped_steps_is_saved_and_a_plain_state_resets_it(capturable):
    param, optimizer = one_number(capturable=capturable)
    backward(optimizer, param, 1.0, math.inf)
    optimizer.zero_grad()
    backward(optimizer, param, 1.0, 4.0)
    counter, state, plain = optimizer.skipped, optimizer.state_dict(), SGD([param], lr=1.0)
    optimizer.load_state_dict(plain.state_dict())
    assert int(optimizer.skipped) == 0
    assert int(state["skipped"]) == 1  # nothing writes to what was saved
    assert ("skipped" in optimizer.state_dict()) == capturable  # to look at a tensor would sync
    optimizer.load_state_dict(by_file(state))
    assert int(optimizer.skipped) == 1
    assert not capturable or optimizer.skipped is counter  # where a captured step counts
    _, other = one_number(capturable=not capturable)
    other.load_state_dict(state)
    assert (int(other.skipped), type(other.skipped) is int) == (1, capturable)
    assert other.gates == optimizer.gates == [0.25]
    factors = optimizer._shared.sums.factors  # a captured step writes there
    optimizer.load_state_dict(state | {"gates": torch.ones(1)})
    assert (optimizer.gates, factors.item(), state["gates"].item()) == ([1.0], 1.0, 0.25)
    plain.load_state_dict(state)  # the plain one leaves the rest alone


def test_grad_scaler_skips_an_overflow_of_the_task_and_leaves_out_one_of_the_transfer():
    param, optimizer = one_number()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for task, transfer, place in ((1.0, 8.0, -2.0), (1.0, math.inf, -3.0), (math.inf, 1.0, -3.0)):
        optimizer.zero_grad()
        backward(optimizer, scaler.scale(param), task, transfer)
        scaler.step(optimizer)
        scaler.update()
        assert param.item() == place
    assert (scaler.get_scale(), optimizer.skipped) == (2.0**9, 1)


def test_float16_with_the_first_scale_of_grad_scaler_skips_few_steps_and_then_transfers():
    """Without a scale of the transfer loss alone, all of these steps are skipped."""
    torch.manual_seed(0)

    def mlp(width):
        layers = [nn.Sequential(nn.Linear(n, width), nn.ReLU()) for n in (32, width, width)]
        return nn.Sequential(*layers, nn.Linear(width, 5))

    teacher, student, points = mlp(64).eval().requires_grad_(False), mlp(32), ["0", "1", "2"]
    theirs, ours = FeatureHooks(teacher, points), FeatureHooks(student, points)
    loss = GraphTransferLoss([64] * 3, student_channels=[32] * 3, squash="scaled")
    learning = [*student.parameters(), *loss.student_heads.parameters()]
    optimizer, scaler = GatedGradClip(SGD(learning, lr=0.01)), torch.amp.GradScaler("cpu")
    images = torch.randn(128, 32)
    skipped = []
    for _ in range(20):
        with torch.autocast("cpu", torch.float16):
            task = student(images).logsumexp(dim=1).mean()
            teacher(images)
        optimizer.zero_grad()
        transfer = loss(ours.features, theirs.features)
        optimizer.backward(scaler.scale(task), scaler.scale(transfer))
        scaler.step(optimizer)
        scaler.update()
        skipped.append(optimizer.skipped)
    assert 0 < skipped[-1] == skipped[12]
    assert max(optimizer.gates) > 0


def test_sums_outlive_a_zero_grad_that_clears_nothing():
    """As accelerate's, which does nothing while it accumulates."""
    held, unused, outside = (torch.zeros(1, requires_grad=True) for _ in range(3))
    optimizer = GatedGradClip(SGD([held, unused], lr=1.0), scope="global")
    optimizer.optimizer.zero_grad = lambda _: None
    optimizer.backward((3 * held + 4 * outside).sum())
    optimizer.zero_grad()
    backward(optimizer, held, 0.0, 10.0)
    assert optimizer.gates == [0.5]  # by the norm of both task gradients


def test_accelerate_may_prepare_the_wrapped_optimizer():
    accelerate = pytest.importorskip("accelerate", reason="needs the extra `integrations`")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    param = torch.zeros(1, requires_grad=True)
    optimizer = GatedGradClip(accelerator.prepare(SGD([param], lr=1.0)))
    for step in (1, 2):
        for task, transfer in ((1.0, 18.0), (2.0, -6.0), (3.0, 0.0)):  # the sums are 6 and 12
            with accelerator.accumulate():
                backward(optimizer, param, task, transfer)
                optimizer.step()
                optimizer.zero_grad()
        assert param.item() == -12.0 * step


class Copied:
    """A framework's shell: it mixes its class with the optimizer's and copies the __dict__."""

    def __init__(self, optimizer):
        self.__dict__.update(optimizer.__dict__)
        self.__class__ = type("Shell", (type(self), type(optimizer)), {})
        self.optimizer = optimizer  # the wrapper has an attribute of this name

    def step(self, closure=None):
        return self.optimizer.step(closure)


def fabric_shell(optimizer):
    """Return a shell that looks attributes up instead; Lightning has the same."""
    fabric = pytest.importorskip("lightning.fabric", reason="needs the extra `integrations`")
    return fabric.Fabric(accelerator="cpu", devices=1).setup_optimizers(optimizer)


SHELLS = [Copied, fabric_shell]
ungated = partial(pytest.warns, UserWarning, match=r"optimizer.backward\(task_loss\) adds a task")


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("shell_first", [True, False])
def test_a_shell_and_its_original_are_one_optimizer(shell, shell_first):
    param, original = one_number()
    shelled = shell(original)
    assert isinstance(shelled, GatedGradClip)
    assert shelled.optimizer is original
    first, second = (shelled, original) if shell_first else (original, shelled)
    for bound, place in ((1.0, -8.0), (0.5, -14.0)):
        first.zero_grad()
        second.bound = bound
        backward(first, param, 1.0, 12.0)
        backward(second, param, 3.0, -4.0)  # the sums are 4 and 8
        assert first.gates == second.gates == [bound / 2]
        first.step()
        assert param.item() == place
        gradient = weakref.ref(param.grad)
        second.zero_grad()
        assert gradient() is None  # its memory is free
    param.sum().backward()
    with ungated():
        first.step()
    second.step()  # they warn once together; warnings are errors here
    backward(first, param, 1.0, math.inf)
    assert second.skipped == first.skipped == 1
    first.load_state_dict({**SGD([param], lr=0.1).state_dict(), "skipped": 7})
    assert GatedGradClip.state_dict(second)["skipped"] == 7


# The class of a shell has no name that pickle could find, around a plain optimizer neither.
WAYS = [(by_pickle, None), *product([copy.copy, copy.deepcopy], [None, *SHELLS])]


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize(("how", "shell"), WAYS)
def test_a_copy_has_settings_and_a_count_of_its_own(how, shell, capturable):
    """What is copied together stays one. A shallow copy shares the wrapped optimizer."""
    gate, group = partial(constant, 0.0), torch.distributed.ProcessGroup(0, 1)
    param, original = one_number(capturable=capturable)
    backward(original, param, 1.0, math.inf)
    shelled = original if shell is None else shell(original)
    original.gate, original.scope, original.bound = gate, "global", 0.5
    original.process_group, gate.optimizer = group, shelled
    twin = how(shelled)
    assert type(twin) is type(shelled)
    assert twin.gate.optimizer is (shelled if how is copy.copy else twin)  # a cycle
    assert (twin.bound, twin.scope, twin.capturable) == (0.5, "global", capturable)
    assert (int(twin.skipped), twin.gates) == (1, [])
    assert twin.process_group is (None if how is by_pickle else group)
    twin.bound = twin.param_groups[0]["lr"] = 9.0
    twin.skipped += 1
    assert (original.bound, int(original.skipped)) == (0.5, 1)
    assert original.param_groups[0]["lr"] == (9.0 if how is copy.copy else 1.0)
    twin, twin_of_original = copy.deepcopy((shelled, original))
    twin.bound = 7.0
    assert twin_of_original.bound == 7.0


def plain_step(on, *, by_closure=False):
    """Step on gradients that did not come from the wrapper."""
    loss = losses(on.net, 0)[0]
    if by_closure:
        on.optimizer.step(loss.backward)
    else:
        loss.backward()
        on.optimizer.step()


@pytest.mark.parametrize("by_closure", [False, True])
@pytest.mark.parametrize("clear", [*list(CLEARING)[:4], "nothing"])
def test_a_step_on_other_gradients_warns_once(clear, by_closure):
    on = Loop(partial(SGD, lr=0.0), GATES["opened"], wrapped=True)
    plain_step(on)  # at rate zero, as torch.distributed.checkpoint makes the state
    on.optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.1})
    if clear != "nothing":  # after gated steps too
        on.train(range(2))
        CLEARING[clear](on)
    with ungated() as caught:
        plain_step(on, by_closure=by_closure)
    assert by_closure or caught[0].filename == __file__
    plain_step(on, by_closure=by_closure)  # warnings are errors here
    on.optimizer.zero_grad()
    plain_step(on, by_closure=by_closure)
