"""GatedGradClip behaves as the optimizer it wraps, for four optimizers.

Each test runs a wrapped optimizer beside a plain one, on copies of one network. The plain one
gets its gradients by hand: the task's alone where the gate is closed, else task + gated transfer.
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
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop, lr_scheduler

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


@pytest.fixture(params=OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def make(request):
    return request.param


each_gate = pytest.mark.parametrize("gate", [closed, "norm"], ids=["closed", "norm"])


class Net(nn.Module):
    """Two layers; the transfer loss reaches the first alone."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.front = nn.Linear(5, 6, dtype=dtype)
        self.back = nn.Linear(6, 3, dtype=dtype)

    def forward(self, x):
        hidden = self.front(x).tanh()
        return hidden, self.back(hidden)


def network(dtype=torch.float64):
    torch.manual_seed(7)
    return Net(dtype)


def batch(seed, dtype=torch.float64):
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def losses(net, seed):
    """Return a task loss, and a transfer loss of a much larger gradient."""
    x = batch(seed, next(net.parameters()).dtype)
    hidden, output = net(x)
    return (output - x[:, :3]).square().mean(), 10 * (hidden - 1).square().sum()


def gated_by_hand(task, transfer, gate, bound=1.0):
    if transfer is None or gate is closed:
        return task.clone()
    ratio = bound * task.norm() / transfer.norm()
    return task + min(1.0, ratio.item()) * transfer


def gradients_by_hand(net, seeds, gate, bound=1.0):
    """Leave in every p.grad what the wrapper should after a backward call for each seed."""
    params = [p for p in net.parameters() if p.requires_grad]
    task, transfer = [0.0] * len(params), [None] * len(params)
    for seed in seeds:
        both = losses(net, seed)
        new_task = torch.autograd.grad(both[0], params, retain_graph=True)
        new_transfer = torch.autograd.grad(both[1], params, allow_unused=True)
        task = [old + new for old, new in zip(task, new_task, strict=True)]
        transfer = [
            new if old is None else old + new
            for old, new in zip(transfer, new_transfer, strict=True)
        ]
    for p, t, d in zip(params, task, transfer, strict=True):
        p.grad = gated_by_hand(t, d, gate, bound)


