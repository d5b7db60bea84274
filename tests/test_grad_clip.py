"""Laws of the gates, the program's and the poster's numbers, and what is refused.

Losses here are linear, Σ p · g: their gradients are the ones the test chose.
"""

import copy
import math
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch._functorch.config as functorch_config
from golden_case import load
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch.utils.checkpoint import checkpoint

import graph_kd
from graph_kd import GatedGradClip
from graph_kd._autograd import find_leaves
from graph_kd._gate import gate_factors, merge_gradients

SHAPES = [(3, 4), (5,), (), (2, 1, 3)]
GATES = ["norm", "sigmoid", lambda task, transfer: task / (task + transfer)]
EPOCHS = {"0": 0, "1": 1, "5": 5, "40": 40, "_minus1": -1}

gates = pytest.mark.parametrize("gate", GATES, ids=["norm", "sigmoid", "callable"])
scopes = pytest.mark.parametrize("scope", ["parameter", "global"])
bounds = st.sampled_from([0.3, 1.0, 3.0])


def linear(params, gradients):
    """Return a loss with the given gradients; None leaves a parameter out of it."""
    terms = [(p * g).sum() for p, g in zip(params, gradients, strict=True) if g is not None]
    return torch.stack(terms).sum()


def zeros_like(*gradient_lists):
    """Return parameters at zero for gradients of which some are None."""
    pairs = zip(*gradient_lists, strict=True)
    examples = [next((g for g in pair if g is not None), torch.zeros(2)) for pair in pairs]
    return [torch.zeros_like(g).requires_grad_() for g in examples]


def through_function(task, transfer, gate, **settings):
    merged = merge_gradients(task, transfer, gate, **settings)
    return merged.gradients, merged.factors.tolist()


def through_wrapper(task, transfer, gate, **settings):
    params = zeros_like(task, transfer)
    optimizer = GatedGradClip(torch.optim.SGD(params, lr=1.0), gate, **settings)
    optimizer.backward(linear(params, task), linear(params, transfer))
    return [p.grad for p in params], optimizer.gates


routes = pytest.mark.parametrize("route", [through_function, through_wrapper])


def relative_error(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


def norm_of(gradients):
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients))


@st.composite
def gradient_pairs(draw):
    """Draw task and transfer gradients of any size against each other, parameter by parameter."""
    generator = torch.Generator().manual_seed(draw(seeds))
    powers = st.floats(-4, 4)

    def gradient(shape):
        raw = torch.randn(shape, generator=generator, dtype=torch.float64)
        return raw * 10 ** draw(powers)

    return [gradient(s) for s in SHAPES], [gradient(s) for s in SHAPES]


def gated_parts(transfer, factors):
    factors = factors * len(transfer) if len(factors) == 1 else factors
    return [factor * g for factor, g in zip(factors, transfer, strict=True)]


# The authors' program and the poster, number by number.


@routes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epoch", EPOCHS)
def test_norm_gate_is_the_programs(route, epoch, dtype):
    case = load("clip_case", dtype)
    task, transfer = ([case[f"{kind}{v}"] for v in range(5)] for kind in ("gc", "gd"))
    bound = 1 / (1 + math.exp(-EPOCHS[epoch]))
    assert bound == pytest.approx(case[f"epoch{epoch}.sigmoid"].item(), rel=1e-6)

    gradients, factors = route(task, transfer, "norm", scope="parameter", bound=bound)
    for v, gated in enumerate(gated_parts(transfer, factors)):
        assert relative_error(gated, case[f"epoch{epoch}.clipped_gd{v}"]) < 1e-4
        assert relative_error(gradients[v] + case[f"gw{v}"], case[f"epoch{epoch}.total{v}"]) < 1e-4


@pytest.mark.parametrize("epoch", EPOCHS)
def test_weight_decay_stays_with_the_wrapped_optimizer_as_in_the_program(epoch):
    case = load("clip_case")
    decay = 5e-4
    params = [(case[f"gw{v}"] / decay).requires_grad_() for v in range(5)]
    before = [p.detach().clone() for p in params]
    optimizer = GatedGradClip(torch.optim.SGD(params, lr=1.0, weight_decay=decay))
    optimizer.bound = case[f"epoch{epoch}.sigmoid"].item()
    task, transfer = ([case[f"{kind}{v}"] for v in range(5)] for kind in ("gc", "gd"))
    optimizer.backward(linear(params, task), linear(params, transfer))
    optimizer.step()
    for v, (old, new) in enumerate(zip(before, params, strict=True)):
        assert relative_error(old - new.detach(), case[f"epoch{epoch}.total{v}"]) < 1e-4


@routes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("scope", "form"), [("global", "all"), ("parameter", "each")])
def test_sigmoid_gate_is_the_posters(route, scope, form, dtype):
    case = load("clip_case", dtype)
    task, transfer = ([case[f"{kind}{v}"] for v in range(5)] for kind in ("gc", "gd"))
    gradients, factors = route(task, transfer, "sigmoid", scope=scope, bound=1.0)
    assert len(factors) == (1 if form == "all" else 5)
    for v, gated in enumerate(gated_parts(transfer, factors)):
        wanted = case[f"poster.{form}.gd{v}"]
        assert relative_error(gated, wanted) < 1e-4
        assert relative_error(gradients[v], task[v] + wanted) < 1e-4
        tau = case["poster.all.tau" if form == "all" else f"poster.each.tau{v}"]
        assert factors[0 if form == "all" else v] == pytest.approx(tau.sigmoid().item(), rel=1e-4)


# Laws of the norm gate.


@given(pair=gradient_pairs(), bound=bounds)
def test_norm_gate_bounds_each_parameter_and_leaves_smaller_ones_untouched(pair, bound):
    task, transfer = pair
    _, factors = through_wrapper(task, transfer, "norm", scope="parameter", bound=bound)
    for g, d, factor in zip(task, transfer, factors, strict=True):
        limit = bound * g.norm().item()
        if d.norm().item() <= limit * (1 - 1e-9):
            assert factor == 1.0
        elif d.norm().item() >= limit * (1 + 1e-9):
            assert factor * d.norm().item() == pytest.approx(limit, rel=1e-12)


