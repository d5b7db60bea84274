"""What `backward` leaves in ``p.grad``: the gates, sums of several calls, and what is refused.

Losses here are linear, Σ p · g: their gradients are the ones the test chose.
"""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import graph_kd
from graph_kd import GatedGradClip


def shrinking(task, transfer):
    """Return the factor of a gate of the user's, from floats or tensors."""
    return task / (task + 2 * transfer + 1)


GATES = {"norm": "norm", "sigmoid": "sigmoid", "callable": shrinking}
gates = pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())
scopes = pytest.mark.parametrize("scope", ["parameter", "global"])


def linear(params, gradients):
    """Return a loss with the given gradients; None leaves a parameter out of it."""
    terms = [(p * g).sum() for p, g in zip(params, gradients, strict=True) if g is not None]
    return torch.stack(terms).sum()


def parameters(*gradient_lists):
    """Return parameters at zero, of the shapes of gradients of which some are None."""
    pairs = zip(*gradient_lists, strict=True)
    examples = [next((g for g in pair if g is not None), torch.zeros(2)) for pair in pairs]
    return [torch.zeros_like(g).requires_grad_() for g in examples]


def merge(task, transfer, gate="norm", **settings):
    """Return the merged gradients and the gates of one call on new parameters."""
    params = parameters(task, transfer)
    optimizer = GatedGradClip(SGD(params, lr=1.0), gate, **settings)
    optimizer.backward(linear(params, task), linear(params, transfer))
    return [p.grad for p in params], optimizer.gates


def one_parameter(value=1.0, **settings):
    param = torch.full((2,), value, requires_grad=True)
    return param, GatedGradClip(SGD([param], lr=0.1), **settings)


def tensors(*rows):
    return [torch.tensor(row) for row in rows]


# The gates.


@pytest.mark.parametrize(
    ("task", "transfer", "merged"),
    [
        ([1.0, 0.0], [10.0, 0.0], [2.0, 0.0]),  # parallel
        ([1.0, 0.0], [0.0, -10.0], [1.0, -1.0]),  # orthogonal
        ([1.0, 0.0], [-10.0, 0.0], [0.0, 0.0]),  # opposite
        ([1.0, 0.0], [0.25, 0.5], [1.25, 0.5]),  # shorter than the task's: added as it is
        ([3.0, 4.0], [-5.0, 0.0], [-2.0, 4.0]),  # as long
        ([1.0, -2.0], [0.0, 0.0], [1.0, -2.0]),
        ([0.0, 0.0], [1.0, -2.0], [0.0, 0.0]),
        ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
    ],
)
@scopes
def test_the_transfer_gradient_is_added_up_to_the_norm_of_the_tasks(task, transfer, merged, scope):
    (gradient,), _ = merge(tensors(task), tensors(transfer), scope=scope)
    assert torch.equal(gradient, torch.tensor(merged))


def test_by_default_each_parameter_is_bounded_by_one_norm_of_its_own():
    _, factors = merge(tensors([1.0, 0.0], [8.0, 0.0]), tensors([0.0, 2.0], [0.0, 2.0]))
    assert factors == [0.5, 1.0]


def test_bound_is_in_norms_of_the_task_and_may_be_set_at_any_time():
    param, optimizer = one_parameter(bound=3)
    for bound in (3.0, 0.5, 0.0):
        optimizer.bound = bound
        optimizer.zero_grad()
        optimizer.backward(*(linear([param], tensors(row)) for row in ([2.0, 0.0], [0.0, 16.0])))
        assert param.grad.tolist() == [2.0, 2.0 * bound]
        assert optimizer.gates == [bound / 8]


@pytest.mark.parametrize(
    ("ratio", "factor"), [(0.0, 0.7311), (0.5, 0.7311), (1.5, 0.8176), (5, 0.9933)]
)
@pytest.mark.parametrize("bound", [1.0, 0.01])
def test_sigmoid_gate_never_falls_below_0_731_and_has_no_bound(ratio, factor, bound):
    (gradient,), factors = merge(tensors([ratio, 0.0]), tensors([0.0, 1.0]), "sigmoid", bound=bound)
    assert factors == pytest.approx([factor], rel=1e-4)
    assert gradient.tolist() == pytest.approx([ratio, factor], rel=1e-4)