class Twins:
    """A wrapped and a plain optimizer on copies of one network, fed the same batches."""

    def __init__(self, make, gate="norm", dtype=torch.float64):
        self.gate = gate
        self.net, self.twin = network(dtype), network(dtype)
        self.wrapped = GatedGradClip(make(self.net.parameters()), gate)
        self.plain = make(self.twin.parameters())

    def backward(self, *seeds):
        for seed in seeds:
            self.wrapped.backward(*losses(self.net, seed))
        gradients_by_hand(self.twin, seeds, self.gate, self.wrapped.bound)

    def step(self, *seeds):
        self.wrapped.zero_grad()
        self.backward(*seeds)
        self.wrapped.step()
        self.plain.step()

    def assert_same_gradients(self):
        for ours, theirs in zip(self.net.parameters(), self.twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)

    def assert_same(self):
        if self.gate is closed:
            assert_bit_equal(self.net, self.twin)
        for ours, theirs in zip(self.net.parameters(), self.twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def assert_bit_equal(net, other):
    for (name, ours), theirs in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def train(net, optimizer, seeds):
    """Train with a wrapped optimizer, or with a plain one on the task alone."""
    for seed in seeds:
        optimizer.zero_grad()
        task, transfer = losses(net, seed)
        if isinstance(optimizer, GatedGradClip):
            optimizer.backward(task, transfer)
        else:
            task.backward()
        optimizer.step()


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Steps, closures, clearing.


@each_gate
def test_steps_are_those_of_the_plain_optimizer(make, gate):
    twins = Twins(make, gate)
    for seed in range(5):
        twins.step(seed)
        twins.assert_same()


def test_the_transfer_gradient_makes_a_difference(make):
    with_transfer, without = Twins(make, "norm"), Twins(make, closed)
    with_transfer.step(0)
    without.step(0)
    assert not torch.equal(with_transfer.net.front.weight, without.net.front.weight)
    assert torch.equal(with_transfer.net.back.weight, without.net.back.weight)


@each_gate
def test_closure_calls_backward_and_its_value_is_returned(make, gate):
    twins = Twins(make, gate)
    for seed in range(3):

        def closure(seed=seed):
            twins.wrapped.zero_grad()
            task, transfer = losses(twins.net, seed)
            twins.wrapped.backward(task, transfer)
            return task.item()

        gradients_by_hand(twins.twin, [seed], gate)
        twins.plain.step()
        expected = losses(twins.net, seed)[0].item()
        assert twins.wrapped.step(closure) == expected
        twins.assert_same()


def test_an_optimizer_that_needs_a_closure_can_be_wrapped():
    net = network()
    optimizer = GatedGradClip(torch.optim.LBFGS(net.parameters(), max_iter=4), closed)
    reference_net = network()
    reference = torch.optim.LBFGS(reference_net.parameters(), max_iter=4)

    def closure(net, optimizer):
        optimizer.zero_grad()
        task, transfer = losses(net, 0)
        if optimizer is reference:
            task.backward()
        else:
            optimizer.backward(task, transfer)
        return task

    for _ in range(2):
        optimizer.step(lambda: closure(net, optimizer))
        reference.step(lambda: closure(reference_net, reference))
    assert_bit_equal(net, reference_net)


def test_step_without_gradients_moves_nothing_and_returns_none(make):
    twins = Twins(make)
    assert twins.wrapped.step() is None
    assert_bit_equal(twins.net, network())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_both_ways(make, set_to_none):
    twins = Twins(make)
    twins.backward(0)
    twins.wrapped.zero_grad(set_to_none=set_to_none)
    for p in twins.net.parameters():
        assert p.grad is None if set_to_none else torch.equal(p.grad, torch.zeros_like(p))
    twins.backward(1)
    twins.assert_same_gradients()


def test_zero_grad_frees_the_memory_of_the_gradients():
    net = network()
    optimizer = GatedGradClip(SGD(net.parameters(), lr=0.1))
    optimizer.backward(*losses(net, 0))
    merged = [weakref.ref(p.grad) for p in net.parameters()]
    optimizer.zero_grad()
    assert all(gradient() is None for gradient in merged)


def clear_by_model(twins):
    twins.net.zero_grad()


def clear_by_model_in_place(twins):
    twins.net.zero_grad(set_to_none=False)


def clear_by_inner_optimizer(twins):
    twins.wrapped.optimizer.zero_grad()


def clear_by_inner_optimizer_in_place(twins):
    twins.wrapped.optimizer.zero_grad(set_to_none=False)


def clear_by_hand(twins):
    for p in twins.net.parameters():
        p.grad.zero_()


@pytest.mark.parametrize(
    "clear",
    [
        clear_by_model,
        clear_by_model_in_place,
        clear_by_inner_optimizer,
        clear_by_inner_optimizer_in_place,
        clear_by_hand,
    ],
)
def test_clearing_behind_the_wrappers_back_leaves_no_stale_sums(make, clear):
    twins = Twins(make)
    for seed in range(3):
        clear(twins) if seed else None
        twins.backward(seed)
        twins.assert_same_gradients()
        twins.wrapped.step()
        twins.plain.step()
        twins.assert_same()


# Accumulation and what else stands in p.grad.


@each_gate
def test_two_backward_calls_gate_the_sums(make, gate):
    twins = Twins(make, gate)
    for seeds in ([0, 1], [2, 3, 4]):
        twins.wrapped.zero_grad()
        twins.backward(*seeds)
        twins.assert_same_gradients()
        twins.wrapped.step()
        twins.plain.step()
        twins.assert_same()


@pytest.mark.parametrize("gate", ["norm", "sigmoid"])
@pytest.mark.parametrize("scope", ["parameter", "global"])
def test_two_backward_calls_equal_one_on_summed_losses(gate, scope):
    parts, whole = network(), network()
    in_parts = GatedGradClip(SGD(parts.parameters(), lr=0.1), gate, scope=scope)
    in_parts.backward(*losses(parts, 0))
    in_parts.backward(*losses(parts, 1))
    at_once = GatedGradClip(SGD(whole.parameters(), lr=0.1), gate, scope=scope)
    (task, transfer), (more_task, more_transfer) = losses(whole, 0), losses(whole, 1)
    at_once.backward(task + more_task, transfer + more_transfer)
    assert in_parts.gates == pytest.approx(at_once.gates, rel=1e-12)
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_a_loss_may_reach_other_parameters_in_the_second_call():
    a, b, both, neither = (torch.zeros(2, requires_grad=True) for _ in range(4))
    optimizer = GatedGradClip(SGD([a, b, both, neither], lr=0.1))
    one = torch.tensor([1.0, 0.0])
    optimizer.backward(((a + both) * one).sum(), ((b + both) * one).sum())
    optimizer.backward(((b + both) * one).sum(), ((a + both) * one).sum() * 4)
    assert torch.equal(a.grad, 2 * one)
    assert torch.equal(b.grad, 2 * one)
    assert torch.equal(both.grad, 4 * one)
    assert neither.grad is None
    assert optimizer.gates == pytest.approx([0.25, 1.0, 0.4])


def test_a_gradient_that_stood_there_before_counts_as_task_gradient(make):
    twins = Twins(make)
    task, _ = losses(twins.net, 5)
    task.backward()
    twins.wrapped.backward(*losses(twins.net, 0))

    params = list(twins.twin.parameters())
    task, transfer = losses(twins.twin, 0)
    total = torch.autograd.grad(task + losses(twins.twin, 5)[0], params, retain_graph=True)
    extra = torch.autograd.grad(transfer, params, allow_unused=True)
    for p, t, d in zip(params, total, extra, strict=True):
        p.grad = gated_by_hand(t, d, "norm")
    twins.assert_same_gradients()


def test_a_gradient_added_between_two_calls_counts_as_task_gradient():
    net = network()
    optimizer = GatedGradClip(SGD(net.parameters(), lr=0.1))
    optimizer.backward(*losses(net, 0))
    losses(net, 5)[0].backward()  # a regulariser of the user's, added in place
    before = [p.grad.clone() for p in net.parameters()]
    optimizer.backward(*losses(net, 1))

    params = list(net.parameters())
    task, transfer = losses(net, 1)
    new_task = torch.autograd.grad(task, params, retain_graph=True)
    new_transfer = torch.autograd.grad(transfer, params, allow_unused=True)
    for p, old, t, d in zip(params, before, new_task, new_transfer, strict=True):
        torch.testing.assert_close(p.grad, gated_by_hand(old + t, d, "norm"))


def test_a_replaced_gradient_is_the_task_gradient_of_what_follows():
    net = network()
    optimizer = GatedGradClip(SGD(net.parameters(), lr=0.1))
    optimizer.backward(*losses(net, 0))
    versions = {p: p.grad._version for p in net.parameters()}
    for p in net.parameters():
        p.grad = torch.ones_like(p)
        while p.grad._version < versions[p]:  # as often changed as what stood there
            p.grad.add_(0)
    optimizer.backward(*losses(net, 1))

    params = list(net.parameters())
    task, transfer = losses(net, 1)
    new_task = torch.autograd.grad(task, params, retain_graph=True)
    new_transfer = torch.autograd.grad(transfer, params, allow_unused=True)
    for p, t, d in zip(params, new_task, new_transfer, strict=True):
        torch.testing.assert_close(p.grad, gated_by_hand(1 + t, d, "norm"))


def test_a_gradient_that_stood_there_is_not_changed_in_place():
    net = network()
    optimizer = GatedGradClip(SGD(net.parameters(), lr=0.1))
    losses(net, 5)[0].backward()
    held = [p.grad for p in net.parameters()]
    copies = [g.clone() for g in held]
    optimizer.backward(*losses(net, 0))
    for p in net.parameters():
        p.grad.zero_()
    assert all(torch.equal(g, c) for g, c in zip(held, copies, strict=True))


def test_the_graph_of_the_transfer_loss_is_freed():
    net = network()
    optimizer = GatedGradClip(SGD(net.parameters(), lr=0.1))
    task, transfer = losses(net, 0)
    optimizer.backward(task, transfer)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        transfer.backward()


def shared_task(a, b, c):
    return (a + b).sum() + c.sum(), (c * 3).sum()


def shared_everywhere(a, b, c):
    return (a + b + c).sum(), (a + b + c).square().sum()


def shared_and_skipped(a, b, c):
    return (a + b + c).sum(), (a + b + c).sum() * float("nan")


@pytest.mark.parametrize("both", [shared_task, shared_everywhere, shared_and_skipped])
def test_parameters_that_share_a_gradient_get_memory_of_their_own(both):
    a, b, c = (torch.full((3,), float(n), requires_grad=True) for n in (1, 2, 3))
    optimizer = GatedGradClip(SGD([a, b, c], lr=0.1))
    optimizer.backward(*both(a, b, c))
    before = b.grad.clone()
    a.grad[0] = 100.0  # one entry, not all: autograd's own sum is one number, expanded
    assert a.grad.tolist()[1:] == before.tolist()[1:]
    assert torch.equal(b.grad, before)
    assert torch.equal(c.grad, c.grad.clone().contiguous())


def test_clip_grad_norm_between_backward_and_step(make):
    twins = Twins(make)
    for seed in range(3):
        twins.wrapped.zero_grad()
        twins.backward(seed)
        ours = nn.utils.clip_grad_norm_(twins.net.parameters(), 0.01)
        theirs = nn.utils.clip_grad_norm_(twins.twin.parameters(), 0.01)
        torch.testing.assert_close(ours, theirs)
        assert ours > 0.01
        twins.wrapped.step()
        twins.plain.step()
        twins.assert_same()


# Learning rate schedulers.


def same_groups(wrapped, plain):
    return all(
        ours[key] == theirs[key]
        for ours, theirs in zip(wrapped.param_groups, plain.param_groups, strict=True)
        for key in theirs
        if key not in ("params", "initial_lr")
    )


@each_gate
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("built_on", ["wrapper", "inner"])
def test_schedulers_drive_the_wrapped_optimizer(make, scheduler, gate, built_on):
    twins = Twins(make, gate)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on = twins.wrapped if built_on == "wrapper" else twins.wrapped.optimizer
        ours, theirs = scheduler(on), scheduler(twins.plain)
        for seed in range(6):
            twins.step(seed)
            metric = [1.0] if scheduler is SCHEDULERS["ReduceLROnPlateau"] else []
            ours.step(*metric)
            theirs.step(*metric)
            assert same_groups(twins.wrapped, twins.plain)
            rates.append(twins.wrapped.param_groups[0]["lr"])
    assert len(set(rates)) > 1
    twins.assert_same()


def test_a_scheduler_stepped_too_early_warns_as_on_the_plain_optimizer(make):
    twins = Twins(make)
    scheduler = lr_scheduler.StepLR(twins.wrapped, 1)
    with pytest.warns(UserWarning, match="`lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`"):
        scheduler.step()


def test_scheduler_and_optimizer_resume_together(make):
    straight = Twins(make)
    scheduler = SCHEDULERS["CosineAnnealingLR"](straight.wrapped)
    for seed in range(3):
        train(straight.net, straight.wrapped, [seed])
        scheduler.step()
    states = [straight.net, straight.wrapped, scheduler]
    states = through_file([part.state_dict() for part in states])

    resumed = Twins(make)
    resumed_scheduler = SCHEDULERS["CosineAnnealingLR"](resumed.wrapped)
    for part, state in zip([resumed.net, resumed.wrapped, resumed_scheduler], states, strict=True):
        part.load_state_dict(state)
    for seed in range(3, 6):
        for run, its_scheduler in ((straight, scheduler), (resumed, resumed_scheduler)):
            train(run.net, run.wrapped, [seed])
            its_scheduler.step()
    assert_bit_equal(straight.net, resumed.net)
    assert same_groups(straight.wrapped, resumed.wrapped)


# Hooks.


def test_step_hooks_are_called_with_the_wrapper_once_around_the_step(make):
    twins = Twins(make)
    calls = []

    def before(optimizer, _args, _kwargs):
        calls.append(("before", optimizer, twins.net.front.weight.detach().clone()))

    def after(optimizer, _args, _kwargs):
        calls.append(("after", optimizer, twins.net.front.weight.detach().clone()))

    handles = [
        twins.wrapped.register_step_pre_hook(before),
        twins.wrapped.register_step_post_hook(after),
    ]
    twins.step(0)
    assert [(name, optimizer) for name, optimizer, _ in calls] == [
        ("before", twins.wrapped),
        ("after", twins.wrapped),
    ]
    assert torch.equal(calls[0][2], network().front.weight)
    assert torch.equal(calls[1][2], twins.net.front.weight)
    twins.assert_same()
    for handle in handles:
        handle.remove()
    twins.step(1)
    assert len(calls) == 2


def test_hooks_of_the_inner_optimizer_go_on_working(make):
    net = network()
    inner = make(net.parameters())
    calls = []
    inner.register_step_post_hook(lambda optimizer, *_: calls.append(optimizer))
    inner.register_state_dict_post_hook(lambda optimizer, _state: calls.append(optimizer))
    optimizer = GatedGradClip(inner)
    train(net, optimizer, [0])
    optimizer.state_dict()
    assert calls == [inner, inner]


def test_a_step_pre_hook_may_change_the_arguments(make):
    twins = Twins(make)

    def closure():
        twins.wrapped.backward(*losses(twins.net, 0))
        return 42.0

    twins.wrapped.register_step_pre_hook(
        lambda _optimizer, args, kwargs: ((*args, closure), kwargs)
    )
    assert twins.wrapped.step() == 42.0


def test_state_dict_hooks_are_called_with_the_wrapper_once(make):
    twins = Twins(make)
    twins.step(0)
    calls = []

    def replace(optimizer, state):
        calls.append(("post", optimizer))
        return {**state, "note": "from the hook"}

    twins.wrapped.register_state_dict_pre_hook(lambda optimizer: calls.append(("pre", optimizer)))
    twins.wrapped.register_state_dict_post_hook(replace)
    twins.wrapped.register_state_dict_post_hook(lambda *_: None)
    state = twins.wrapped.state_dict()
    assert calls == [("pre", twins.wrapped), ("post", twins.wrapped)]
    assert state["note"] == "from the hook"
    assert "note" not in twins.wrapped.optimizer.state_dict()


def test_load_state_dict_hooks_are_called_with_the_wrapper_once(make):
    twins = Twins(make)
    twins.step(0)
    state = twins.wrapped.state_dict()
    calls = []

    def replace(optimizer, given):
        calls.append(("pre", optimizer, optimizer.param_groups[0]["lr"]))
        groups = [{**group, "lr": 0.5} for group in given["param_groups"]]
        return {**given, "param_groups": groups}

    def after(optimizer):
        calls.append(("post", optimizer, optimizer.param_groups[0]["lr"]))

    rate = twins.wrapped.param_groups[0]["lr"]
    twins.wrapped.register_load_state_dict_pre_hook(replace)
    twins.wrapped.register_load_state_dict_pre_hook(lambda *_: None)
    twins.wrapped.register_load_state_dict_post_hook(after)
    twins.wrapped.load_state_dict(state)
    assert calls == [("pre", twins.wrapped, rate), ("post", twins.wrapped, 0.5)]
    assert state["param_groups"][0]["lr"] == rate


@pytest.mark.parametrize("kind", ["plain", "wrapped"])
def test_a_load_hook_may_write_to_its_state_dict_without_changing_the_callers(make, kind):
    twins = Twins(make)
    optimizer = getattr(twins, kind)
    state = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda _optimizer, given: given.update(note=1))
    optimizer.load_state_dict(state)
    assert set(state) == {"state", "param_groups"}