@given(pair=gradient_pairs(), bound=bounds)
def test_norm_gate_bounds_the_global_norm_by_one_factor(pair, bound):
    task, transfer = pair
    _, (factor,) = through_wrapper(task, transfer, "norm", scope="global", bound=bound)
    wanted = min(1.0, bound * norm_of(task) / norm_of(transfer))
    assert factor == pytest.approx(wanted, rel=1e-12)


@scopes
def test_norm_gate_leaves_a_transfer_gradient_at_the_bound_untouched(scope):
    task, transfer = [torch.tensor([3.0, 4.0])], [torch.tensor([-5.0, 0.0])]
    gradients, factors = through_wrapper(task, transfer, "norm", scope=scope, bound=1.0)
    assert factors == [1.0]
    assert torch.equal(gradients[0], torch.tensor([-2.0, 4.0]))


@pytest.mark.parametrize(
    ("task", "transfer", "merged"),
    [
        ([1.0, 0.0], [10.0, 0.0], [2.0, 0.0]),  # parallel
        ([1.0, 0.0], [0.0, -10.0], [1.0, -1.0]),  # orthogonal
        ([1.0, 0.0], [-10.0, 0.0], [0.0, 0.0]),  # opposite
        ([1.0, 0.0], [0.25, 0.5], [1.25, 0.5]),  # smaller than the bound
    ],
)
@scopes
def test_norm_gate_on_known_vectors(scope, task, transfer, merged):
    task, transfer = [torch.tensor(task)], [torch.tensor(transfer)]
    gradients, _ = through_wrapper(task, transfer, "norm", scope=scope, bound=1.0)
    assert torch.equal(gradients[0], torch.tensor(merged))


@scopes
@gates
@given(pair=gradient_pairs())
def test_direction_of_the_transfer_gradient_is_kept(gate, scope, pair):
    task, transfer = pair
    gradients, factors = through_wrapper(task, transfer, gate, scope=scope, bound=1.0)
    assert all(0 <= factor <= 1 for factor in factors)
    for merged, g, gated in zip(gradients, task, gated_parts(transfer, factors), strict=True):
        torch.testing.assert_close(merged, g + gated, rtol=1e-12, atol=0)


@scopes
@gates
@given(pair=gradient_pairs(), power=st.integers(-20, 20))
def test_a_common_scale_of_both_losses_scales_the_merged_gradient(gate, scope, pair, power):
    settings = {"scope": scope, "bound": 1.0}
    gradients, factors = through_wrapper(*pair, gate, **settings)
    scaled = [[g * 2.0**power for g in gs] for gs in pair]
    scaled_gradients, scaled_factors = through_wrapper(*scaled, gate, **settings)
    assert scaled_factors == factors  # exactly: a power of two rounds nothing
    for merged, scaled_merged in zip(gradients, scaled_gradients, strict=True):
        assert torch.equal(scaled_merged, merged * 2.0**power)


@scopes
@gates
@given(pair=gradient_pairs(), order=st.permutations(range(len(SHAPES))))
def test_order_of_parameters_does_not_matter(gate, scope, pair, order):
    settings = {"scope": scope, "bound": 1.0}
    gradients, _ = through_wrapper(*pair, gate, **settings)
    permuted, _ = through_wrapper(*([gs[n] for n in order] for gs in pair), gate, **settings)
    for n, merged in zip(order, permuted, strict=True):
        torch.testing.assert_close(merged, gradients[n], rtol=1e-12, atol=0)


@gates
@given(pair=gradient_pairs())
def test_global_scope_sees_no_borders_between_parameters(gate, pair):
    settings = {"scope": "global", "bound": 1.0}
    gradients, _ = through_wrapper(*pair, gate, **settings)
    joined = [[torch.cat([g.flatten() for g in gs])] for gs in pair]
    (as_one,), _ = through_wrapper(*joined, gate, **settings)
    wanted = torch.cat([merged.flatten() for merged in gradients])
    torch.testing.assert_close(as_one, wanted, rtol=1e-9, atol=1e-15)


# Laws of the sigmoid gate and of callables.


@scopes
@given(pair=gradient_pairs())
def test_sigmoid_gate_lies_between_0_731_and_1_and_grows_with_the_task(scope, pair):
    task, transfer = pair
    _, factors = through_wrapper(task, transfer, "sigmoid", scope=scope, bound=1.0)
    least = 1 / (1 + math.exp(-1))
    assert all(least - 1e-12 <= factor <= 1 for factor in factors)
    larger_task = [10 * g for g in task]
    _, larger = through_wrapper(larger_task, transfer, "sigmoid", scope=scope, bound=1.0)
    assert all(a <= b for a, b in zip(factors, larger, strict=True))


@pytest.mark.parametrize("ratio", [1.5, 2.0, 5.0])
def test_sigmoid_gate_at_known_ratios(ratio):
    task, transfer = [torch.tensor([ratio, 0.0])], [torch.tensor([0.0, 1.0])]
    _, (factor,) = through_wrapper(task, transfer, "sigmoid", scope="parameter", bound=1.0)
    assert factor == pytest.approx(1 / (1 + math.exp(-ratio)), rel=1e-6)


@scopes
def test_bound_belongs_to_the_norm_gate_alone(scope):
    pair = [torch.tensor([1.0])], [torch.tensor([10.0])]
    for gate in ("sigmoid", lambda _task, _transfer: 0.5):
        one, _ = through_wrapper(*pair, gate, scope=scope, bound=1.0)
        other, _ = through_wrapper(*pair, gate, scope=scope, bound=0.01)
        assert torch.equal(one[0], other[0])


