"""What `GatedGradClip.backward` leaves in ``p.grad``.

The first part shows the rules one by one, on a few numbers. Then come all of them at once, on drawn
gradients; the authors' own numbers; and the edges: precision, graphs, refusals, compiled students.

Most losses here are linear, Σ p · g: their gradients are the ones the test chose.
"""

import math
import os
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
import torch._functorch.config as functorch_config
from golden_case import load
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from graph_kd import GatedGradClip


def shrinking(task, transfer):
    """Return the factor of a gate of the user's, from floats or tensors."""
    return task / (task + 2 * transfer + 1)


gates = pytest.mark.parametrize("gate", ["norm", "sigmoid", shrinking])
scopes = pytest.mark.parametrize("scope", ["parameter", "global"])
capturables = pytest.mark.parametrize("capturable", [True, False])
not_finite = pytest.mark.parametrize("bad", [math.nan, math.inf])


def wrapped(*sizes, held=None, **settings):
    """Return leaves of ones and an optimizer: it holds the first ``held`` of them, or all."""
    leaves = [torch.ones(n, requires_grad=True) for n in sizes]
    return *leaves, GatedGradClip(SGD(leaves[:held], lr=1.0), **settings)


def linear(params, gradients):
    """Return a loss of the given gradients. None leaves a parameter out; only None, the loss."""
    pairs = zip(params, gradients, strict=True)
    terms = [(p * g.conj()).real.sum() for p, g in pairs if g is not None]
    return sum(terms) if terms else None


def backward(optimizer, params, task, transfer):
    """Call `backward` with losses of the given gradients."""
    optimizer.backward(linear(params, task), linear(params, transfer))


def merge(task, transfer, gate="norm", **settings):
    """Return the merged gradients and the gates of one call on new parameters."""
    params = [torch.zeros_like(g).requires_grad_() for g in task]
    optimizer = GatedGradClip(SGD(params, lr=1.0), gate, **settings)
    backward(optimizer, params, task, transfer)
    return [p.grad for p in params], optimizer.gates


def tensors(*rows):
    return [row if row is None else torch.tensor(row) for row in rows]


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


def test_by_default_each_parameter_is_gated_on_its_own():
    """One that only the transfer loss reaches (a head) is bounded by all task gradients."""
    *params, optimizer = wrapped(1, 1, 1, 1)
    backward(
        optimizer, params, tensors([3.0], None, [4.0], None), tensors(None, [10.0], [16.0], None)
    )
    assert [p.grad for p in params] == tensors([3.0], [5.0], [8.0], None)
    assert optimizer.gates == [0.5, 0.25]  # 5 / 10 and 4 / 16


def test_bound_is_in_norms_of_the_task_and_may_be_set_at_any_time():
    param, optimizer = wrapped(2, bound=3)
    for bound in (3.0, 0.5, 0.0):
        optimizer.bound = bound
        optimizer.zero_grad()
        backward(optimizer, [param], tensors([2.0, 0.0]), tensors([0.0, 16.0]))
        assert param.grad.tolist() == [2.0, 2.0 * bound]
        assert optimizer.gates == [bound / 8]


@pytest.mark.parametrize(
    ("ratio", "factor"), [(0.0, 0.7311), (0.5, 0.7311), (1.5, 0.8176), (5, 0.9933)]
)
def test_sigmoid_gate_never_falls_below_0_731_and_has_no_bound(ratio, factor):
    (gradient,), factors = merge(tensors([ratio, 0.0]), tensors([0.0, 1.0]), "sigmoid", bound=0.01)
    assert factors == pytest.approx([factor], rel=1e-4)
    assert gradient.tolist() == pytest.approx([ratio, factor], rel=1e-4)


@pytest.mark.parametrize(
    "kind", [float, torch.tensor, lambda factor: torch.tensor([[factor]], requires_grad=True)]
)
@pytest.mark.parametrize(
    ("scope", "norms"), [("parameter", [(5.0, 2.0), (12.0, 1.5)]), ("global", [(13.0, 2.5)])]
)
def test_a_callable_gate_receives_the_two_norms_and_returns_the_factor(scope, norms, kind):
    seen = []

    def gate(*both):
        assert all(norm.shape == () for norm in both)
        seen.append(tuple(norm.item() for norm in both))
        return kind(0.25 * len(seen))

    task, transfer = tensors([3.0, 4.0], [12.0]), tensors([0.0, 2.0], [1.5])
    gradients, factors = merge(task, transfer, gate, scope=scope)
    assert seen == norms
    assert factors == [0.25, 0.5][: len(norms)]
    assert gradients[0].tolist() == [3.0, 4.5]
    assert gradients[1].tolist() == [12.0 + 1.5 * factors[-1]]
    assert not any(g.requires_grad for g in gradients)