@pytest.mark.parametrize("kind", [float, torch.tensor, lambda factor: torch.tensor([[factor]])])
@pytest.mark.parametrize(
    ("scope", "norms"), [("parameter", [(5.0, 2.0), (12.0, 1.5)]), ("global", [(13.0, 2.5)])]
)
def test_a_callable_gate_receives_the_two_norms_and_returns_the_factor(scope, norms, kind):
    seen = []

    def gate(task_norm, transfer_norm):
        assert task_norm.shape == transfer_norm.shape == ()
        seen.append((task_norm.item(), transfer_norm.item()))
        return kind(0.25 * len(seen))

    task, transfer = tensors([3.0, 4.0], [12.0]), tensors([0.0, 2.0], [1.5])
    gradients, factors = merge(task, transfer, gate, scope=scope)
    assert seen == norms
    assert factors == [0.25, 0.5][: len(norms)]
    assert gradients[0].tolist() == [3.0, 4.5]
    assert gradients[1].tolist() == [12.0 + 1.5 * factors[-1]]


def test_a_parameter_keeps_the_gradient_of_the_one_loss_that_reaches_it_or_none():
    task = [torch.tensor([3.0]), None, torch.tensor([4.0]), None]
    transfer = [None, torch.tensor([2.0]), torch.tensor([40.0]), None]
    gradients, factors = merge(task, transfer)
    assert [g if g is None else g.item() for g in gradients] == [3.0, 2.0, 8.0, None]
    assert factors == pytest.approx([1.0, 0.1])


def test_attention_heads_are_bounded_by_the_norm_of_all_task_gradients():
    """A parameter that only the transfer loss reaches has no task gradient of its own."""
    task = [torch.tensor([3.0]), torch.tensor([4.0]), None]
    gradients, _ = merge(task, [None, None, torch.tensor([10.0])], bound=0.5)
    assert [g.item() for g in gradients] == [3.0, 4.0, 2.5]


@scopes
@gates
@given(seed=seeds, power=st.integers(-20, 20))
def test_a_common_scale_of_both_losses_scales_the_merged_gradient(gate, scope, seed, power):
    generator = torch.Generator().manual_seed(seed)
    pair = [[torch.randn(n, generator=generator) for n in (2, 3)] for _ in range(2)]
    gate = gate if gate != shrinking else lambda task, transfer: task / (task + transfer)
    gradients, factors = merge(*pair, gate, scope=scope)
    scaled, same_factors = merge(*([g * 2.0**power for g in gs] for gs in pair), gate, scope=scope)
    assert same_factors == factors  # exactly: a power of two rounds nothing
    assert all(torch.equal(s, g * 2.0**power) for s, g in zip(scaled, gradients, strict=True))


def test_a_step_on_the_task_alone_is_the_plain_one():
    param, optimizer = one_parameter()
    task = param.square().sum()
    optimizer.backward(task)
    assert param.grad.tolist() == [2.0, 2.0]
    assert optimizer.gates == []
    assert optimizer.skipped == 0


def test_gates_are_the_factors_last_applied():
    param, optimizer = one_parameter()
    assert optimizer.gates == []
    optimizer.backward(param.sum(), 4 * param.sum())
    assert optimizer.gates == [0.25]
    assert type(optimizer.gates[0]) is float
    optimizer.zero_grad()
    assert optimizer.gates == [0.25]  # still there for logging
    optimizer.backward(param.sum())
    assert optimizer.gates == []


def test_weight_decay_takes_no_part_in_the_norms():
    param = torch.full((2,), 100.0, requires_grad=True)
    optimizer = GatedGradClip(SGD([param], lr=1.0, weight_decay=0.1))
    optimizer.backward(param[0], 8 * param[1])
    optimizer.step()
    assert param.tolist() == [89.0, 89.0]


# The authors' program and the poster, number by number.

EPOCHS = {"0": 0, "1": 1, "5": 5, "40": 40, "_minus1": -1}


def golden_gradients(dtype):
    case = load("clip_case", dtype)
    return case, *([case[f"{kind}{v}"] for v in range(5)] for kind in ("gc", "gd"))