@pytest.mark.parametrize("as_tensor", [True, False])
@scopes
def test_callable_gate_receives_the_two_norms_and_returns_the_factor(scope, as_tensor):
    task = [torch.tensor([3.0, 4.0]), torch.tensor([12.0])]
    transfer = [torch.tensor([0.0, 2.0]), torch.tensor([1.5])]
    seen = []

    def gate(task_norm, transfer_norm):
        assert task_norm.shape == transfer_norm.shape == ()
        seen.append((task_norm.item(), transfer_norm.item()))
        factor = 0.25 * len(seen)
        return torch.tensor(factor) if as_tensor else factor

    gradients, factors = through_wrapper(task, transfer, gate, scope=scope, bound=1.0)
    if scope == "parameter":
        assert seen == [(5.0, 2.0), (12.0, 1.5)]
        assert factors == [0.25, 0.5]
    else:
        assert seen == [(13.0, 2.5)]
        assert factors == [0.25]
    for merged, g, gated in zip(gradients, task, gated_parts(transfer, factors), strict=True):
        assert torch.equal(merged, g + gated)


def test_norm_is_the_default_gate_per_parameter_with_bound_one():
    params = [torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)]
    optimizer = GatedGradClip(torch.optim.SGD(params, lr=1.0))
    task = [torch.tensor([1.0, 0.0]), torch.tensor([8.0, 0.0])]
    transfer = [torch.tensor([0.0, 2.0]), torch.tensor([0.0, 2.0])]
    optimizer.backward(linear(params, task), linear(params, transfer))
    assert optimizer.gates == [0.5, 1.0]


@scopes
@given(seed=seeds)
def test_closed_gate_is_the_plain_optimizer_bit_for_bit(scope, seed):
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(s, generator=generator) for s in SHAPES]
    wrapped = [p.clone().requires_grad_() for p in start]
    plain = [p.clone().requires_grad_() for p in start]
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    optimizer = GatedGradClip(
        torch.optim.SGD(wrapped, **settings), lambda _task, _transfer: 0.0, scope=scope
    )
    reference = torch.optim.SGD(plain, **settings)
    for _ in range(4):
        goals = [torch.randn(s, generator=generator) for s in SHAPES]

        def task_loss(params, goals=goals):
            return torch.stack(
                [(p - t).square().sum() for p, t in zip(params, goals, strict=True)]
            ).sum()

        optimizer.zero_grad()
        optimizer.backward(task_loss(wrapped), 1e3 * torch.stack([p.sum() for p in wrapped]).sum())
        optimizer.step()
        reference.zero_grad()
        task_loss(plain).backward()
        reference.step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(wrapped, plain, strict=True))


# Zeros, Nones, half precision.


@scopes
@gates
def test_a_transfer_gradient_of_zero_changes_nothing(gate, scope):
    task = [torch.tensor([1.0, -2.0]), torch.tensor([3.0])]
    transfer = [torch.zeros_like(g) for g in task]
    gradients, factors = through_wrapper(task, transfer, gate, scope=scope, bound=1.0)
    assert all(torch.equal(merged, g) for merged, g in zip(gradients, task, strict=True))
    assert all(math.isfinite(factor) for factor in factors)


@scopes
@pytest.mark.parametrize(("gate", "factor"), [("norm", 0.0), ("sigmoid", 0.7310585786)])
def test_a_task_gradient_of_zero(gate, factor, scope):
    transfer = [torch.tensor([1.0, -2.0]), torch.tensor([3.0])]
    task = [torch.zeros_like(g) for g in transfer]
    gradients, factors = through_wrapper(task, transfer, gate, scope=scope, bound=1.0)
    assert factors == pytest.approx([factor] * len(factors))
    for merged, d in zip(gradients, transfer, strict=True):
        torch.testing.assert_close(merged, factor * d)


@scopes
@pytest.mark.parametrize("gate", ["norm", "sigmoid"])
def test_both_gradients_zero_give_zero_and_no_nan(gate, scope):
    zeros = [torch.zeros(3), torch.zeros(())]
    gradients, factors = through_wrapper(zeros, zeros, gate, scope=scope, bound=1.0)
    assert all(torch.equal(merged, torch.zeros_like(merged)) for merged in gradients)
    assert all(math.isfinite(factor) for factor in factors)


@routes
def test_parameters_reached_by_one_loss_or_by_neither(route):
    task_only, transfer_only, both = (torch.tensor([float(n), 1.0]) for n in (1, 2, 3))
    task = [task_only, None, both, None]
    transfer = [None, transfer_only, 10 * both, None]
    gradients, factors = route(task, transfer, "norm", scope="parameter", bound=1.0)
    assert torch.equal(gradients[0], task_only)
    assert torch.equal(gradients[1], transfer_only)  # shorter than the whole task gradient
    torch.testing.assert_close(gradients[2], 2 * both)
    assert gradients[3] is None
    assert factors == pytest.approx([1.0, 0.1])


@routes
@scopes
def test_losses_that_reach_no_parameter_in_common(route, scope):
    task, transfer = [torch.tensor([3.0]), None], [None, torch.tensor([6.0])]
    gradients, factors = route(task, transfer, "norm", scope=scope, bound=1.0)
    assert factors == [0.5]
    assert [g.item() for g in gradients] == [3.0, 3.0]


# Parameters that the transfer loss alone reaches: attention heads, a regressor.


@routes
@gates
@given(pair=gradient_pairs(), alone=st.sets(st.integers(0, 3), min_size=1, max_size=3))
def test_a_parameter_without_a_task_gradient_is_gated_by_the_norm_of_all_of_it(
    route, gate, pair, alone
):
    task = [None if n in alone else g for n, g in enumerate(pair[0])]
    transfer = pair[1]
    whole = torch.tensor(norm_of([g for g in task if g is not None]), dtype=torch.float64)
    norms = [whole if g is None else g.norm() for g in task]
    wanted = gate_factors(
        torch.stack(norms), torch.stack([d.norm() for d in transfer]), gate, bound=0.7
    )
    gradients, factors = route(task, transfer, gate, scope="parameter", bound=0.7)
    assert factors == pytest.approx(wanted.tolist(), rel=1e-12)
    for n in alone:
        assert gradients[n].any()
        torch.testing.assert_close(gradients[n], wanted[n] * transfer[n], rtol=1e-12, atol=0)
        if gate == "norm":
            assert gradients[n].norm() <= 0.7 * whole * (1 + 1e-12)