def test_gates_are_the_factors_last_applied_and_a_task_loss_alone_has_none():
    param, optimizer = wrapped(2)
    assert optimizer.gates == []
    optimizer.backward(param.sum(), 4 * param.sum())
    assert optimizer.gates == [0.25]
    assert type(optimizer.gates[0]) is float
    optimizer.zero_grad()
    assert optimizer.gates == [0.25]  # still there for logging
    optimizer.backward(param.square().sum())
    assert param.grad.tolist() == [2.0, 2.0]  # the plain step
    assert (optimizer.gates, optimizer.skipped) == ([], 0)


def test_weight_decay_takes_no_part_in_the_norms():
    param = torch.full((2,), 100.0, requires_grad=True)
    optimizer = GatedGradClip(SGD([param], lr=1.0, weight_decay=0.1))
    optimizer.backward(param[0], 8 * param[1])
    optimizer.step()
    assert param.tolist() == [89.0, 89.0]


# Gradients that are not finite.


@capturables
@pytest.mark.parametrize("both", [True, False])
def test_one_transfer_gradient_that_is_not_finite_skips_those_of_the_whole_step(both, capturable):
    body, head, optimizer = wrapped(2, 1, capturable=capturable)
    for step in (1, 2):
        optimizer.zero_grad()
        # Finite again, or the task alone: too late for this step.
        for factor in (1.0, math.nan, None, math.inf, 1.0):
            transfer = body.sum() + head.sum() if both else head.sum()
            optimizer.backward(body.sum(), None if factor is None else factor * transfer)
        assert body.grad.tolist() == [5.0, 5.0]
        assert head.grad is None or not head.grad.any()
        assert not any(optimizer.gates)
        assert int(optimizer.skipped) == step
        body.grad = head.grad = None  # clearing behind the wrapper's back begins a step too
    optimizer.backward(body.sum(), body.sum())
    assert body.grad.tolist() == [2.0, 2.0]
    assert int(optimizer.skipped) == 2


@not_finite
@pytest.mark.parametrize("gate", ["norm", "sigmoid", lambda *_: 1.0])
def test_a_task_gradient_that_is_not_finite_is_the_users_to_see(bad, gate):
    held, other, optimizer = wrapped(2, 1, held=1, gate=gate)
    optimizer.backward(held.sum() + bad * other.sum(), held.sum() + other.sum())
    assert not other.grad.isfinite().any()
    assert held.grad.isfinite().all()
    assert optimizer.skipped == 0


@not_finite
@scopes
@capturables
def test_a_callable_gate_sees_finite_norms_and_must_be_finite(bad, scope, capturable):
    seen = []
    param, optimizer = wrapped(2, scope=scope, capturable=capturable)
    optimizer.gate = lambda _, norm: seen.append(norm.item()) or 0.5
    optimizer.backward(param.sum(), bad * param.sum())
    assert seen == [0.0]
    optimizer.gate = lambda *_: bad
    optimizer.zero_grad()
    optimizer.backward(param.sum(), param.sum())
    assert param.grad.tolist() == [1.0, 1.0]
    assert (int(optimizer.skipped), optimizer.gates) == (2, [0.0])


# Leaves that the optimizer does not hold.


@scopes
def test_a_leaf_outside_that_nobody_clears_is_gated_by_each_step_alone(scope):
    *leaves, optimizer = wrapped(2, 2, 2, held=1, scope=scope)
    held, cleared, never = leaves
    task, transfer = tensors([3.0, 4.0], [0.0, 50.0])
    total = torch.zeros(2)
    for factor, gate in ((1.0, 0.1), (math.inf, 0.0), (1.0, 0.1), (2.0, 0.05)):
        optimizer.zero_grad()
        cleared.grad = None
        for _ in range(2):  # two calls accumulate
            backward(optimizer, leaves, [task] * 3, [factor * transfer] * 3)
        total += cleared.grad
        torch.testing.assert_close(cleared.grad, held.grad)
        torch.testing.assert_close(never.grad, total)  # as `.backward()` would accumulate
        assert optimizer.gates == pytest.approx([gate] * (1 if scope == "global" else 3))
    assert optimizer.skipped == 1