def relative_error(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epoch", EPOCHS)
def test_norm_gate_is_the_programs(epoch, dtype):
    case, task, transfer = golden_gradients(dtype)
    bound = 1 / (1 + math.exp(-EPOCHS[epoch]))
    assert bound == pytest.approx(case[f"epoch{epoch}.sigmoid"].item(), rel=1e-6)
    gradients, factors = merge(task, transfer, "norm", bound=bound)
    for v in range(5):
        clipped = case[f"epoch{epoch}.clipped_gd{v}"]
        assert relative_error(factors[v] * transfer[v], clipped) < 1e-4
        # Weight decay, gw, stays with the wrapped optimizer.
        assert relative_error(gradients[v] + case[f"gw{v}"], case[f"epoch{epoch}.total{v}"]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("scope", "form"), [("global", "all"), ("parameter", "each")])
def test_sigmoid_gate_is_the_posters(scope, form, dtype):
    case, task, transfer = golden_gradients(dtype)
    gradients, factors = merge(task, transfer, "sigmoid", scope=scope)
    taus = [f"poster.each.tau{v}" for v in range(5)] if form == "each" else ["poster.all.tau"]
    assert factors == pytest.approx([case[tau].sigmoid().item() for tau in taus], rel=1e-4)
    for v in range(5):
        assert relative_error(gradients[v], task[v] + case[f"poster.{form}.gd{v}"]) < 1e-4


# Any gradients, any number of calls, beside the equations written out.


def by_hand(calls, gate, *, scope, bound):
    """Return merged gradients, factors and whether the step is skipped, from the equations."""

    def norm(gradients):
        return math.sqrt(
            sum(g.abs().double().square().sum().item() for g in gradients if g is not None)
        )

    def factor(task, transfer):
        if gate == "norm":
            return 1.0 if transfer <= bound * task else bound * task / transfer
        if gate == "sigmoid":
            tau = max(1.0, task / transfer) if transfer else (math.inf if task else 1.0)
            return 1 / (1 + math.exp(-tau))
        return gate(task, transfer)

    def total(gradients):
        given = [g for g in gradients if g is not None]
        return sum(given[1:], start=given[0]) if given else None

    task = [total(gs) for gs in zip(*(call[0] for call in calls), strict=True)]
    transfers = [call[1] for call in calls if call[1] is not None] or [[None] * len(task)]
    transfer = [total(gs) for gs in zip(*transfers, strict=True)]
    skipped = not all(d is None or d.isfinite().all() for d in transfer)
    factors, merged = [], []
    for g, d in zip(task, transfer, strict=True):
        if d is not None:
            own = norm(task) if g is None or scope == "global" else norm([g])
            other = norm(transfer) if scope == "global" else norm([d])
            factors.append(0.0 if skipped else factor(own, other))
        terms = [g, d if d is None or skipped else factors[-1] * d]
        merged.append(total(terms[:1] if skipped else terms))
    return merged, factors[:1] if scope == "global" else factors, skipped


SHAPES = [(3, 4), (), (5,), (2, 1, 3)]


@st.composite
def some_calls(draw):
    """Draw the gradients of both losses in up to three calls; some are None, zero or infinite."""
    generator = torch.Generator().manual_seed(draw(seeds))
    sizes = st.one_of(st.none(), st.just(0.0), *[st.floats(-4, 4).map(lambda p: 10**p)] * 4)

    def gradients():
        drawn = [draw(sizes) for _ in SHAPES]
        drawn[0] = 1.0 if drawn[0] is drawn[1] is None else drawn[0]  # the loss reaches something
        raw = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        return [None if s is None else s * g for s, g in zip(drawn, raw, strict=True)]

    calls = []
    for _ in range(draw(st.integers(1, 3))):
        task, transfer = gradients(), gradients()
        if draw(st.integers(0, 7)) == 0:
            broken = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
            place = draw(st.integers(0, len(SHAPES) - 1))  # the task may not reach it
            transfer[place] = torch.full(SHAPES[place], broken, dtype=torch.float64)
        calls.append((task, transfer if draw(st.integers(0, 3)) else None))
    return calls


@scopes
@gates
@settings(max_examples=60)
@given(
    steps=st.lists(some_calls(), min_size=1, max_size=3),
    bound=st.sampled_from([0.3, 1.0, 3.0]),
    held=st.sampled_from([4, 3, 2]),
    set_to_none=st.booleans(),
    capturable=st.booleans(),
)
def test_sums_of_all_calls_are_gated_as_the_equations_say(
    gate, scope, steps, bound, held, set_to_none, capturable
):
    """The first ``held`` parameters are the optimizer's, the others of another or of none."""
    params = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]
    optimizer = GatedGradClip(
        SGD(params[:held], lr=1.0), gate, scope=scope, bound=bound, capturable=capturable
    )
    skips = 0
    for calls in steps:
        optimizer.zero_grad(set_to_none)
        for leaf in params[held:]:
            leaf.grad = None
        for task, transfer in calls:
            losses = [linear(params, g) for g in (task, transfer) if g is not None]
            optimizer.backward(*losses)
        merged, factors, skipped = by_hand(calls, gate, scope=scope, bound=bound)
        skips += skipped
        assert int(optimizer.skipped) == skips
        if skipped:
            assert not any(optimizer.gates)
        else:
            reached = sum(any(t and t[n] is not None for _, t in calls) for n in range(held))
            assert optimizer.gates[:reached] == pytest.approx(factors[:reached], rel=1e-9)
            # Leaves outside come in the order of the graph.
            assert sorted(optimizer.gates) == pytest.approx(sorted(factors), rel=1e-9)
        for p, wanted in zip(params, merged, strict=True):
            if wanted is None:
                assert p.grad is None or not p.grad.any()
                assert p.grad is None or capturable or not set_to_none
            else:
                torch.testing.assert_close(p.grad, wanted, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_gradient_cleared_to_zero_is_no_task_gradient_and_one_of_zero_is(set_to_none):
    body, heads = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = GatedGradClip(SGD([body, heads], lr=0.1))
    for _ in range(2):
        optimizer.zero_grad(set_to_none)
        optimizer.backward(3 * body[0], 6 * heads.sum())
        assert optimizer.gates == [0.5]
        assert heads.grad.item() == 3.0
    optimizer.zero_grad(set_to_none)
    optimizer.backward(3 * body[0] + 0 * heads.sum(), 6 * heads.sum())
    assert optimizer.gates == [0.0]
    optimizer.backward(3 * body[0], 6 * heads.sum())
    assert optimizer.gates == [0.0]  # the task has reached it in this step


# What else stands in `p.grad`.


def leave_it(_param):
    pass


def set_to_none(param):
    param.grad = None


def zero_in_place(param):
    param.grad.zero_()


def add_in_place(param):
    (param * torch.tensor([0.5, 0.25])).sum().backward()


def replace(param):
    """Replace it by another one that was changed in place as often."""
    version, param.grad = param.grad._version, torch.tensor([0.5, 0.25])
    while param.grad._version < version:
        param.grad.add_(0)


@pytest.mark.parametrize("change", [leave_it, set_to_none, zero_in_place, add_in_place, replace])
@pytest.mark.parametrize("by_wrapper", [True, False])
def test_what_was_not_left_there_untouched_is_task_gradient(change, by_wrapper):
    param, optimizer = one_parameter()
    calls = [[tensors([1.0, 0.0]), tensors([0.0, 3.0])], [tensors([0.0, 2.0]), tensors([8.0, 0.0])]]
    if by_wrapper:
        optimizer.backward(*(linear([param], g) for g in calls[0]))
    else:
        linear([param], calls[0][0]).backward()
    stood, values = param.grad, param.grad.clone()
    change(param)
    if change is not leave_it or not by_wrapper:
        calls[0] = [[param.grad if param.grad is None else param.grad.clone()], None]
    optimizer.backward(*(linear([param], g) for g in calls[1]))
    merged, factors, _ = by_hand(calls, "norm", scope="parameter", bound=1.0)
    torch.testing.assert_close(param.grad, merged[0])
    assert optimizer.gates == pytest.approx(factors)
    if change is leave_it:  # what the user may still hold is not written to
        param.grad.zero_()
        assert torch.equal(stood, values)


def test_what_stood_in_the_gradient_of_an_attention_head_is_its_task_gradient():
    body, heads = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = GatedGradClip(SGD([body, heads], lr=0.1))
    heads.grad = torch.tensor([1.5])
    optimizer.backward(3 * body[0], 6 * heads.sum())
    assert optimizer.gates == [0.25]  # by its own norm, not by that of all task gradients
    assert heads.grad.item() == 3.0


SHARED = {
    "task": lambda a, b, c: ((a + b).sum() + c.sum(), (c * 3).sum()),
    "transfer": lambda a, b, c: (c.sum(), (a + b).sum()),
    "both": lambda a, b, c: ((a + b + c).sum(), (a + b + c).square().sum()),
    "skipped": lambda a, b, c: ((a + b + c).sum(), (a + b + c).sum() * math.nan),
}


@pytest.mark.parametrize("both", SHARED.values(), ids=SHARED.keys())
def test_parameters_that_share_a_gradient_get_memory_of_their_own(both):
    a, b, c = (torch.full((3,), float(n), requires_grad=True) for n in (1, 2, 3))
    optimizer = GatedGradClip(SGD([a, b, c], lr=0.1))
    optimizer.backward(*both(a, b, c))
    before = b.grad.clone()
    a.grad[0] = 100.0  # one entry, not all: autograd's own sum is one number, expanded
    assert a.grad.tolist()[1:] == before.tolist()[1:]
    assert torch.equal(b.grad, before)


# Leaves that the optimizer does not hold.


def held_and_other(**settings):
    held, other = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    return held, other, GatedGradClip(SGD([held], lr=0.1), **settings)


def test_zero_grad_leaves_other_leaves_to_their_own_optimizer():
    held, other, optimizer = held_and_other()
    for call in (1, 2):
        optimizer.zero_grad()
        assert held.grad is None
        optimizer.backward(held.sum() + other.sum(), held.sum() + 4 * other.sum())
        assert other.grad.item() == 2.0 * call  # as `.backward()` would accumulate
        assert optimizer.gates == [1.0, 0.25]  # of the sums, not of what stood there


@scopes
def test_a_leaf_of_an_earlier_step_takes_no_part_in_a_later_one(scope):
    held, other, optimizer = held_and_other(scope=scope)
    optimizer.backward(held[0] + 100 * other.sum(), held[0] + other.sum())
    stays = other.grad.clone()
    optimizer.zero_grad()
    optimizer.backward(held[0], 4 * held[0])
    assert optimizer.gates == [0.25]
    assert torch.equal(other.grad, stays)


def test_inputs_that_require_gradient_get_it_and_are_not_kept():
    param, optimizer = one_parameter()
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    optimizer.backward((param * x).sum(), (param * x).sum())
    assert torch.equal(x.grad, torch.full((2,), 2.0))
    gone = weakref.ref(x)
    del x
    assert gone() is None


def test_leaves_frozen_after_the_forward_pass_get_no_gradient():
    held, other, optimizer = held_and_other()
    optimizer.backward(held.sum() + other.sum(), held.sum() + other.sum())
    losses = held.sum() + other.sum(), held.sum() + other.sum()
    other.grad = None
    other.requires_grad_(False)
    optimizer.backward(*losses)
    assert other.grad is None
    assert torch.equal(held.grad, torch.full((2,), 4.0))


def test_leaves_of_deep_and_branching_graphs_get_their_gradient():
    held, other, optimizer = held_and_other()
    x = held.sum() + 1
    for _ in range(5000):  # deeper than Python's recursion limit, with 2**5000 paths
        x = x + other.sum() * x
    optimizer.backward(x, x * 1.0)
    assert other.grad.item() == pytest.approx(2 * 5000)


# Gradients that are not finite.


def test_a_transfer_gradient_that_is_not_finite_is_left_out_and_counted_once_a_step():
    held, other, optimizer = held_and_other()
    for step in (1, 2):
        optimizer.zero_grad()
        for factor in (1.0, math.nan, math.inf, 1.0):
            optimizer.backward(held.sum(), factor * (held.sum() + other.sum()))
            optimizer.backward(held.sum())
        assert held.grad.tolist() == [8.0, 8.0]
        assert not any(optimizer.gates)
        assert optimizer.skipped == step
        held.grad = other.grad = None  # clearing behind the wrapper's back begins a step too
    optimizer.backward(held.sum(), held.sum())
    assert held.grad.tolist() == [2.0, 2.0]
    assert optimizer.skipped == 2


@pytest.mark.parametrize("capturable", [True, False])
def test_a_skipped_step_stays_so_where_the_task_has_no_gradient(capturable):
    body, heads = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = GatedGradClip(SGD([body, heads], lr=0.1), capturable=capturable)
    for factor in (math.inf, 1.0):
        optimizer.backward(body.sum(), factor * heads.sum())
        assert not any(optimizer.gates)
        assert int(optimizer.skipped) == 1
    assert heads.grad is None or not heads.grad.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@scopes
@pytest.mark.parametrize("capturable", [True, False])
def test_a_callable_gate_sees_no_norm_and_returns_no_factor_that_is_not_finite(
    bad, scope, capturable
):
    seen = []
    param, optimizer = one_parameter(
        gate=lambda _, norm: seen.append(norm.item()) or 0.5, scope=scope, capturable=capturable
    )
    optimizer.backward(param.sum(), bad * param.sum())
    assert seen == [0.0]
    optimizer.gate = lambda *_: bad
    optimizer.zero_grad()
    optimizer.backward(param.sum(), param.sum())
    assert param.grad.tolist() == [1.0, 1.0]
    assert (int(optimizer.skipped), optimizer.gates) == (2, [0.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@gates
def test_a_task_gradient_that_is_not_finite_is_the_users_to_see(bad, gate):
    held, other, optimizer = held_and_other(gate=gate if gate != shrinking else lambda *_: 1.0)
    optimizer.backward(held.sum() + bad * other.sum(), held.sum() + other.sum())
    assert not other.grad.isfinite().any()
    assert held.grad.isfinite().all()
    assert optimizer.skipped == 0


# Precision.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@scopes
@gates
def test_half_precision_parameters_are_gated_by_float32_norms(gate, scope, dtype):
    generator = torch.Generator().manual_seed(0)
    pair = [[torch.randn(300, generator=generator).to(dtype) * s] for s in (50, 500)]
    assert not torch.isfinite(pair[1][0].square().sum().half())  # float16 could not sum it
    (merged,), factors = merge(*pair, gate, scope=scope)
    (wanted,), wanted_factors = merge(*([g.float() for g in gs] for gs in pair), gate, scope=scope)
    assert factors == pytest.approx(wanted_factors, rel=1e-6)
    roundoff = torch.finfo(dtype).eps
    torch.testing.assert_close(merged, wanted.to(dtype), rtol=roundoff, atol=roundoff * 150)


def test_bound_holds_in_half_precision_for_a_very_small_factor():
    task, transfer = ([torch.tensor(row).half()] for row in ([0.01, 0.0], [0.0, 60000.0]))
    (merged,), _ = merge(task, transfer)
    assert merged[1].item() == pytest.approx(0.01, rel=2e-3)


@scopes
@pytest.mark.parametrize("transfer_reaches", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_parameters_of_different_precision_live_in_one_optimizer(scope, other, transfer_reaches):
    params = [torch.zeros(2, dtype=dtype, requires_grad=True) for dtype in (torch.float32, other)]
    optimizer = GatedGradClip(SGD(params, lr=0.1), scope=scope)
    task = [torch.tensor([3.0, 4.0]).to(p) for p in params]
    transfer = [2 * g if n in transfer_reaches else None for n, g in enumerate(task)]
    optimizer.backward(linear(params, task).real, linear(params, transfer).real)
    merged, factors, _ = by_hand([(task, transfer)], "norm", scope=scope, bound=1.0)
    assert optimizer.gates == pytest.approx(factors)
    for p, wanted in zip(params, merged, strict=True):
        torch.testing.assert_close(p.grad, wanted.to(p))


def test_complex_parameters_keep_their_imaginary_part():
    param = torch.zeros(2, dtype=torch.complex64, requires_grad=True)
    optimizer = GatedGradClip(SGD([param], lr=0.1))
    task, transfer = (param * (3 + 4j)).real.sum(), (param * (8 - 6j)).real.sum()
    wanted = [torch.autograd.grad(loss, param, retain_graph=True)[0] for loss in (task, transfer)]
    optimizer.backward(task, transfer)
    torch.testing.assert_close(param.grad, wanted[0] + wanted[1] / 2)


def test_autocast_around_backward_changes_nothing():
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(0)
        layer, x = torch.nn.Linear(5, 6), torch.randn(4, 5)
        optimizer = GatedGradClip(SGD(layer.parameters(), lr=0.1))
        output = layer(x).tanh() @ torch.ones(6, 3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            optimizer.backward(output.square().mean(), output.exp().sum())
        gradients.append([p.grad for p in layer.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


# The graph, checkpoints.


@pytest.mark.parametrize("with_transfer", [True, False])
def test_the_graph_is_freed_and_errors_of_the_backward_pass_come_through(with_transfer):
    param, optimizer = one_parameter()
    losses = [loss.square().sum() for loss in (param, 2 * param)[: 1 + with_transfer]]
    optimizer.backward(*losses)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        optimizer.backward(losses[-1])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_refuses_reentrant_checkpoints_which_would_train_nothing_inside_them(use_reentrant):
    block, head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)
    optimizer = GatedGradClip(SGD([*block.parameters(), *head.parameters()], lr=0.1))
    x = torch.ones(2, 3, requires_grad=True)
    output = head(checkpoint(block, x, use_reentrant=use_reentrant))
    losses = output.sum(), output.exp().sum()  # along each other
    if use_reentrant:
        with pytest.raises(RuntimeError, match="Pass use_reentrant=False"):
            optimizer.backward(*losses)
        assert block.weight.grad is None
    else:
        optimizer.backward(*losses)
        assert block.weight.grad.any()


# What is refused.


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        *[("optimizer", o, TypeError, r"be a torch\.optim\.Optimizer; got ")
          for o in (None, [], SGD)],
        *[("gate", g, ValueError, "be one of 'norm', 'sigmoid' or a callable; got ")
          for g in ("Norm", "tanh", None, 1.0)],
        *[("scope", s, ValueError, "be one of 'parameter', 'global'; got ")
          for s in ("params", None, max)],
        *[("bound", b, ValueError, f"be a finite number > 0; got {b}")
          for b in (0, 0.0, -1.0, math.nan, math.inf)],
        *[("bound", b, TypeError, "be a number; got ") for b in ("1", None, True)],
        ("process_group", "world", TypeError, "be a torch.distributed process group .*'world'"),
        ("capturable", 1, TypeError, "be True or False; got 1"),
    ],
)  # fmt: skip
def test_rejects_arguments(argument, value, error, message):
    arguments = {"optimizer": SGD([torch.zeros(1)], lr=0.1), argument: value}
    with pytest.raises(error, match=f"`{argument}` must {message}"):
        GatedGradClip(**arguments)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("gate", "tanh", "`gate` must be one of 'norm', 'sigmoid'"),
        ("scope", "globl", "`scope` must be one of 'parameter', 'global'; got 'globl'"),
        *[("bound", b, "`bound` must be a finite number ≥ 0") for b in (math.nan, math.inf, -1.0)],
        ("gate", lambda *_: None, "`gate` must return a single number; it returned None"),
        ("gate", lambda *_: "1", "`gate` must return a single number; it returned '1'"),
        ("gate", lambda *_: torch.ones(2), r"must return a single number; it returned tensor\(\[1"),
    ],
)
def test_rejects_settings_made_later_and_gates_that_return_no_number(setting, value, message):
    param, optimizer = one_parameter()
    setattr(optimizer, setting, value)
    with pytest.raises(ValueError, match=message):
        optimizer.backward(param.sum(), param.sum())


def other_leaf(_param):
    return torch.zeros((), requires_grad=True)


@pytest.mark.parametrize("which", ["task_loss", "transfer_loss"])
@pytest.mark.parametrize(
    ("error", "bad", "message"),
    [
        (TypeError, lambda _p: 1.0, r"must be a tensor; got float"),
        (TypeError, lambda _p: [1.0], r"must be a tensor; got list"),
        (ValueError, lambda p: p * 2, r"must be a scalar; got shape \(2,\)"),
        (ValueError, lambda p: p.detach().sum(), r"must depend on the optimizer's parameters"),
        (ValueError, lambda p: other_leaf(p) * 2, r"none of the 1 gets a gradient"),
        (ValueError, other_leaf, r"none of the 1 gets a gradient"),
    ],
    ids=["float", "list", "vector", "detached", "other parameters", "another leaf"],
)
def test_rejects_losses_that_can_not_train_the_parameters(which, error, bad, message):
    param, optimizer = one_parameter()
    losses = {"task_loss": param.sum(), "transfer_loss": param.square().sum(), which: bad(param)}
    with pytest.raises(error, match=rf"`{which}` .*{message}"):
        optimizer.backward(**losses)
    assert param.grad is None


def test_the_task_loss_is_required_and_may_have_one_element():
    param, optimizer = one_parameter()
    with pytest.raises(TypeError, match="`task_loss` must be a tensor; got NoneType"):
        optimizer.backward(None, param.sum())
    optimizer.backward(param.sum(dim=0, keepdim=True), param.sum())
    assert torch.equal(param.grad, torch.full((2,), 2.0))


@scopes
def test_a_leaf_outside_that_nobody_clears_is_gated_by_each_step_alone(scope):
    task, transfer = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 50.0])
    held, cleared, never = (torch.zeros(2, requires_grad=True) for _ in range(3))
    total, found = torch.zeros(2), []
    optimizer = GatedGradClip(SGD([held], lr=1.0), scope=scope)
    for factor in (1.0, math.inf, 1.0, 2.0):
        optimizer.zero_grad()
        cleared.grad = None
        for _ in range(2):  # two calls accumulate
            leaves = [held, cleared, never]
            optimizer.backward(linear(leaves, [task] * 3), linear(leaves, [factor * transfer] * 3))
        total += cleared.grad
        torch.testing.assert_close(never.grad, total)
        found.append(optimizer.gates)
    for got, want in zip(found, [0.1, 0, 0.1, 0.05], strict=True):
        assert got == pytest.approx([want] * (1 if scope == "global" else 3))
    assert optimizer.skipped == 1