def test_a_task_gradient_counts_in_the_whole_where_the_transfer_loss_does_not_reach():
    task, transfer = [torch.tensor([3.0]), torch.tensor([4.0]), None], [None, None, torch.ones(1)]
    _, factors = through_wrapper(
        task, [None, None, 10 * transfer[2]], "norm", scope="parameter", bound=1.0
    )
    assert factors == [0.5]


def heads_case(gate="norm", **settings):
    """Return a body with a task gradient of norm 3, heads with a transfer gradient of norm 6."""
    body, heads = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = GatedGradClip(torch.optim.SGD([body, heads], lr=0.1), gate, **settings)

    def backward():
        optimizer.backward(3 * body[0], 6 * heads.sum())

    return body, heads, optimizer, backward


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_gradient_cleared_to_zero_is_no_task_gradient(set_to_none):
    _, heads, optimizer, backward = heads_case()
    for _ in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        backward()
        assert optimizer.gates == [0.5]
        assert heads.grad.item() == 3.0


def test_a_task_gradient_of_zero_closes_the_gate_of_its_parameter_alone():
    body, heads, optimizer, _ = heads_case()
    optimizer.backward(3 * body[0] + 0 * heads.sum(), 6 * heads.sum())
    assert optimizer.gates == [0.0]
    optimizer.backward(3 * body[0], 6 * heads.sum())  # accumulated: the task has reached it
    assert optimizer.gates == [0.0]
    optimizer.zero_grad(set_to_none=False)
    optimizer.backward(3 * body[0], 6 * heads.sum())
    assert optimizer.gates == [0.5]


def test_a_gradient_that_stood_there_is_the_task_gradient_of_its_parameter():
    _, heads, optimizer, backward = heads_case()
    heads.grad = torch.tensor([1.5])
    backward()
    assert optimizer.gates == [0.25]
    assert heads.grad.item() == 3.0


def test_sums_of_transfer_only_parameters_are_gated_by_the_whole_sum():
    _, heads, optimizer, backward = heads_case(bound=0.5)
    for call in (1, 2, 3):
        backward()
        assert heads.grad.item() == pytest.approx(1.5 * call)
        assert optimizer.gates == [0.25]


def test_a_callable_gate_gets_the_whole_task_norm_of_a_transfer_only_parameter():
    seen = []
    _, _, _, backward = heads_case(lambda *norms: seen.append([n.item() for n in norms]) or 1.0)
    backward()
    assert seen == [[3.0, 6.0]]


def test_without_a_task_gradient_anywhere_the_gate_is_closed():
    body, heads, optimizer, _ = heads_case()
    optimizer.backward(0 * body[0], 6 * heads.sum())
    assert optimizer.gates == [0.0]


# Tensors that the optimizer does not hold.


class Pair:
    """A trained parameter at 0, and one of another optimizer or of none."""

    def __init__(self, gate="norm", scope="parameter", dtype=torch.float32):
        self.held = torch.zeros(2, requires_grad=True, dtype=dtype)
        self.other = torch.zeros(1, requires_grad=True, dtype=dtype)
        self.optimizer = GatedGradClip(torch.optim.SGD([self.held], lr=0.1), gate, scope=scope)

    def backward(self, task, transfer):
        params = [self.held, self.other]
        losses = [linear(params, g) if g is not None else None for g in (task, transfer)]
        self.optimizer.backward(*losses)


ONE, TWO = torch.tensor([1.0, 0.0]), torch.tensor([2.0])


@scopes
@gates
@pytest.mark.parametrize(
    ("task", "transfer"),
    [
        ([ONE, TWO], [4 * ONE, 4 * TWO]),
        ([ONE, TWO], [4 * ONE, None]),
        ([ONE, None], [4 * ONE, 4 * TWO]),
        ([ONE, None], [4 * ONE, None]),
        ([ONE, TWO], None),
    ],
    ids=["both", "task", "transfer", "neither", "no transfer loss"],
)
@pytest.mark.parametrize("calls", [1, 3])
def test_a_leaf_outside_the_optimizer_is_gated_as_one_inside(gate, scope, task, transfer, calls):
    outside, inside = Pair(gate, scope), Pair(gate, scope)
    inside.optimizer.add_param_group({"params": [inside.other]})
    for _ in range(calls):
        for pair in (outside, inside):
            pair.backward(task, transfer)
        assert outside.optimizer.gates == inside.optimizer.gates
        assert torch.equal(outside.held.grad, inside.held.grad)
        if task[1] is None and (transfer is None or transfer[1] is None):
            assert outside.other.grad is inside.other.grad is None
        else:
            assert torch.equal(outside.other.grad, inside.other.grad)


@scopes
def test_a_leaf_outside_may_appear_in_a_later_call_and_be_missing_in_the_next(scope):
    outside, inside = Pair(scope=scope), Pair(scope=scope)
    inside.optimizer.add_param_group({"params": [inside.other]})
    for task, transfer in (([ONE, None], [ONE, None]), ([ONE, TWO], [ONE, 9 * TWO])) * 2:
        for pair in (outside, inside):
            pair.backward(task, transfer)
        assert outside.optimizer.gates == inside.optimizer.gates
    assert torch.equal(outside.other.grad, inside.other.grad)


def test_zero_grad_leaves_other_leaves_to_their_own_optimizer():
    pair = Pair()
    for call in (1, 2):
        pair.optimizer.zero_grad()
        assert pair.held.grad is None
        pair.backward([ONE, TWO], [ONE, TWO])
        assert pair.other.grad.item() == 4.0 * call  # as `.backward()` would accumulate
    pair.other.grad = None
    pair.optimizer.zero_grad()
    pair.backward([ONE, TWO], [ONE, TWO])
    assert pair.other.grad.item() == 4.0