# State: resuming, copies, pickles.


@each_gate
def test_resumes_bit_equal_from_a_file(make, gate):
    straight = Twins(make, gate)
    train(straight.net, straight.wrapped, range(3))
    net_state, state = through_file([straight.net.state_dict(), straight.wrapped.state_dict()])
    train(straight.net, straight.wrapped, range(3, 6))

    resumed = Twins(make, gate)
    resumed.net.load_state_dict(net_state)
    resumed.wrapped.load_state_dict(state)
    train(resumed.net, resumed.wrapped, range(3, 6))
    assert_bit_equal(straight.net, resumed.net)


@pytest.mark.parametrize("direction", ["wrapped to plain", "plain to wrapped"])
def test_wrapper_and_plain_optimizer_load_each_others_state(make, direction):
    source, target = Twins(make, closed), Twins(make, closed)
    before = source.wrapped if direction == "wrapped to plain" else source.plain
    after = target.plain if direction == "wrapped to plain" else target.wrapped
    net = source.net if before is source.wrapped else source.twin
    train(net, before, range(3))
    net_state, state = through_file([net.state_dict(), before.state_dict()])
    train(net, before, range(3, 6))

    resumed = target.net if after is target.wrapped else target.twin
    resumed.load_state_dict(net_state)
    after.load_state_dict(state)
    train(resumed, after, range(3, 6))
    assert_bit_equal(net, resumed)