@pytest.mark.parametrize("held", [True, False])
def test_rejects_sparse_gradients_in_the_optimizer_and_outside(held):
    words, body = torch.nn.Embedding(5, 2, sparse=True), torch.nn.Linear(2, 1)
    params = [*body.parameters(), *(words.parameters() if held else ())]
    optimizer = GatedGradClip(SGD(params, lr=0.1))
    output = body(words(torch.tensor([0, 3])))
    with pytest.raises(
        ValueError, match=r"`task_loss` must give dense .* shape \(5, 2\) .* sparse=F"
    ):
        optimizer.backward(output.sum(), output.square().sum())


def test_rejects_an_optimizer_without_anything_to_train():
    optimizer = GatedGradClip(SGD([torch.zeros(1)], lr=0.1), capturable=True)
    with pytest.raises(
        ValueError, match=r"`optimizer` must hold a parameter that requires .* its 1"
    ):
        optimizer.backward(torch.zeros(()), torch.zeros(()))


@pytest.mark.parametrize("processes", [1, 4])
def test_several_processes_need_a_process_group(monkeypatch, processes):
    param, optimizer = one_parameter()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    if processes > 1:
        with pytest.raises(RuntimeError, match="`process_group` must be given among 4 processes"):
            optimizer.backward(param.sum(), param.sum())
        assert param.grad is None
    else:
        optimizer.backward(param.sum(), param.sum())
        assert torch.equal(param.grad, torch.full((2,), 2.0))