@scopes
def test_a_leaf_of_an_earlier_step_takes_no_part_in_a_later_one(scope):
    pair = Pair(scope=scope)
    pair.backward([ONE, 100 * TWO], [ONE, TWO])
    stays = pair.other.grad.clone()
    pair.optimizer.zero_grad()
    pair.backward([ONE, None], [4 * ONE, None])
    assert pair.optimizer.gates == [0.25]
    assert torch.equal(pair.other.grad, stays)


def test_two_optimizers_train_body_and_head():
    torch.manual_seed(0)
    body, head = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
    start = copy.deepcopy((body, head))
    optimizer = GatedGradClip(torch.optim.SGD(body.parameters(), lr=0.1))
    others = torch.optim.SGD(head.parameters(), lr=0.1)
    joint_body, joint_head = start
    joint = GatedGradClip(
        torch.optim.SGD([*joint_body.parameters(), *joint_head.parameters()], lr=0.1)
    )
    for _ in range(3):
        x = torch.randn(5, 4)
        for net, top, trainer in ((body, head, optimizer), (joint_body, joint_head, joint)):
            features = net(x)
            trainer.zero_grad()
            others.zero_grad()
            trainer.backward(top(features).square().mean(), features.sin().sum())
            trainer.step()
            others.step()
    for ours, theirs in zip(
        (*body.parameters(), *head.parameters()), joint.param_groups[0]["params"], strict=True
    ):
        assert torch.equal(ours, theirs)


def test_inputs_that_require_gradient_get_it_and_are_not_kept():
    param, inner = one_parameter()
    optimizer = GatedGradClip(inner)
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    optimizer.backward((param * x).sum(), (param * x).sum())
    assert torch.equal(x.grad, torch.full((2,), 2.0))
    gone = weakref.ref(x)
    del x
    assert gone() is None


def test_leaves_frozen_after_the_forward_pass_get_no_gradient():
    pair = Pair()
    task, transfer = (linear([pair.held, pair.other], [ONE, TWO]) for _ in range(2))
    pair.other.requires_grad_(False)
    pair.optimizer.backward(task, transfer)
    assert pair.other.grad is None
    assert torch.equal(pair.held.grad, 2 * ONE)


def test_a_leaf_outside_may_be_a_loss_itself():
    param, inner = one_parameter()
    optimizer = GatedGradClip(inner)
    with pytest.raises(ValueError, match="`transfer_loss` must depend on the optimizer's param"):
        optimizer.backward(param.sum(), torch.zeros((), requires_grad=True))


def test_leaves_are_found_once_each_in_deep_and_in_branching_graphs():
    leaves = [torch.zeros(1, requires_grad=True) for _ in range(3)]
    x = leaves[0]
    for _ in range(5000):  # deeper than Python's recursion limit
        x = x + leaves[1] * x
    found = find_leaves((x * leaves[2]).sum(), x.sum())
    assert len(found) == 3
    assert set(found) == set(leaves)


def test_rejects_sparse_gradients_outside_the_optimizer():
    words, body = torch.nn.Embedding(5, 2, sparse=True), torch.nn.Linear(2, 1)
    optimizer = GatedGradClip(torch.optim.SGD(body.parameters(), lr=0.1))
    output = body(words(torch.tensor([0, 3])))
    with pytest.raises(ValueError, match="dense gradients; a tensor outside the optimizer of sh"):
        optimizer.backward(output.sum(), output.square().sum())


# A step on the task alone.


@scopes
@gates
def test_without_a_transfer_loss_the_step_is_the_plain_one(gate, scope):
    pair = Pair(gate, scope)
    pair.backward([ONE, TWO], None)
    assert torch.equal(pair.held.grad, ONE)
    assert torch.equal(pair.other.grad, TWO)
    assert pair.optimizer.gates == []
    assert pair.optimizer.skipped == 0


def test_without_a_transfer_loss_the_graph_is_freed():
    param, inner = one_parameter()
    task = param.square().sum()
    GatedGradClip(inner).backward(task)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        task.backward()


@scopes
@pytest.mark.parametrize("without", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_micro_batches_with_and_without_a_transfer_loss_may_mix(scope, without):
    mixed, summed = Pair(scope=scope), Pair(scope=scope)
    for call in range(3):
        mixed.backward([ONE, TWO], None if call in without else [5 * ONE, 7 * TWO])
    calls = 3 - len(without)
    summed.backward([3 * ONE, 3 * TWO], [5 * calls * ONE, 7 * calls * TWO])
    assert mixed.optimizer.gates == pytest.approx(summed.optimizer.gates)
    torch.testing.assert_close(mixed.held.grad, summed.held.grad)
    torch.testing.assert_close(mixed.other.grad, summed.other.grad)


def test_gates_are_those_of_the_last_step():
    pair = Pair()
    pair.backward([ONE, TWO], [4 * ONE, 4 * TWO])
    assert pair.optimizer.gates == [0.25, 0.25]
    pair.optimizer.zero_grad()
    pair.other.grad = None
    pair.backward([ONE, TWO], None)
    assert pair.optimizer.gates == []


def test_a_call_on_the_task_alone_after_an_overflow_counts_no_second_one():
    params, optimizer, task, _, broken = skip_case(math.inf)
    optimizer.backward(linear(params, task), linear(params, broken))
    optimizer.backward(linear(params, task))
    assert optimizer.skipped == 1
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(params, task, strict=True))