def test_state_dict_is_that_of_the_plain_optimizer(make):
    twins = Twins(make, closed)
    train(twins.net, twins.wrapped, range(2))
    train(twins.twin, twins.plain, range(2))
    ours, theirs = twins.wrapped.state_dict(), twins.plain.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)


def assert_continues_alike(net, optimizer, other_net, other):
    assert {id(p) for g in other.param_groups for p in g["params"]} == {
        id(p) for p in other_net.parameters()
    }
    at_copy = copy.deepcopy(net.state_dict())
    train(other_net, other, range(3, 6))
    for name, value in net.state_dict().items():
        assert torch.equal(value, at_copy[name])  # the copy is one
    train(net, optimizer, range(3, 6))
    assert_bit_equal(net, other_net)


@each_gate
@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_model_and_optimizer_continue_bit_equal(make, gate, how):
    net = network()
    optimizer = GatedGradClip(make(net.parameters()), gate, scope="global", bound=0.5)
    optimizer.skipped = 3
    lr_scheduler.StepLR(optimizer, 10)  # replaces `step` on the instance
    optimizer.register_step_post_hook(lambda *_: None)  # can not be pickled, and need not be
    train(net, optimizer, range(3))
    other_net, other = how((net, optimizer))
    assert repr(other) == repr(optimizer)
    assert other.skipped == 3
    assert other.process_group is None
    assert_continues_alike(net, optimizer, other_net, other)