@scopes
def test_a_leaf_of_an_earlier_step_takes_no_part_in_a_later_one(scope):
    held, other, optimizer = wrapped(2, 1, held=1, scope=scope)
    optimizer.backward(held[0] + 100 * other.sum(), held[0] + other.sum())
    optimizer.zero_grad()
    optimizer.backward(held[0], 4 * held[0])
    assert optimizer.gates == [0.25]
    assert other.grad.item() == 101.0


def test_inputs_that_require_gradient_get_it_and_are_not_kept():
    param, optimizer = wrapped(2)
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    optimizer.backward((param * x).sum(), (param * x).sum())
    assert x.grad.tolist() == [2.0, 2.0]
    gone = weakref.ref(x)
    del x
    assert gone() is None


def test_leaves_frozen_after_the_forward_pass_get_no_gradient():
    held, other, optimizer = wrapped(2, 1, held=1)
    losses = [held.sum() + other.sum() for _ in range(4)]
    optimizer.backward(*losses[:2])
    other.grad = None
    other.requires_grad_(False)
    optimizer.backward(*losses[2:])
    assert other.grad is None
    assert held.grad.tolist() == [4.0, 4.0]


def test_leaves_of_deep_and_branching_graphs_get_their_gradient():
    held, other, optimizer = wrapped(2, 1, held=1)
    x = held.sum()
    for _ in range(5000):  # deeper than Python's recursion limit, with 2**5000 paths
        x = (x + other.sum() * x) / 2
    optimizer.backward(x, x * 1.0)
    assert other.grad.item() == pytest.approx(2 * 5000)  # of each loss 2 · 5000 / 2


# Everything at once: any gradients, any number of calls, beside the equations written out.


def total(gradients):
    given = [g for g in gradients if g is not None]
    return sum(given) if given else None


def norm(gradients):
    return torch.cat([g.flatten().abs().double() for g in gradients if g is not None]).norm()


def factor_of(gate, task_norm, transfer_norm, bound):
    if callable(gate):
        return gate(task_norm, transfer_norm).item()
    ratio = (task_norm / transfer_norm).item()  # NaN of two zeros: `min` and `max` return the 1.0
    return min(1.0, bound * ratio) if gate == "norm" else 1 / (1 + math.exp(-max(1.0, ratio)))


def by_hand(calls, gate="norm", scope="parameter", bound=1.0):
    """Return merged gradients, factors and whether the step is skipped, from the equations."""
    task, transfer = (
        [total(gs) for gs in zip(*lists, strict=True)] for lists in zip(*calls, strict=True)
    )
    skipped = not all(d is None or d.isfinite().all() for d in transfer)
    factors, merged = [], []
    for g, d in zip(task, transfer, strict=True):
        gated = None
        if d is not None and not skipped:
            task_norm = norm(task if g is None or scope == "global" else [g])
            transfer_norm = norm(transfer if scope == "global" else [d])
            factors.append(factor_of(gate, task_norm, transfer_norm, bound))
            gated = factors[-1] * d
        merged.append(total([g, gated]))
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
        calls.append((task, transfer if draw(st.integers(0, 3)) else [None] * len(SHAPES)))
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
        for call in calls:
            backward(optimizer, params, *call)
        merged, factors, skipped = by_hand(calls, gate, scope, bound)
        skips += skipped
        assert int(optimizer.skipped) == skips
        if skipped:
            assert not any(optimizer.gates)
        else:
            reached = sum(any(t[n] is not None for _, t in calls) for n in range(held))
            assert optimizer.gates[:reached] == pytest.approx(factors[:reached], rel=1e-9)
            # Leaves outside come in the order of the graph.
            assert sorted(optimizer.gates) == pytest.approx(sorted(factors), rel=1e-9)
        for p, wanted in zip(params, merged, strict=True):
            if wanted is None:
                assert p.grad is None or not p.grad.any()
                assert p.grad is None or capturable or not set_to_none
            else:
                torch.testing.assert_close(p.grad, wanted, rtol=1e-9, atol=1e-14)