# Compiled students.


def merged_gradients(net, forward, rows):
    optimizer = GatedGradClip(SGD(net.parameters(), lr=0.1))
    optimizer.zero_grad()
    output = forward(torch.ones(rows, 4))
    optimizer.backward(output.square().mean(), output.sin().sum())
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.skipif(
    not hasattr(functorch_config, "donated_buffer"), reason="this torch donates no buffers"
)
@pytest.mark.parametrize("rows", [3, 5], ids=["the same batch size", "another one"])
@pytest.mark.parametrize("donated", [True, False])
def test_donated_buffers_are_named_with_the_setting_that_keeps_them(rows, donated):
    torch._dynamo.reset()
    with functorch_config.patch(donated_buffer=donated):
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        compiled = torch.compile(net, backend="aot_eager")
        compiled(torch.ones(3, 4)).sum().backward()  # the first backward decides
        net.zero_grad()
        if donated:
            message = r"`torch._functorch.config.donated_buffer = False`"
            with pytest.raises(RuntimeError, match=message) as caught:
                merged_gradients(net, compiled, rows)
            assert "donated buffer" in str(caught.value.__cause__)
        else:
            got = merged_gradients(net, compiled, rows)
            torch.testing.assert_close(got, merged_gradients(net, net, rows))
    torch._dynamo.reset()


INDUCTOR = """
import sys, torch, torch._functorch.config
from torch import nn
from graph_kd import GatedGradClip

if sys.argv[1] == "two" and hasattr(torch._functorch.config, "donated_buffer"):  # not in torch 2.4
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
    for backwards, extra in (("one", {}), ("two", safe)):
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", INDUCTOR, backwards],
            check=True,
            env={**environment, **extra},
        )


def test_a_gate_that_returns_a_tensor_with_gradient_leaves_none_in_the_gradients():
    weight = torch.ones((), requires_grad=True)
    (merged,), _ = merge([torch.ones(2)], [torch.ones(2)], lambda *_: weight * 0.5)
    assert not merged.requires_grad
    torch.testing.assert_close(merged, torch.full((2,), 1.5))