def test_a_copy_made_between_backward_and_zero_grad_starts_afresh(make):
    net = network()
    optimizer = GatedGradClip(make(net.parameters()))
    train(net, optimizer, range(2))  # gradients still stand there
    other_net, other = copy.deepcopy((net, optimizer))
    other.zero_grad()
    other.backward(*losses(other_net, 9))
    gradients_by_hand(net, [9], "norm")
    for ours, theirs in zip(other_net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_a_group_of_one_process_changes_nothing(make, one_process):
    twins = Twins(make)
    twins.wrapped.process_group = one_process
    for seed in range(3):
        twins.step(seed)
        twins.assert_same()


def test_several_processes_are_no_trouble_with_a_process_group(one_process, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    net = network()
    optimizer = GatedGradClip(SGD(net.parameters(), lr=0.1), process_group=one_process)
    optimizer.backward(*losses(net, 0))
    assert all(p.grad is not None for p in net.parameters())


def test_parameters_that_no_process_reaches_keep_none(one_process):
    a, b, c, d = (torch.zeros(2, requires_grad=True) for _ in range(4))
    optimizer = GatedGradClip(SGD([a, b, c, d], lr=0.1), process_group=one_process)
    optimizer.backward((a + b).sum(), (b + c).sum())
    assert torch.equal(a.grad, torch.ones(2))
    assert torch.equal(b.grad, torch.full((2,), 2.0))
    assert torch.equal(c.grad, torch.ones(2))  # bounded by the norm of the whole task gradient
    assert d.grad is None


def test_deepcopy_with_a_process_group_keeps_the_group(one_process):
    net = network()
    optimizer = GatedGradClip(
        SGD(net.parameters(), lr=0.1, momentum=0.9), process_group=one_process
    )
    train(net, optimizer, range(3))
    other_net, other = copy.deepcopy((net, optimizer))
    assert other.process_group is one_process
    assert_continues_alike(net, optimizer, other_net, other)


def test_pickle_with_a_process_group_goes_through(one_process):
    net = network()
    optimizer = GatedGradClip(
        SGD(net.parameters(), lr=0.1, momentum=0.9), process_group=one_process
    )
    train(net, optimizer, range(3))
    _, other = pickle.loads(pickle.dumps((net, optimizer)))
    assert repr(other) == repr(optimizer)


# GradScaler.


def scaler_step(scaler, optimizer, params, *, max_norm=None):
    if max_norm is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(params, max_norm)
    scaler.step(optimizer)
    scaler.update()


@each_gate
@pytest.mark.parametrize("max_norm", [None, 0.02])
@pytest.mark.parametrize("calls", [1, 2])
def test_grad_scaler_trains_as_without_it(make, gate, max_norm, calls):
    twins = Twins(make, gate, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(4):
        seeds = range(step * calls, (step + 1) * calls)
        twins.wrapped.zero_grad()
        for seed in seeds:
            task, transfer = losses(twins.net, seed)
            twins.wrapped.backward(scaler.scale(task), scaler.scale(transfer))
        scaler_step(scaler, twins.wrapped, twins.net.parameters(), max_norm=max_norm)
        gradients_by_hand(twins.twin, seeds, gate)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(twins.twin.parameters(), max_norm)
        twins.plain.step()
    assert scaler.get_scale() == 2.0**12
    for ours, theirs in zip(twins.net.parameters(), twins.twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_grad_scaler_skips_a_step_whose_task_gradient_overflows(make):
    twins = Twins(make, "norm", torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        before = copy.deepcopy(twins.net)
        task, transfer = losses(twins.net, step)
        twins.wrapped.zero_grad()
        overflow = 1e38 if step == 1 else 1.0
        twins.wrapped.backward(scaler.scale(task) * overflow, scaler.scale(transfer))
        scaler_step(scaler, twins.wrapped, twins.net.parameters(), max_norm=1.0)
        moved = not torch.equal(before.front.weight, twins.net.front.weight)
        assert moved == (step != 1)
    assert scaler.get_scale() == 2.0**9
    assert twins.wrapped.skipped == 0
    assert all(torch.isfinite(p).all() for p in twins.net.parameters())


def test_a_transfer_overflow_under_grad_scaler_trains_on_the_task_alone(make):
    twins = Twins(make, closed, torch.float32)
    twins.wrapped.gate = "norm"
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    task, transfer = losses(twins.net, 0)
    twins.wrapped.backward(scaler.scale(task), scaler.scale(transfer) * 1e38)
    scaler_step(scaler, twins.wrapped, twins.net.parameters())
    gradients_by_hand(twins.twin, [0], closed)
    twins.plain.step()
    assert twins.wrapped.skipped == 1
    twins.assert_same()


# Param groups and parameters.


def test_is_an_optimizer(make):
    assert isinstance(GatedGradClip(make(network().parameters())), Optimizer)


def test_repr_shows_the_settings_and_the_wrapped_optimizer(make):
    inner = make(network().parameters())
    text = repr(GatedGradClip(inner, "sigmoid", scope="global", bound=2))
    assert text.startswith("GatedGradClip(gate='sigmoid', scope='global', bound=2.0, optimizer=")
    assert repr(inner) in text


def test_param_groups_state_and_defaults_are_the_inner_ones_even_after_loading(make):
    net = network()
    inner = make(net.parameters())
    optimizer = GatedGradClip(inner)
    for _ in range(2):
        assert optimizer.state is inner.state
        assert optimizer.param_groups is inner.param_groups
        assert optimizer.defaults is inner.defaults
        train(net, optimizer, [0])
        assert set(optimizer.state) == set(net.parameters())
        optimizer.load_state_dict(through_file(optimizer.state_dict()))


def test_wrapping_leaves_the_inner_optimizer_as_it_was(make):
    net = network()
    inner = make(net.parameters())
    before = copy.deepcopy(inner.state_dict())
    GatedGradClip(inner)
    assert inner.state_dict() == before
    assert set(inner.defaults) == set(make(network().parameters()).defaults)


def test_options_changed_through_the_wrapper_are_seen_by_the_inner_optimizer(make):
    twins = Twins(make)
    for seed, rate in enumerate([0.2, 0.002]):
        for optimizer in (twins.wrapped, twins.plain):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.param_groups[0]["weight_decay"] = 10 * rate
        assert twins.wrapped.optimizer.param_groups[0]["lr"] == rate
        twins.step(seed)
        twins.assert_same()


def test_add_param_group(make):
    net, twin = network(), network()
    wrapped, plain = GatedGradClip(make(net.back.parameters())), make(twin.back.parameters())
    with pytest.raises(ValueError, match=r"`transfer_loss` must depend on the optimizer's"):
        wrapped.backward(*losses(net, 0))
    wrapped.add_param_group({"params": list(net.front.parameters()), "lr": 0.5})
    plain.add_param_group({"params": list(twin.front.parameters()), "lr": 0.5})
    for seed in range(3):
        wrapped.zero_grad()
        wrapped.backward(*losses(net, seed))
        wrapped.step()
        gradients_by_hand(twin, [seed], "norm")
        plain.step()
    assert [group["lr"] for group in wrapped.param_groups][1] == 0.5
    assert len(wrapped.gates) == 2
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_parameters_that_need_no_gradient_are_left_alone(make):
    twins = Twins(make)
    for net in (twins.net, twins.twin):
        net.front.bias.requires_grad_(False)
    for seed in range(3):
        twins.step(seed)
    assert twins.net.front.bias.grad is None
    assert torch.equal(twins.net.front.bias, network().front.bias)
    assert len(twins.wrapped.gates) == 1
    twins.assert_same()
    for net in (twins.net, twins.twin):  # thawed later, as in gradual unfreezing
        net.front.bias.requires_grad_(True)
    twins.step(3)
    assert len(twins.wrapped.gates) == 2
    twins.assert_same()


def test_parameters_outside_the_optimizer_get_the_gradient_that_backward_would_give(make):
    twins = Twins(make)
    wrapped = GatedGradClip(make(twins.net.front.parameters()))
    wrapped.backward(*losses(twins.net, 0))
    gradients_by_hand(twins.twin, [0], "norm")
    twins.assert_same_gradients()


def test_a_parameter_without_gradient_keeps_none_and_does_not_move(make):
    net = network()
    spare = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = GatedGradClip(make([*net.parameters(), spare]))
    train(net, optimizer, range(3))
    assert spare.grad is None
    assert spare not in optimizer.state
    assert torch.equal(spare, torch.ones_like(spare))  # weight decay does not reach it either


@pytest.mark.parametrize("gate", ["norm", "sigmoid", closed])
def test_gates_lists_the_factors_last_applied(gate):
    net = network()
    optimizer = GatedGradClip(SGD(net.parameters(), lr=0.1), gate)
    assert optimizer.gates == []
    optimizer.backward(*losses(net, 0))
    params = list(net.front.parameters())
    task, transfer = losses(net, 0)
    pairs = zip(
        torch.autograd.grad(task, params, retain_graph=True),
        torch.autograd.grad(transfer, params),
        strict=True,
    )
    ratios = [(t.norm() / d.norm()).item() for t, d in pairs]
    assert max(ratios) < 1  # the gate has something to do
    wanted = {"norm": ratios, "sigmoid": [0.7310585786] * 2, closed: [0.0, 0.0]}[gate]
    assert optimizer.gates == pytest.approx(wanted)
    assert all(type(factor) is float for factor in optimizer.gates)
    optimizer.zero_grad()
    assert optimizer.gates == pytest.approx(wanted)  # still there for logging


def test_bound_may_change_every_epoch(make):
    twins = Twins(make)
    for epoch, bound in enumerate([0.5, 0.9, 0.1]):
        twins.wrapped.bound = bound
        twins.step(epoch)
        assert max(twins.wrapped.gates) < bound
        twins.assert_same()


def test_channels_last_parameters(make):
    def convolutions():
        torch.manual_seed(3)
        front = nn.Conv2d(3, 4, 3, dtype=torch.float64)
        return nn.Sequential(front, nn.Tanh(), nn.Conv2d(4, 2, 3, dtype=torch.float64))

    nets = [convolutions(), convolutions().to(memory_format=torch.channels_last)]
    optimizers = [GatedGradClip(make(net.parameters())) for net in nets]
    for seed in range(3):
        images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed)).double()
        for net, optimizer in zip(nets, optimizers, strict=True):
            hidden = net[:2](images)
            optimizer.zero_grad()
            optimizer.backward(net[2](hidden).square().mean(), (hidden - 1).square().sum())
            optimizer.step()
    weight = nets[1][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.grad.shape == weight.shape
    for ours, theirs in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


# Shells: frameworks mix their own class with the optimizer's, or wrap the optimizer.


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

    def __init__(self, optimizer, mix_first):
        if not mix_first:
            self.optimizer = optimizer
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


SHELLS = {
    "mixed": Mixed,
    "copied": Copied,
    "named": partial(Named, mix_first=False),
    "named after mixing": partial(Named, mix_first=True),
    "fabric": fabric_shell,
}
shells = pytest.mark.parametrize("shell", SHELLS.values(), ids=SHELLS.keys())
ALL_SHELLS = {**SHELLS, "lightning": lightning_shell}
all_shells = pytest.mark.parametrize("shell", ALL_SHELLS.values(), ids=ALL_SHELLS.keys())


def both_ways(shell, original):
    """Return the four ways to divide the work between a shell and its original."""
    return [(first, second) for first in (shell, original) for second in (shell, original)]


def assert_one_state(shell, original):
    for name in ("gates", "skipped", "bound", "gate", "scope", "process_group"):
        assert getattr(shell, name) == getattr(original, name), name
    ours, theirs = (GatedGradClip.state_dict(optimizer) for optimizer in (shell, original))
    assert ours.keys() == theirs.keys()
    assert ours.get("skipped") == theirs.get("skipped")
    assert ours["param_groups"] == theirs["param_groups"]


@shells
@pytest.mark.parametrize("way", range(4))
def test_a_shell_and_its_original_are_one_optimizer(shell, way, make):
    twins = Twins(make)
    shelled = shell(twins.wrapped)
    first, second = both_ways(shelled, twins.wrapped)[way]
    assert isinstance(shelled, GatedGradClip)
    for seed, bound in enumerate([1.0, 0.5, 0.2]):
        first.zero_grad()
        second.bound = bound
        first.backward(*losses(twins.net, seed))
        second.backward(*losses(twins.net, seed + 10))
        assert_one_state(shelled, twins.wrapped)
        gradients_by_hand(twins.twin, [seed, seed + 10], "norm", bound)
        twins.assert_same_gradients()
        first.step()
        second.zero_grad()
        assert all(p.grad is None for p in twins.net.parameters())
        gradients_by_hand(twins.twin, [seed, seed + 10], "norm", bound)
        twins.plain.step()
        twins.assert_same()
    assert first.gates == second.gates != []


@shells
def test_skipped_is_that_of_the_shell_too(shell):
    net = network()
    original = GatedGradClip(SGD(net.parameters(), lr=0.1))
    shelled = shell(original)
    for count, optimizer in enumerate((shelled, original, shelled), start=1):
        optimizer.zero_grad()
        task, transfer = losses(net, count)
        optimizer.backward(task, transfer * float("inf"))
        assert_one_state(shelled, original)
        assert original.skipped == count
    for target, source in both_ways(shelled, original):
        target.load_state_dict({**SGD(net.parameters(), lr=0.1).state_dict(), "skipped": 7})
        assert source.skipped == 7
    for setting, value in {"gate": closed, "scope": "global", "skipped": 2}.items():
        setattr(shelled, setting, value)
        assert getattr(original, setting) == value


@all_shells
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_shells_can_be_copied_as_around_a_plain_optimizer(shell, how):
    plain = SGD(network().parameters(), lr=0.1, momentum=0.9)
    assert how(shell(plain)).param_groups[0]["lr"] == 0.1

    net = network()
    original = GatedGradClip(SGD(net.parameters(), lr=0.1, momentum=0.9), bound=0.5)
    original.skipped = 3
    shelled = shell(original)
    train(net, original, range(2))
    twin = how(shelled)
    assert type(twin) is type(shelled)
    assert (twin.bound, twin.skipped, twin.gates) == (0.5, 3, [])
    twin.bound, twin.skipped = 0.1, 4
    assert (shelled.bound, original.skipped) == (0.5, 3)
    if how is copy.deepcopy:
        twin.param_groups[0]["lr"] = 9.0
        assert original.param_groups[0]["lr"] == 0.1


def test_shell_and_original_copied_together_stay_one():
    original = GatedGradClip(SGD(network().parameters(), lr=0.1))
    shelled, twin = copy.deepcopy((Mixed(original), original))
    shelled.bound = 0.25
    assert twin.bound == 0.25
    assert original.bound == 1.0


@shells
def test_shells_survive_a_pickle_whenever_they_do_around_a_plain_optimizer(shell, monkeypatch):
    net = network()
    plain, original = SGD(net.parameters(), lr=0.1), GatedGradClip(SGD(net.parameters(), lr=0.1))
    original.skipped = 3
    with pytest.raises((pickle.PicklingError, AttributeError), match=r"Can't (pickle|get)"):
        pickle.dumps(shell(plain))
    for optimizer in (plain, original):
        shelled = shell(optimizer)
        # A class that can be found by name makes the difference.
        type(shelled).__module__, type(shelled).__qualname__ = __name__, "FoundByName"
        monkeypatch.setitem(globals(), "FoundByName", type(shelled))
        twin = pickle.loads(pickle.dumps(shelled))
        assert twin.param_groups[0]["lr"] == 0.1
    assert twin.skipped == 3


class GateThatKnowsItsOptimizer:
    """A gate that refers back: a cycle for copies."""

    def __call__(self, _task, _transfer):
        return self.optimizer.bound


def test_deepcopy_follows_a_gate_that_holds_the_optimizer():
    gate = GateThatKnowsItsOptimizer()
    optimizer = gate.optimizer = GatedGradClip(SGD(network().parameters(), lr=0.1), gate)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.gate is not gate
        assert twin.gate.optimizer is twin


# Gradients that did not come from the wrapper.


def ungated_step(optimizer, net):
    losses(net, 0)[0].backward()
    optimizer.step()


ungated = partial(
    pytest.warns, UserWarning, match=r"optimizer.backward\(task_loss\) is the step on"
)


def test_a_step_on_other_gradients_warns_once(make):
    net = network()
    optimizer = GatedGradClip(make(net.parameters()))
    with ungated():
        ungated_step(optimizer, net)
    ungated_step(optimizer, net)  # warnings are errors here
    optimizer.zero_grad()
    ungated_step(optimizer, net)


@pytest.mark.parametrize("clear", [clear_by_model, clear_by_inner_optimizer, None])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_on_other_gradients_warns_after_a_gated_one_too(clear, set_to_none):
    twins = Twins(OPTIMIZERS["SGD"])
    train(twins.net, twins.wrapped, range(2))
    if clear is None:
        twins.wrapped.zero_grad(set_to_none)
    else:
        clear(twins)
    with ungated():
        ungated_step(twins.wrapped, twins.net)


@all_shells
def test_shells_warn_once_together(shell):
    net = network()
    original = GatedGradClip(SGD(net.parameters(), lr=0.1))
    shelled = shell(original)
    losses(net, 0)[0].backward()
    with ungated():
        GatedGradClip.step(shelled)
    original.step()
    GatedGradClip.step(shelled)


def test_a_closure_that_calls_plain_backward_warns_once(make):
    net = network()
    optimizer = GatedGradClip(make(net.parameters()))

    def closure():
        optimizer.zero_grad()
        task = losses(net, 0)[0]
        task.backward()
        return task.item()

    with ungated():
        optimizer.step(closure)
    optimizer.step(closure)


def clip(net, _optimizer):
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)


def clip_values(net, _optimizer):
    nn.utils.clip_grad_value_(net.parameters(), 1e-3)


def scale_in_place(net, _optimizer):
    for p in net.parameters():
        p.grad.mul_(0.5)


def add_a_plain_gradient(net, _optimizer):
    losses(net, 5)[0].backward()


def step_already(_net, optimizer):
    optimizer.step()


@pytest.mark.parametrize(
    "between", [clip, clip_values, scale_in_place, add_a_plain_gradient, step_already]
)
@pytest.mark.parametrize("without_transfer", [True, False])
def test_gated_gradients_may_be_changed_in_place_and_used_twice(make, between, without_transfer):
    net = network()
    optimizer = GatedGradClip(make(net.parameters()))
    for seed in range(2):
        optimizer.zero_grad()
        task, transfer = losses(net, seed)
        optimizer.backward(task, None if without_transfer else transfer)
        between(net, optimizer)
        optimizer.step()  # warnings are errors here


def test_a_resumed_optimizer_does_not_warn(make):
    net = network()
    optimizer = GatedGradClip(make(net.parameters()))
    train(net, optimizer, range(2))
    resumed = GatedGradClip(make(net.parameters()))
    resumed.load_state_dict(optimizer.state_dict())
    train(net, resumed, range(2))


# What frameworks do to an optimizer.


def test_loading_a_plain_state_dict_resets_the_count(make):
    net = network()
    optimizer = GatedGradClip(make(net.parameters()))
    plain = make(net.parameters()).state_dict()
    for seed in range(2):
        optimizer.zero_grad()
        task, transfer = losses(net, seed)
        optimizer.backward(task, transfer * float("nan"))
    state = through_file(optimizer.state_dict())
    assert state["skipped"] == 2
    optimizer.load_state_dict(plain)
    assert optimizer.skipped == 0
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    optimizer.load_state_dict(state)
    assert optimizer.skipped == 2
    make(net.parameters()).load_state_dict(state)  # the plain one leaves the rest alone


def test_state_and_groups_can_be_assigned(make):
    net, twin = network(), network()
    wrapped, plain = GatedGradClip(make(net.parameters())), make(twin.parameters())
    for optimizer, its_net in ((wrapped, net), (plain, twin)):
        (group,) = optimizer.param_groups
        optimizer.param_groups = [
            {**group, "params": list(its_net.front.parameters())},
            {**group, "params": list(its_net.back.parameters()), "lr": 0.2},
        ]
        optimizer.state = copy.copy(optimizer.state)
        optimizer.defaults = {**optimizer.defaults, "lr": 0.3}
    assert wrapped.param_groups is wrapped.optimizer.param_groups
    assert wrapped.state is wrapped.optimizer.state
    assert wrapped.defaults is wrapped.optimizer.defaults
    for seed in range(3):
        wrapped.zero_grad()
        wrapped.backward(*losses(net, seed))
        wrapped.step()
        gradients_by_hand(twin, [seed], "norm")
        plain.step()
    assert set(wrapped.state) == set(net.parameters())
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_wrapped_optimizer_can_be_replaced():
    net = network()
    optimizer = GatedGradClip(SGD(net.parameters(), lr=0.1))
    optimizer.optimizer = Adam(net.parameters(), lr=0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25
    train(net, optimizer, range(1))
    assert "exp_avg" in optimizer.state[net.front.weight]


class ScheduleFree(SGD):
    """The interface of schedule-free optimizers."""

    mode = None

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"


@pytest.mark.parametrize("shell", [lambda optimizer: optimizer, Mixed, Copied])
def test_modes_of_schedule_free_optimizers_are_passed_on(shell):
    inner = ScheduleFree(network().parameters(), lr=0.1)
    optimizer = shell(GatedGradClip(inner))
    for mode in ("train", "eval", "train"):
        assert callable(getattr(optimizer, mode))
        getattr(optimizer, mode)()
        assert inner.mode == mode


def test_optimizers_without_modes_ignore_them(make):
    optimizer = GatedGradClip(make(network().parameters()))
    assert optimizer.train() is optimizer.eval() is None


# Gradient accumulation by a framework.


class Accumulates(SGD):
    """Steps and clears in every second call, as an optimizer that accelerate has prepared."""

    sync = True

    def step(self, closure=None):
        return super().step(closure) if self.sync else None

    def zero_grad(self, set_to_none=True):
        if self.sync:
            super().zero_grad(set_to_none)


def compare_accumulation(net, optimizer, accumulating, calls=6, every=3):
    """Train with an optimizer that ignores calls, beside a plain accumulation loop."""
    twin = copy.deepcopy(net)
    by_hand = SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for seed in range(calls):
        with accumulating(last=seed % every == every - 1):
            optimizer.backward(*losses(net, seed))
            optimizer.step()
            optimizer.zero_grad()
        if seed % every == every - 1:
            gradients_by_hand(twin, range(seed - every + 1, seed + 1), "norm")
            by_hand.step()
            for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_sums_outlive_a_zero_grad_that_clears_nothing():
    net = network()
    inner = Accumulates(net.parameters(), lr=0.1, momentum=0.9)

    @contextlib.contextmanager
    def accumulating(last):
        inner.sync = last
        yield

    compare_accumulation(net, GatedGradClip(inner), accumulating)


@pytest.mark.parametrize("scope", ["parameter", "global"])
def test_leaves_outside_take_part_while_zero_grad_clears_nothing(scope):
    net, twin = network(), network()
    inner = Accumulates(net.front.parameters(), lr=0.1)
    wrapped = GatedGradClip(inner, scope=scope)
    joint = GatedGradClip(SGD(twin.parameters(), lr=0.1), scope=scope)
    inner.sync = False
    for seed in range(3):
        wrapped.backward(*losses(net, seed))
        wrapped.zero_grad()
        joint.backward(*losses(twin, seed))
    task, transfer = losses(net, 3)[1] / 9, losses(twin, 3)[1] / 9  # reaches the front alone
    wrapped.backward(task, losses(net, 4)[1])
    joint.backward(transfer, losses(twin, 4)[1])
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
        inner = SGD(net.parameters(), lr=0.1, momentum=0.9)
        if prepared == "inside":
            optimizer = GatedGradClip(accelerator.prepare(inner))
        else:
            optimizer = accelerator.prepare(GatedGradClip(inner))
    shell = optimizer if prepared == "inside" else BackwardOf(optimizer)

    def accumulating(last):
        del last  # accelerate counts for itself
        return accelerator.accumulate(net)

    compare_accumulation(net, shell, accumulating)
    optimizer.train()
    optimizer.eval()


class BackwardOf:
    """An AcceleratedOptimizer has no `backward`; what it wraps has."""

    def __init__(self, optimizer):
        self.backward = optimizer.optimizer.backward
        self.step, self.zero_grad = optimizer.step, optimizer.zero_grad


# Flows that must not be taken for ungated training.


def test_an_optimizer_whose_gradients_another_wrapper_gated_does_not_warn():
    net = network()
    one = GatedGradClip(SGD(net.front.parameters(), lr=0.1))
    other = GatedGradClip(SGD(net.back.parameters(), lr=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(2):
            one.zero_grad()
            other.zero_grad()
            one.backward(*losses(net, seed))
            one.step()
            other.step()


@pytest.mark.parametrize("change", [lambda g: g.clamp(-1, 1), torch.nan_to_num])
def test_replaced_gradients_do_not_warn(make, change):
    net = network()
    optimizer = GatedGradClip(make(net.parameters()))
    optimizer.backward(*losses(net, 0))
    for p in net.parameters():
        p.grad = change(p.grad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_step_that_moves_nothing_does_not_warn():
    net = network()
    optimizer = GatedGradClip(SGD(net.parameters(), lr=0.0, momentum=0.9))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_autocast_around_backward_changes_nothing():
    gradients = []
    for enabled in (False, True):
        net = network(torch.float32)
        optimizer = GatedGradClip(SGD(net.parameters(), lr=0.1))
        task, transfer = losses(net, 0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            optimizer.backward(task, transfer)
        gradients.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