# The authors' program and the poster, number by number.

golden_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def golden_gradients(dtype):
    case = load("clip_case", dtype)
    return case, *([case[f"{kind}{v}"] for v in range(5)] for kind in ("gc", "gd"))


def assert_golden(got, wanted):
    assert (got - wanted).norm() < 1e-4 * wanted.norm()


@golden_types
@pytest.mark.parametrize("epoch", ["0", "1", "5", "40", "_minus1"])
def test_norm_gate_is_the_programs(epoch, dtype):
    """Its factor sigmoid(epoch) is our bound. Weight decay, gw, stays with the optimizer."""
    case, task, transfer = golden_gradients(dtype)
    gradients, factors = merge(task, transfer, bound=case[f"epoch{epoch}.sigmoid"].item())
    for v in range(5):
        assert_golden(factors[v] * transfer[v], case[f"epoch{epoch}.clipped_gd{v}"])
        assert_golden(gradients[v] + case[f"gw{v}"], case[f"epoch{epoch}.total{v}"])


@golden_types
@pytest.mark.parametrize(("scope", "form"), [("global", "all"), ("parameter", "each")])
def test_sigmoid_gate_is_the_posters(scope, form, dtype):
    case, task, transfer = golden_gradients(dtype)
    gradients, factors = merge(task, transfer, "sigmoid", scope=scope)
    taus = [f"poster.each.tau{v}" for v in range(5)] if form == "each" else ["poster.all.tau"]
    assert factors == pytest.approx([case[tau].sigmoid().item() for tau in taus], rel=1e-4)
    for v in range(5):
        assert_golden(gradients[v], task[v] + case[f"poster.{form}.gd{v}"])


# What else stands in `p.grad`.


def replace(param):
    """Put another gradient there that was changed in place as often."""
    version, param.grad = param.grad._version, torch.tensor([0.5, 0.25])
    while param.grad._version < version:
        param.grad.add_(0)