def test_global_norms_count_parameters_that_only_one_loss_reaches():
    task = [torch.tensor([3.0]), None, torch.tensor([4.0])]
    transfer = [None, torch.tensor([6.0]), torch.tensor([8.0])]
    gradients, factors = through_wrapper(task, transfer, "norm", scope="global", bound=1.0)
    assert factors == [0.5]
    assert [g.item() for g in gradients] == [3.0, 3.0, 8.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@scopes
@gates
def test_half_precision_parameters_are_gated_by_float32_norms(gate, scope, dtype):
    generator = torch.Generator().manual_seed(0)
    pair = [[torch.randn(300, generator=generator).to(dtype) * s] for s in (50, 500)]
    assert not torch.isfinite(pair[1][0].square().sum().half())  # float16 could not sum it
    (merged,), factors = through_wrapper(*pair, gate, scope=scope, bound=1.0)
    task, transfer = (gs[0].float() for gs in pair)
    _, wanted = through_wrapper([task], [transfer], gate, scope=scope, bound=1.0)
    assert merged.dtype == dtype
    assert factors == pytest.approx(wanted, rel=1e-6)
    roundoff = torch.finfo(dtype).eps
    torch.testing.assert_close(
        merged.float(), task + wanted[0] * transfer, rtol=roundoff, atol=roundoff * 150
    )


def test_bound_holds_in_half_precision_for_a_very_small_factor():
    task = [torch.tensor([0.01, 0.0], dtype=torch.float16)]
    transfer = [torch.tensor([0.0, 60000.0], dtype=torch.float16)]
    (merged,), _ = through_wrapper(task, transfer, "norm", scope="parameter", bound=1.0)
    assert merged[1].item() == pytest.approx(0.01, rel=2e-3)


@scopes
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_parameters_of_different_precision_live_in_one_optimizer(scope, dtypes):
    task = [torch.tensor([3.0, 4.0], dtype=dtype) for dtype in dtypes]
    transfer = [torch.tensor([6.0, 8.0], dtype=dtype) for dtype in dtypes]
    gradients, factors = through_wrapper(task, transfer, "norm", scope=scope, bound=1.0)
    assert factors == pytest.approx([0.5] * len(factors))
    for merged, dtype in zip(gradients, dtypes, strict=True):
        assert torch.equal(merged, torch.tensor([6.0, 8.0], dtype=dtype))


@pytest.mark.parametrize("task_type", [torch.float32, torch.float64])
@pytest.mark.parametrize("transfer_type", [torch.bfloat16, torch.float16, torch.float32])
@scopes
def test_two_precisions_meet_in_the_higher_one(scope, task_type, transfer_type):
    task = [torch.tensor([1.001, 2.003], dtype=task_type)]
    transfer = [torch.tensor([0.5, 0.25], dtype=transfer_type)]
    (merged,), factors, _ = merge_gradients(task, transfer, "norm", scope=scope, bound=1.0)
    assert factors.dtype == torch.float32  # norms are those of the transfer gradient
    assert merged.dtype == torch.promote_types(task_type, transfer_type)
    assert torch.equal(merged, task[0] + transfer[0])


def test_merged_gradients_are_new_tensors():
    task = [torch.ones(2), torch.ones(2), None]
    transfer = [None, torch.ones(2), torch.ones(2)]
    gradients, _ = through_function(task, transfer, "norm", scope="global", bound=1.0)
    given_storage = {g.data_ptr() for g in (*task, *transfer) if g is not None}
    assert not given_storage & {merged.data_ptr() for merged in gradients}


# Transfer gradients that are not finite.


def skip_case(bad, scope="parameter", gate="norm"):
    params = [torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)]
    optimizer = GatedGradClip(torch.optim.SGD(params, lr=0.1), gate, scope=scope)
    task = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])]
    good = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])]
    broken = [good[0], torch.tensor([0.0, bad, 0.0])]
    return params, optimizer, task, good, broken


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@scopes
@gates
def test_non_finite_transfer_gradient_leaves_the_task_alone_and_is_counted(gate, scope, bad):
    params, optimizer, task, _, broken = skip_case(bad, scope, gate)
    for step in (1, 2):
        optimizer.zero_grad()
        optimizer.backward(linear(params, task), linear(params, broken))
        assert all(torch.equal(p.grad, g) for p, g in zip(params, task, strict=True))
        assert optimizer.skipped == step
        assert optimizer.gates == [0.0] * (1 if scope == "global" else 2)
        optimizer.step()
    for p, g in zip(params, task, strict=True):
        torch.testing.assert_close(p.detach(), -0.2 * g)


def test_non_finite_transfer_gradient_leaves_none_where_the_task_does_not_reach():
    params, optimizer, task, _, broken = skip_case(math.nan)
    optimizer.backward(linear(params, [task[0], None]), linear(params, broken))
    assert torch.equal(params[0].grad, task[0])
    assert params[1].grad is None


@pytest.mark.parametrize("where", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("clear", ["wrapper", "parameters"])
def test_a_step_of_several_backward_calls_is_skipped_once(where, clear):
    params, optimizer, task, good, broken = skip_case(math.nan)
    for step in (1, 2):
        for call in range(3):
            transfer = broken if call in where else good
            optimizer.backward(linear(params, task), linear(params, transfer))
        assert optimizer.skipped == step
        for p, g in zip(params, task, strict=True):
            assert torch.equal(p.grad, 3 * g)
        optimizer.step()
        if clear == "wrapper":
            optimizer.zero_grad()
        else:
            for p in params:
                p.grad = None


def test_a_finite_step_after_a_skipped_one_is_gated_again():
    params, optimizer, task, good, broken = skip_case(math.inf)
    for transfer in (broken, good):
        optimizer.zero_grad()
        optimizer.backward(linear(params, task), linear(params, transfer))
    assert optimizer.skipped == 1
    assert optimizer.gates == [1.0, 1.0]
    for p, g, d in zip(params, task, good, strict=True):
        assert torch.equal(p.grad, g + d)


class HalfPrecision(torch.autograd.Function):
    """Pass a gradient through float16, as a backward pass under autocast does."""

    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, gradient):
        return gradient.half().float()


def half_loss(param, gradient):
    return (HalfPrecision.apply(param) * gradient).sum()


def test_rejects_sparse_gradients():
    words = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = GatedGradClip(torch.optim.SGD(words.parameters(), lr=0.1))
    output = words(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"`task_loss` must give dense gradients; parameter 0 of"):
        optimizer.backward(output.sum(), output.square().sum())


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_factor_that_is_not_finite_leaves_the_task_alone_and_is_counted(factor):
    params, optimizer, task, good, _ = skip_case(0.0, gate=lambda *_: factor)
    optimizer.backward(linear(params, task), linear(params, good))
    assert all(torch.equal(p.grad, g) for p, g in zip(params, task, strict=True))
    assert optimizer.skipped == 1