CHANGES = {
    "nothing": lambda _param: None,
    "set to none": lambda param: setattr(param, "grad", None),
    "zeroed": lambda param: param.grad.zero_(),
    "added to": lambda param: (param * torch.tensor([0.5, 0.25])).sum().backward(),
    "replaced": replace,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("by_wrapper", [True, False])
def test_what_was_not_left_there_untouched_is_task_gradient(change, by_wrapper):
    param, optimizer = wrapped(2)
    first = tensors([1.0, 0.0]), tensors([0.0, 3.0])
    second = tensors([0.0, 2.0]), tensors([8.0, 0.0])
    if by_wrapper:
        backward(optimizer, [param], *first)
    else:
        linear([param], first[0]).backward()
    stood, values = param.grad, param.grad.clone()
    CHANGES[change](param)
    if change != "nothing" or not by_wrapper:
        first = [total([param.grad])], [None]
    backward(optimizer, [param], *second)
    merged, factors, _ = by_hand([first, second])
    torch.testing.assert_close(param.grad, merged[0])
    assert optimizer.gates == pytest.approx(factors)
    if change == "nothing":  # what the user may still hold is not written to
        param.grad.zero_()
        assert torch.equal(stood, values)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_gradient_cleared_to_zero_is_no_task_gradient_and_one_that_stood_there_is(set_to_none):
    body, head, optimizer = wrapped(2, 1)
    for task, gate in (
        (3 * body[0], 0.5),  # twice: the second time after clearing
        (3 * body[0], 0.5),
        (3 * body[0] + 0 * head.sum(), 0.0),
    ):
        optimizer.zero_grad(set_to_none)
        optimizer.backward(task, 6 * head.sum())
        assert optimizer.gates == [gate]
        assert head.grad.item() == 6.0 * gate
    optimizer.backward(3 * body[0], 6 * head.sum())
    assert optimizer.gates == [0.0]  # the task has reached it in this step
    head.grad = torch.tensor([1.5])
    optimizer.backward(3 * body[0], 6 * head.sum())
    assert optimizer.gates == [0.25]  # by its own norm, not by that of all task gradients


SHARED = {
    "task": lambda a, b, c: ((a + b).square().sum() + c.sum(), (c * 3).sum()),
    "transfer": lambda a, b, c: (c.sum(), (a + b).sum()),
    "both": lambda a, b, c: ((a + b + c).sum(), (a + b + c).square().sum()),
    "skipped": lambda a, b, c: ((a + b + c).square().sum(), (a + b + c).sum() * math.nan),
}


@pytest.mark.parametrize("losses", SHARED.values(), ids=SHARED.keys())
def test_parameters_that_share_a_gradient_get_memory_of_their_own(losses):
    a, b, c, optimizer = wrapped(3, 3, 3)
    optimizer.backward(*losses(a, b, c))
    before = b.grad.clone()
    a.grad[0] = 100.0  # one entry, not all: autograd's own sum is one number, expanded
    assert a.grad.tolist()[1:] == before.tolist()[1:]
    assert torch.equal(b.grad, before)


# Precision.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(50, 500), (0.01, 5000)], ids=["usual", "a tiny factor"])
@scopes
@gates
def test_half_precision_parameters_are_gated_in_float32(gate, scope, sizes, dtype):
    generator = torch.Generator().manual_seed(0)
    call = [[torch.randn(300, generator=generator).to(dtype) * size] for size in sizes]
    assert not call[1][0].square().sum().half().isfinite()  # float16 could not sum it
    gradients, factors = merge(*call, gate, scope=scope)
    wanted, wanted_factors, _ = by_hand([[[g.float()] for (g,) in call]], gate, scope)
    assert factors == pytest.approx(wanted_factors, rel=1e-6)
    tolerance = torch.finfo(dtype).eps * torch.tensor([1, 3 * sizes[0]])
    rtol, atol = tolerance.tolist()
    torch.testing.assert_close(gradients[0], wanted[0].to(dtype), rtol=rtol, atol=atol)


@scopes
@pytest.mark.parametrize("transfer_reaches", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_parameters_of_different_types_live_in_one_optimizer(scope, other, transfer_reaches):
    task = tensors([3.0, 4.0], [6.0, 8.0j] if other.is_complex else [6.0, 8.0])
    task = [g.to(dtype) for g, dtype in zip(task, (torch.float32, other), strict=True)]
    transfer = [2 * g if n in transfer_reaches else None for n, g in enumerate(task)]
    gradients, factors = merge(task, transfer, scope=scope)
    merged, wanted_factors, _ = by_hand([(task, transfer)], scope=scope)
    assert factors == pytest.approx(wanted_factors)
    for got, g, wanted in zip(gradients, task, merged, strict=True):
        torch.testing.assert_close(got, wanted.to(g))


def test_autocast_around_backward_changes_nothing():
    layer, x = torch.nn.Linear(5, 6), torch.randn(4, 5)
    loss = (layer(x).tanh() @ torch.ones(6, 3)).square().mean()
    (wanted,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
    optimizer = GatedGradClip(SGD(layer.parameters(), lr=0.1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.backward(loss, loss * 1.0)
    assert torch.equal(layer.weight.grad, 2 * wanted)


# The graph, checkpoints.


@pytest.mark.parametrize("with_transfer", [True, False])
def test_the_graph_is_freed_and_errors_of_the_backward_pass_come_through(with_transfer):
    param, optimizer = wrapped(2)
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
        ("optimizer", GatedGradClip(SGD([torch.zeros(1)], lr=0.1)), TypeError,
         "be a plain optimizer; got a GatedGradClip"),
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
        *[
            ("gate", lambda *_, v=v: v, "`gate` must return a single number; .* Return a float or ")
            for v in (None, "1", torch.ones(2))
        ],
    ],
)
def test_rejects_settings_made_later_and_gates_that_return_no_number(setting, value, message):
    param, optimizer = wrapped(2)
    setattr(optimizer, setting, value)
    with pytest.raises(ValueError, match=message):
        optimizer.backward(param.sum(), param.sum())


@pytest.mark.parametrize("which", ["task_loss", "transfer_loss"])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda *_: 1.0, TypeError, "must be a tensor; got float"),
        (lambda param, _: param * 2, ValueError, r"must be a scalar; got shape \(2,\)"),
        (lambda param, _: param.detach().sum(), ValueError, "must depend on .* `no_grad` and"),
        (lambda _, other: other, ValueError, "must depend on .* none of the 1 gets a gradient"),
        (lambda _, other: other * 2, ValueError, "must depend on .* none of the 1 gets a gradient"),
    ],
)
def test_rejects_losses_that_can_not_train_the_parameters(which, bad, error, message):
    param, optimizer = wrapped(2)
    losses = {"task_loss": param.sum(), "transfer_loss": param.square().sum()}
    losses[which] = bad(param, torch.zeros((), requires_grad=True))
    with pytest.raises(error, match=f"`{which}` {message}"):
        optimizer.backward(**losses)
    assert param.grad is None