@pytest.mark.parametrize("scope", ["parameter", "global"])
def test_complex_parameters_keep_their_imaginary_part(scope):
    param = torch.zeros(2, dtype=torch.complex64, requires_grad=True)
    optimizer = GatedGradClip(torch.optim.SGD([param], lr=0.1), scope=scope)
    task, transfer = (param * (1 + 2j)).real.sum(), (param * (0.5 - 1j)).real.sum()
    wanted = [torch.autograd.grad(loss, param, retain_graph=True)[0] for loss in (task, transfer)]
    optimizer.backward(task, transfer)
    torch.testing.assert_close(param.grad, wanted[0] + wanted[1])


def behind_a_checkpoint(use_reentrant):
    block, head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)
    optimizer = GatedGradClip(torch.optim.SGD([*block.parameters(), *head.parameters()], lr=0.1))
    x = torch.ones(2, 3, requires_grad=True)
    output = head(checkpoint(block, x, use_reentrant=use_reentrant))
    return block, optimizer, output.sum(), output.exp().sum()  # along each other


def test_refuses_reentrant_checkpoints_which_would_train_nothing_inside_them():
    block, optimizer, task, transfer = behind_a_checkpoint(use_reentrant=True)
    with pytest.raises(RuntimeError, match="Pass use_reentrant=False"):
        optimizer.backward(task, transfer)
    assert block.weight.grad is None


def test_trains_what_is_inside_other_checkpoints():
    block, optimizer, task, transfer = behind_a_checkpoint(use_reentrant=False)
    optimizer.backward(task, transfer)
    assert block.weight.grad.any()


def test_rejects_a_scope_set_to_something_else():
    params, optimizer, task, good, _ = skip_case(0.0)
    optimizer.scope = "globl"
    with pytest.raises(ValueError, match="`scope` must be one of 'parameter', 'global'; got 'glo"):
        optimizer.backward(linear(params, task), linear(params, good))


@pytest.mark.parametrize("factor", [None, "1"])
def test_rejects_a_gate_that_returns_no_number(factor):
    params, optimizer, task, good, _ = skip_case(0.0, gate=lambda *_: factor)
    with pytest.raises(ValueError, match=f"must return a single number; it returned {factor!r}"):
        optimizer.backward(linear(params, task), linear(params, good))


@pytest.mark.parametrize("bound", [math.nan, math.inf, -1.0])
def test_rejects_a_bound_set_to_what_bounds_nothing(bound):
    params, optimizer, task, good, _ = skip_case(0.0)
    optimizer.bound = bound
    with pytest.raises(ValueError, match=r"`bound` must be a finite number ≥ 0"):
        optimizer.backward(linear(params, task), linear(params, good))


def test_rejects_an_optimizer_without_anything_to_train():
    optimizer = GatedGradClip(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    with pytest.raises(ValueError, match=r"`optimizer` must hold a parameter that requires"):
        optimizer.backward(torch.zeros(()), torch.zeros(()))


def test_rejects_a_process_group_of_another_kind():
    with pytest.raises(TypeError, match=r"`process_group` must be a torch.distributed .*'world'"):
        GatedGradClip(torch.optim.SGD([torch.zeros(1)], lr=0.1), process_group="world")


@pytest.mark.parametrize("returned", [torch.tensor([0.5]), 0.5, torch.tensor(0.5)])
def test_a_callable_gate_may_return_any_single_number(returned):
    params, optimizer, task, good, _ = skip_case(0.0, gate=lambda *_: returned)
    optimizer.backward(linear(params, task), linear(params, good))
    assert optimizer.gates == [0.5, 0.5]


def test_rejects_a_callable_gate_that_returns_several_numbers():
    params, optimizer, task, good, _ = skip_case(0.0, gate=lambda *_: torch.ones(2))
    with pytest.raises(ValueError, match=r"`gate` must return a single number; .*shape \(2,\)"):
        optimizer.backward(linear(params, task), linear(params, good))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_task_gradient_is_the_users_to_see(bad):
    params, optimizer, _, good, broken = skip_case(bad)
    optimizer.backward(linear(params, broken), linear(params, good))
    assert not torch.isfinite(params[1].grad).all()
    assert torch.isfinite(params[0].grad).all()
    assert optimizer.skipped == 0


@pytest.mark.parametrize("gate", ["norm", "sigmoid"])
def test_factors_come_entry_by_entry(gate):
    task, transfer = torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0])
    both = gate_factors(task, transfer, gate, bound=1.0)
    first = gate_factors(task[:1], transfer[:1], gate, bound=1.0)
    second = gate_factors(task[1:], transfer[1:], gate, bound=1.0)
    assert torch.equal(both, torch.cat([first, second]))


# What is refused.


def one_parameter():
    param = torch.ones(2, requires_grad=True)
    return param, torch.optim.SGD([param], lr=0.1)


@pytest.mark.parametrize("thing", [None, [torch.ones(2)], torch.nn.Linear(1, 1), torch.optim.SGD])
def test_rejects_what_is_no_optimizer(thing):
    with pytest.raises(TypeError, match=r"`optimizer` must be a torch\.optim\.Optimizer; got \w+"):
        GatedGradClip(thing)


@pytest.mark.parametrize("gate", ["Norm", "tanh", None, 1.0])
def test_rejects_an_unknown_gate(gate):
    _, optimizer = one_parameter()
    with pytest.raises(ValueError, match=r"`gate` must be one of 'norm', 'sigmoid' or a callable"):
        GatedGradClip(optimizer, gate)


@pytest.mark.parametrize("scope", ["params", None, lambda: "global"])
def test_rejects_an_unknown_scope(scope):
    _, optimizer = one_parameter()
    with pytest.raises(ValueError, match=r"`scope` must be one of 'parameter', 'global'; got"):
        GatedGradClip(optimizer, scope=scope)


@pytest.mark.parametrize("bound", [0, 0.0, -1.0, math.nan, math.inf])
def test_rejects_a_bound_that_is_no_finite_positive_number(bound):
    _, optimizer = one_parameter()
    with pytest.raises(ValueError, match=rf"`bound` must be a finite number > 0; got {bound}"):
        GatedGradClip(optimizer, bound=bound)


@pytest.mark.parametrize("bound", ["1", None, True])
def test_rejects_a_bound_that_is_no_number(bound):
    _, optimizer = one_parameter()
    with pytest.raises(TypeError, match=r"`bound` must be a number; got"):
        GatedGradClip(optimizer, bound=bound)


@pytest.mark.parametrize("which", ["task_loss", "transfer_loss"])
@pytest.mark.parametrize(
    ("error", "bad", "message"),
    [
        (TypeError, lambda _p: 1.0, r"must be a tensor; got float"),
        (TypeError, lambda _p: [1.0], r"must be a tensor; got list"),
        (ValueError, lambda p: p * 2, r"must be a scalar; got shape \(2,\)"),
        (ValueError, lambda p: p.detach().sum(), r"must depend on the optimizer's parameters"),
        (ValueError, lambda _p: torch.ones(3, requires_grad=True).sum(), r"none of the 1 gets a"),
    ],
    ids=["float", "list", "vector", "detached", "other parameters"],
)
def test_rejects_losses_that_can_not_train_the_parameters(which, error, bad, message):
    param, inner = one_parameter()
    optimizer = GatedGradClip(inner)
    losses = {"task_loss": param.sum(), "transfer_loss": param.square().sum()}
    losses[which] = bad(param)
    with pytest.raises(error, match=rf"`{which}` .*{message}"):
        optimizer.backward(**losses)
    assert param.grad is None


def test_rejects_no_task_loss():
    param, inner = one_parameter()
    with pytest.raises(TypeError, match="`task_loss` must be a tensor; got NoneType"):
        GatedGradClip(inner).backward(None, param.sum())


def test_accepts_a_loss_of_one_element():
    param, inner = one_parameter()
    GatedGradClip(inner).backward(param.sum(dim=0, keepdim=True), param.sum())
    assert torch.equal(param.grad, torch.full((2,), 2.0))


def test_refuses_several_processes_without_a_process_group(monkeypatch):
    param, inner = one_parameter()
    optimizer = GatedGradClip(inner)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(RuntimeError, match=r"`process_group` must be given among 4 processes"):
        optimizer.backward(param.sum(), param.sum())
    assert param.grad is None


def test_needs_no_process_group_for_a_single_process(monkeypatch):
    param, inner = one_parameter()
    optimizer = GatedGradClip(inner)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    optimizer.backward(param.sum(), param.sum())
    assert torch.equal(param.grad, torch.full((2,), 2.0))


# Compiled students.


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_pair():
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    optimizer = GatedGradClip(torch.optim.SGD(net.parameters(), lr=0.1))
    return net, torch.compile(net, backend="aot_eager"), optimizer


def merged_gradients(net, forward, optimizer, rows):
    optimizer.zero_grad()
    output = forward(torch.ones(rows, 4))
    optimizer.backward(output.square().mean(), output.sin().sum())
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.usefixtures("dynamo")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.skipif(
    not hasattr(functorch_config, "donated_buffer"), reason="this torch donates no buffers"
)
@pytest.mark.parametrize("rows", [3, 5], ids=["the same batch size", "another one"])
def test_donated_buffers_are_named_with_the_setting_that_keeps_them(rows):
    with functorch_config.patch(donated_buffer=True):
        net, compiled, optimizer = compiled_pair()
        compiled(torch.ones(3, 4)).sum().backward()  # the first backward decides
        with pytest.raises(
            RuntimeError, match=r"`torch._functorch.config.donated_buffer"
        ) as caught:
            merged_gradients(net, compiled, optimizer, rows)
        assert "donated buffer" in str(caught.value.__cause__)
    with functorch_config.patch(donated_buffer=False):
        net, compiled, optimizer = compiled_pair()
        compiled(torch.ones(3, 4)).sum().backward()
        got = merged_gradients(net, compiled, optimizer, rows)
        torch.testing.assert_close(got, merged_gradients(net, net, optimizer, rows))


INDUCTOR = """
import sys, torch, torch._functorch.config
from torch import nn
from graph_kd import GatedGradClip

if sys.argv[1] == "two":
    torch._functorch.config.donated_buffer = False

def gradients(compiled):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    x = torch.randn(4, 2, 6, 6)
    output = (torch.compile(net) if compiled else net)(x)
    if sys.argv[1] == "one":
        output.square().mean().backward()
    else:
        optimizer = GatedGradClip(torch.optim.SGD(net.parameters(), lr=0.1), lambda *_: 1.0)
        optimizer.backward(output.square().mean(), output.sin().sum())
    return [p.grad for p in net.parameters()]

torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-3, atol=1e-4)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_both_gradients_as_documented(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    source = str(Path(graph_kd.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([source, environment.get("PYTHONPATH", "")])
    safe = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    # A run with donated buffers fills the cache; the next, without them, must not be served by it.
    for backwards, settings in (("one", {}), ("two", safe)):
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", INDUCTOR, backwards],
            check=True,
            env={**environment, **settings},
        )


def test_other_errors_of_the_backward_pass_come_through():
    param, inner = one_parameter()
    task = param.square().sum()
    task.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        GatedGradClip(inner).backward(task, param.sum())


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_callable_gate_never_sees_a_norm_that_is_not_finite(factor):
    seen = []

    def gate(_task_norm, transfer_norm):
        seen.append(float(transfer_norm))
        return 0.5

    param = torch.nn.Parameter(torch.ones(3))
    optimizer = GatedGradClip(torch.optim.SGD([param], lr=0.1), gate)
    optimizer.backward(param.sum(), factor * param.sum())
    assert seen == [0.0]
    assert torch.equal(param.grad, torch.ones(3))
    assert (optimizer.skipped, optimizer.gates) == (1, [0.0])