def test_the_task_loss_is_required_and_may_have_one_element():
    param, optimizer = wrapped(2)
    with pytest.raises(TypeError, match="`task_loss` must be a tensor; got NoneType"):
        optimizer.backward(None, param.sum())
    optimizer.backward(param.sum(dim=0, keepdim=True), param.sum())
    assert param.grad.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("held", [True, False])
def test_rejects_sparse_gradients_in_the_optimizer_and_outside(held):
    words, body = torch.nn.Embedding(5, 2, sparse=True), torch.nn.Linear(2, 1)
    params = [*body.parameters(), *(words.parameters() if held else ())]
    optimizer = GatedGradClip(SGD(params, lr=0.1))
    output = body(words(torch.tensor([0, 3])))
    message = r"`task_loss` must give dense .* shape \(5, 2\) .* sparse=F"
    with pytest.raises(ValueError, match=message):
        optimizer.backward(output.sum(), output.square().sum())


def test_rejects_an_optimizer_without_anything_to_train():
    optimizer = GatedGradClip(SGD([torch.zeros(1)], lr=0.1), capturable=True)
    message = "`optimizer` must hold a parameter that requires .* its 1 .*, not frozen ones"
    with pytest.raises(ValueError, match=message):
        optimizer.backward(torch.zeros(()), torch.zeros(()))


def test_several_processes_need_a_process_group(monkeypatch):
    param, optimizer = wrapped(2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(RuntimeError, match=r"`process_group` must be given among 4 .*\. Pass"):
        optimizer.backward(param.sum(), param.sum())
    assert param.grad is None
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    optimizer.backward(param.sum(), param.sum())


# Compiled students.


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.skipif(
    not hasattr(functorch_config, "donated_buffer"), reason="this torch donates no buffers"
)
@pytest.mark.parametrize("rows", [3, 5], ids=["the same batch size", "another one"])
def test_donated_buffers_are_named_with_the_setting_that_keeps_them(rows):
    torch._dynamo.reset()
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    optimizer = GatedGradClip(SGD(net.parameters(), lr=0.1))
    with functorch_config.patch(donated_buffer=True):
        compiled = torch.compile(net, backend="aot_eager")
        compiled(torch.ones(3, 4)).sum().backward()  # the first backward decides
        output = compiled(torch.ones(rows, 4))
        message = r"`torch._functorch.config.donated_buffer = False`"
        with pytest.raises(RuntimeError, match=message) as caught:
            optimizer.backward(output.square().mean(), output.sin().sum())
    assert "donated buffer" in str(caught.value.__cause__)
    torch._dynamo.reset()


INDUCTOR = """
import sys, torch, torch._functorch.config
from torch import nn
from graph_kd import GatedGradClip

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
optimizer = GatedGradClip(torch.optim.SGD(net.parameters(), lr=0.1), lambda *_: 1.0)
x = torch.randn(4, 2, 6, 6)

def gradients(forward):
    optimizer.zero_grad()
    output = forward(x)
    optimizer.backward(output.square().mean(), output.sin().sum())
    return [p.grad for p in net.parameters()]

if sys.argv[1] == "fill the cache":
    torch.compile(net)(x).square().mean().backward()
else:
    if hasattr(torch._functorch.config, "donated_buffer"):  # not in torch 2.4
        torch._functorch.config.donated_buffer = False
    torch.testing.assert_close(gradients(torch.compile(net)), gradients(net), rtol=1e-3, atol=1e-4)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_both_gradients_as_documented(tmp_path):
    """A cache filled by a run with donated buffers must not serve the next, without them."""
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    safe = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    for run, extra in (("fill the cache", {}), ("compare", safe)):
        command = [sys.executable, "-W", "ignore", "-c", INDUCTOR, run]
        subprocess.run(command, check=True, env={**environment, **extra})
