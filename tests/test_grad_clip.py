"""What `GatedGradClip.backward` leaves in ``p.grad``.

The first part shows the rules one by one, on a few numbers: most losses are linear, and their
gradients are the factors in them. Then come all rules at once, on drawn gradients; the authors' own
numbers; and the edges: memory and precision, graphs, refusals.
"""

import copy
import math
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import reference
import torch
import torch.nn.functional as F
from golden_case import load
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from graph_kd import GatedGradClip


def shrinking(task, transfer):
    """Return the factor of a gate of the user's, from scalar tensors."""
    return task / (task + 2 * transfer + 1)


gates = pytest.mark.parametrize("gate", ["norm", "sigmoid", shrinking])
scopes = pytest.mark.parametrize("scope", ["parameter", "global"])
capturables = pytest.mark.parametrize("capturable", [True, False])
not_finite = pytest.mark.parametrize("bad", [math.nan, math.inf])


def wrap(params, **settings):
    """Return an optimizer with weight decay, which takes no part in any gradient or norm."""
    return GatedGradClip(SGD(params, lr=1.0, weight_decay=0.1), **settings)


def wrapped(*shapes, held=None, **settings):
    """Return leaves of ones and an optimizer: it holds the first ``held`` of them, or all."""
    leaves = [torch.ones(shape, requires_grad=True) for shape in shapes]
    return *leaves, wrap(leaves[:held], **settings)


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
    param, optimizer = wrapped(2, scope=scope)
    optimizer.backward(param @ torch.tensor(task), param @ torch.tensor(transfer))
    assert param.grad.tolist() == merged


def test_by_default_each_parameter_is_gated_on_its_own():
    """One that only the transfer loss reaches (a head) is bounded by all task gradients."""
    task, head, both, neither, optimizer = wrapped(1, 1, 1, 1)
    optimizer.backward(3 * task + 4 * both, 10 * head + 16 * both)
    assert [task.grad, head.grad, both.grad, neither.grad] == [3.0, 5.0, 8.0, None]
    assert optimizer.gates == [0.5, 0.25]  # 5 / 10 and 4 / 16


def test_bound_is_in_norms_of_the_task_and_may_be_set_at_any_time():
    param, optimizer = wrapped(1, bound=3)
    for bound in (3.0, 0.5, 0.0):
        optimizer.bound = bound
        optimizer.zero_grad()
        optimizer.backward(2 * param, 16 * param)
        assert (optimizer.gates, param.grad.item()) == ([bound / 8], 2.0 + 2.0 * bound)


@pytest.mark.parametrize(
    ("ratio", "factor"), [(0.0, 0.7311), (0.5, 0.7311), (1.5, 0.8176), (5, 0.9933)]
)
def test_sigmoid_gate_never_falls_below_0_731_and_has_no_bound(ratio, factor):
    param, optimizer = wrapped(1, gate="sigmoid", bound=0.01)
    optimizer.backward(ratio * param, 1 * param)
    assert optimizer.gates == pytest.approx([factor], rel=1e-4)
    assert param.grad.item() == pytest.approx(ratio + factor, rel=1e-4)


@pytest.mark.parametrize(
    "kind", [float, torch.tensor, lambda factor: torch.tensor([[factor]], requires_grad=True)]
)
@pytest.mark.parametrize(
    ("scope", "factors"),
    [("parameter", {(5.0, 2.0): 0.25, (12.0, 1.5): 0.5}), ("global", {(13.0, 2.5): 0.75})],
)
def test_a_callable_gate_receives_the_two_norms_and_returns_the_factor(scope, factors, kind):
    a, b, optimizer = wrapped(2, 1, scope=scope)
    optimizer.gate = lambda task, transfer: kind(factors[task.tolist(), transfer.tolist()])
    optimizer.backward(a @ torch.tensor([3.0, 4.0]) + 12 * b, 2 * a[1] + 1.5 * b)
    assert optimizer.gates == list(factors.values())
    assert b.grad.item() == 12 + 1.5 * optimizer.gates[-1]
    assert not b.grad.requires_grad


def test_calls_since_zero_grad_add_up_and_the_gate_sees_the_sums():
    param, optimizer = wrapped(1)
    assert optimizer.gates == []
    optimizer.backward(2 * param, 4 * param)
    assert (optimizer.gates, param.grad.item()) == ([0.5], 4.0)
    first = param.grad
    optimizer.backward(1 * param, 8 * param)  # the sums are 3 and 12
    assert (optimizer.gates, param.grad.item()) == ([0.25], 6.0)
    assert first.item() == 4.0  # what the user may still hold is not written to
    optimizer.zero_grad()
    assert optimizer.gates == [0.25]  # still there for logging
    assert type(optimizer.gates[0]) is float
    optimizer.backward(2 * param)  # the task alone: the plain step
    assert (optimizer.gates, param.grad.item()) == ([], 2.0)


@pytest.mark.parametrize("by_wrapper", [True, False])
@pytest.mark.parametrize("replaced", [True, False])
def test_what_anything_else_left_or_changed_is_task_gradient(by_wrapper, replaced):
    body, head, optimizer = wrapped(1, 1)
    if by_wrapper:
        optimizer.backward(3 * body, 1 * head)
    else:
        head.backward()
    if replaced:
        head.grad = torch.tensor([4.0])
    else:
        (3 * head).backward()
    optimizer.backward(3 * body, 16 * head)
    assert optimizer.gates == [0.25]  # 4 / 16: the norm of all task gradients is not asked for
    assert head.grad.item() == 8.0


def test_a_task_gradient_of_another_counts_however_small():
    body, head, optimizer = wrapped(1, 1)
    head.grad = torch.tensor([1e-20])
    optimizer.backward(3 * body, 1 * head)
    # By its own norm, not by that of all task gradients.
    assert optimizer.gates == pytest.approx([1e-20], rel=1e-6, abs=0.0)


# Gradients that are not finite.


@capturables
@pytest.mark.parametrize("both", [True, False])
def test_a_transfer_gradient_that_is_not_finite_skips_those_of_the_whole_step(both, capturable):
    body, head, optimizer = wrapped(1, 1, capturable=capturable)
    for step in (1, 2):
        # Finite again, or the task alone: too late for this step.
        for factor in (1.0, math.nan, None, math.inf, 1.0):
            transfer = None if factor is None else factor * head + (body if both else 0)
            optimizer.backward(1 * body, transfer)
        assert body.grad.item() == 5.0
        assert not head.grad
        assert not any(optimizer.gates)
        assert int(optimizer.skipped) == step
        body.grad = head.grad = None  # clearing behind the wrapper's back begins a step too
    optimizer.backward(1 * body, 1 * body)
    assert (body.grad.item(), int(optimizer.skipped)) == (2.0, 2)


def test_a_capturable_step_is_skipped_once_though_the_task_gradient_was_replaced():
    body, head, optimizer = wrapped(1, 1, capturable=True)
    optimizer.backward(1 * body, math.inf * head)
    body.grad = body.grad.clone()
    optimizer.backward(1 * body, 1 * head)
    assert (body.grad.item(), head.grad.item(), int(optimizer.skipped)) == (2.0, 0.0, 1)


def by_half(leaf, factor):
    """Return a loss whose gradient, the factor, goes through float16: that ends at 65504."""
    return factor * leaf.half().float().sum()


def half_step(optimizer, *factors):
    """Take a step of one call for each factor."""
    (a,) = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    for factor in factors:
        optimizer.backward(a.sum() / len(factors), by_half(a, factor))


@capturables
def test_a_gradient_beyond_float16_is_left_out_until_its_scale_has_been_halved_enough(capturable):
    """`GradScaler` does not see it, so its own scale stays too large for the transfer loss."""
    a, optimizer = wrapped((2,), bound=1e9, capturable=capturable)
    for scale in (1, 1 / 2, 1 / 4, 1 / 8):
        half_step(optimizer, 393216)
        assert a.grad.tolist() == ([1.0, 1.0] if scale > 1 / 8 else [393217.0, 393217.0])
    assert int(optimizer.skipped) == 3
    other, saved = (wrapped((2,), bound=1e9, capturable=capturable) for _ in range(2))
    saved[1].load_state_dict(optimizer.state_dict())
    for same in (copy.deepcopy(optimizer), saved[1], other[1]):
        half_step(same, 393216)
        assert int(same.skipped) == (1 if same is other[1] else 3)


def stay_calm(optimizer, steps):
    """Act as if steps without overflow had been taken: a checkpoint has their number."""
    state = optimizer.state_dict()
    optimizer.load_state_dict({**state, "calm_steps": state["calm_steps"] + steps})


@capturables
@pytest.mark.parametrize(
    ("calms", "last", "skips"), [([1998], 1e5, 1), ([1999], 1e5, 2), ([1999, 2000], 6e4, 1)]
)
def test_2000_steps_without_overflow_double_the_scale_up_to_one(calms, last, skips, capturable):
    _, optimizer = wrapped((2,), bound=1e9, capturable=capturable)
    for factor in (1e5, 1e5):  # the second fits by half
        half_step(optimizer, factor)
    for steps in calms:
        stay_calm(optimizer, steps - 1)
        half_step(optimizer, 1.0)
    half_step(optimizer, last)
    assert int(optimizer.skipped) == skips


@capturables
def test_an_overflow_in_the_2000th_calm_step_halves_the_scale_all_the_same(capturable):
    _, optimizer = wrapped((2,), bound=1e9, capturable=capturable)
    half_step(optimizer, 1e5)
    stay_calm(optimizer, 1999)
    for factor in (2e5, 2e5):  # the last fits into float16 by a quarter
        half_step(optimizer, factor)
    assert int(optimizer.skipped) == 2


@capturables
def test_the_scale_falls_until_it_undoes_the_first_one_of_grad_scaler_and_no_further(capturable):
    a, optimizer = wrapped((2,), bound=1e9, capturable=capturable)
    for _ in range(17):
        half_step(optimizer, 2.0**16 * 65504)
    assert int(optimizer.skipped) == 16
    small = 2.0**-8  # times 2**-16 it is float16's least
    for factor in (*[math.nan] * 14, small):
        half_step(optimizer, factor)
    assert a.grad.tolist() == [1 + small, 1 + small]


def test_the_scale_is_saved_after_the_count_was_set_back():
    _, optimizer = wrapped((2,), bound=1e9)
    half_step(optimizer, 1e5)
    optimizer.skipped = 0
    _, other = wrapped((2,), bound=1e9)
    other.load_state_dict(optimizer.state_dict())
    half_step(other, 1e5)
    assert other.skipped == 0


@capturables
def test_the_scale_counts_steps_not_calls(capturable):
    a, optimizer = wrapped((2,), bound=1e9, capturable=capturable)
    half_step(optimizer, *[393216] * 4)
    stay_calm(optimizer, 1990)
    half_step(optimizer, *[1.0] * 9)
    half_step(optimizer, 98304, 98304)
    # Halved once by the first step, and still so after the others.
    assert int(optimizer.skipped) == 1
    assert int(optimizer.state_dict()["scale_exponent"]) == -1
    assert a.grad.tolist() == [196609, 196609]


@capturables
def test_a_factor_that_is_not_finite_leaves_the_scale_alone(capturable):
    a, optimizer = wrapped((2,), gate=torch.divide, capturable=capturable)  # infinite, by zero
    for weight in (*[0.0] * 20, 0.125):
        optimizer.zero_grad()
        optimizer.backward(a.sum(), weight * by_half(a, 1.0))
    assert (a.grad.tolist(), int(optimizer.skipped)) == ([2.0, 2.0], 20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scaled_gradient_has_the_type_of_its_parameter(dtype):
    scalar = torch.nn.Parameter(torch.tensor(1.0, dtype=dtype))
    optimizer = wrap([scalar], capturable=True)
    optimizer.backward(scalar.square(), 3 * scalar)
    assert (scalar.grad.dtype, scalar.grad.item()) == (dtype, 4.0)


@not_finite
@pytest.mark.parametrize("gate", ["norm", "sigmoid", lambda *_: 1.0])
def test_a_task_gradient_that_is_not_finite_is_the_users_to_see(bad, gate):
    held, other, optimizer = wrapped(1, 1, held=1, gate=gate)
    optimizer.backward(held + bad * other, held + other)
    assert not other.grad.isfinite()
    assert held.grad.isfinite()
    assert optimizer.skipped == 0


@not_finite
@scopes
@capturables
def test_a_callable_gate_sees_finite_norms_and_must_be_finite(bad, scope, capturable):
    seen = []
    param, optimizer = wrapped(1, scope=scope, capturable=capturable)
    optimizer.gate = lambda _, norm: seen.append(norm.item()) or 0.5
    optimizer.backward(1 * param, bad * param)
    assert seen == [0.0]
    optimizer.gate = lambda *_: bad
    optimizer.zero_grad()
    optimizer.backward(1 * param, 1 * param)
    assert param.grad.item() == 1.0
    assert (int(optimizer.skipped), optimizer.gates) == (2, [0.0])


def test_one_factor_that_is_not_finite_drops_the_transfer_gradient_of_all():
    a, b, optimizer = wrapped(1, 1, gate=lambda _, norm: math.nan if norm > 5 else 1.0)
    optimizer.backward(a + b, a + 10 * b)
    assert (a.grad.item(), b.grad.item(), optimizer.skipped) == (1.0, 1.0, 1)


# Leaves that the optimizer does not hold.


@pytest.mark.parametrize("clearing", ["optimizer", "model"])
def test_a_leaf_outside_that_nobody_clears_is_gated_by_each_step_alone(clearing):
    held, outside, optimizer = wrapped(1, 1, held=1)
    for step in (1, 2, 3):
        if clearing == "optimizer":
            optimizer.zero_grad()
        else:
            held.grad = None
        optimizer.backward(3 * held + outside, 3 * held + 4 * outside)
        assert optimizer.gates == [1.0, 0.25]
        assert outside.grad.item() == 2.0 * step  # as `.backward()` would accumulate
    held.grad = None
    optimizer.backward(3 * held + outside, math.inf * held)  # skipped, and the next step is not
    held.grad = None
    optimizer.backward(3 * held + outside, 3 * held + 4 * outside)
    assert (optimizer.gates, optimizer.skipped) == ([1.0, 0.25], 1)


@pytest.mark.parametrize("holds_both", [False, True], ids=["outside", "the model's zero_grad"])
def test_a_gradient_that_nobody_clears_leads_to_a_warning(holds_both):
    held, other, optimizer = wrapped(1, 1, held=2 if holds_both else 1)

    def steps(number, *cleared):
        for _ in range(number):
            for leaf in cleared:
                leaf.grad = None
            for _ in range(2):  # accumulated: that is no step more
                optimizer.backward(held.sum(), (held * other).sum())

    steps(101, held, other)
    steps(99, held)
    with pytest.warns(UserWarning, match=r"in 100 steps, .*number: 1; first shape: \(1,\)"):
        steps(1, held)
    steps(50, held)  # warnings are errors here
    steps(1, held, other)
    steps(99, held)


def test_inputs_that_require_gradient_get_it_and_are_not_kept():
    param, optimizer = wrapped(1)
    x = torch.tensor([3.0], requires_grad=True)
    optimizer.backward(param * x, param * x)
    assert x.grad.item() == 2.0
    gone = weakref.ref(x)
    del x
    assert gone() is None


def test_leaves_frozen_after_the_forward_pass_get_no_gradient():
    held, other, optimizer = wrapped(1, 1, held=1)
    losses = [held + other for _ in range(4)]
    optimizer.backward(*losses[:2])
    other.grad = None
    other.requires_grad_(False)
    optimizer.backward(*losses[2:])
    assert other.grad is None
    assert held.grad.item() == 4.0


def test_leaves_of_deep_and_branching_graphs_get_their_gradient():
    held, other, optimizer = wrapped(1, 1, held=1)
    x = 1 * held
    for _ in range(5000):  # deeper than Python's recursion limit, with 2**5000 paths
        x = (x + other * x) / 2
    optimizer.backward(x, 1 * x)
    assert other.grad.item() == pytest.approx(2 * 5000 / 2)


# Everything at once: any gradients, any number of calls, beside the equations written out.


def linear(params, gradients):
    """Return a loss of the given gradients. None leaves a parameter out; only None, the loss."""
    pairs = zip(params, gradients, strict=True)
    terms = [(p * g.conj()).real.sum() for p, g in pairs if g is not None]
    return sum(terms) if terms else None


SHAPES = [(3, 4), (), (5,), (2, 1, 3)]


@st.composite
def some_gradients(draw, *others):
    """Draw a gradient of each shape; some are None, zero or times one of ``others``."""
    rare = st.sampled_from([*[None, 0.0] * 4, *others])
    sizes = [draw(st.one_of(*[st.floats(-4, 4).map(lambda p: 10**p)] * 2, rare)) for _ in SHAPES]
    if sizes[0] is sizes[1] is None:
        sizes[0] = 1.0  # the loss reaches something
    generator = torch.Generator().manual_seed(draw(seeds))
    raw = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [None if size is None else size * g for size, g in zip(sizes, raw, strict=True)]


task_losses, transfer_losses = some_gradients(), some_gradients(math.nan, math.inf)
no_losses = st.just([None] * len(SHAPES))
some_calls = st.tuples(task_losses, st.one_of(*[transfer_losses] * 3, no_losses))


@scopes
@gates
@given(
    steps=st.lists(st.lists(some_calls, min_size=1, max_size=3), min_size=1, max_size=3),
    bound=st.sampled_from([0.3, 1.0, 3.0]),
    held=st.sampled_from([4, 3, 2]),
    clear_outside=st.booleans(),
    set_to_none=st.booleans(),
    capturable=st.booleans(),
)
def test_sums_of_all_calls_are_gated_as_the_equations_say(
    gate, scope, steps, bound, held, clear_outside, set_to_none, capturable
):
    """The first ``held`` parameters are the optimizer's, the others of another or of none."""
    params = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]
    optimizer = wrap(params[:held], gate=gate, scope=scope, bound=bound, capturable=capturable)
    skips = 0
    for calls in steps:
        optimizer.zero_grad(set_to_none)
        for leaf in params[held:]:
            leaf.grad = None if clear_outside else leaf.grad
        before = [p.grad for p in params]
        for call in calls:
            optimizer.backward(*(linear(params, gradients) for gradients in call))
        merged, factors, skipped = reference.gated_gradients(calls, gate, scope, bound)
        skips += skipped
        assert int(optimizer.skipped) == skips
        if skipped:
            assert not any(optimizer.gates)
        else:
            reached = sum(any(t[n] is not None for _, t in calls) for n in range(held))
            assert optimizer.gates[:reached] == pytest.approx(factors[:reached], rel=1e-9)
            # Leaves outside come in the order of the graph.
            assert sorted(optimizer.gates) == pytest.approx(sorted(factors), rel=1e-9)
        for p, *parts in zip(params, before, merged, strict=True):
            if (wanted := reference.total(parts)) is None:
                assert p.grad is None or (capturable and not p.grad.any())
            else:
                torch.testing.assert_close(p.grad, wanted, rtol=1e-9, atol=1e-14)


# The authors' program and the poster, number by number.


def merge(task, transfer, gate="norm", **settings):
    """Return the merged gradients and the gates of one call on new parameters."""
    params = [torch.ones_like(g).requires_grad_() for g in task]
    optimizer = wrap(params, gate=gate, **settings)
    optimizer.backward(linear(params, task), linear(params, transfer))
    return [p.grad for p in params], optimizer.gates


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def golden(request):
    """Return a function that looks up the tensors whose names begin so, in their order."""
    case = load("clip_case", request.param)
    return lambda start: [case[name] for name in sorted(case) if name.startswith(start)]


assert_golden = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("epoch", ["0", "1", "5", "40", "_minus1"])
def test_norm_gate_is_the_programs(golden, epoch):
    """Its factor sigmoid(epoch) is our bound. Weight decay, gw, stays with the optimizer."""
    (bound,) = golden(f"epoch{epoch}.sigmoid")
    gradients, factors = merge(golden("gc"), golden("gd"), bound=bound.item())
    clipped = [factor * d for factor, d in zip(factors, golden("gd"), strict=True)]
    assert_golden(clipped, golden(f"epoch{epoch}.clipped_gd"))
    total = [g + w for g, w in zip(gradients, golden("gw"), strict=True)]
    assert_golden(total, golden(f"epoch{epoch}.total"))


@pytest.mark.parametrize(("scope", "form"), [("global", "all"), ("parameter", "each")])
def test_sigmoid_gate_is_the_posters(golden, scope, form):
    gradients, factors = merge(golden("gc"), golden("gd"), "sigmoid", scope=scope)
    taus = golden(f"poster.{form}.tau")
    assert factors == pytest.approx([tau.sigmoid().item() for tau in taus], rel=1e-4)
    wanted = [g + d for g, d in zip(golden("gc"), golden(f"poster.{form}.gd"), strict=True)]
    assert_golden(gradients, wanted)


# Memory and precision.


@pytest.mark.parametrize(("task", "transfer"), [(1, None), (None, 1), (1, 1), (1, math.nan)])
def test_parameters_that_share_a_gradient_get_memory_of_their_own(task, transfer):
    """Autograd gives both sides of a sum one tensor, or one number that is expanded."""
    a, b, c, d, rest, optimizer = wrapped(2, 2, 2, 2, 2)
    shared = (a + b).square().sum() + (c + d).sum()
    optimizer.backward(*(rest.sum() if f is None else f * shared for f in (task, transfer)))
    for one, other in ((a, b), (c, d)):
        before = other.grad.clone()
        one.grad[0] = 100.0
        assert one.grad[1] == before[1]
        assert torch.equal(other.grad, before)


TYPES = [
    *[(t, t) for t in (torch.float16, torch.bfloat16)],
    *[(torch.float32, t) for t in (torch.float16, torch.bfloat16, torch.float64, torch.complex64)],
]


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("reached", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("sizes", [(50, 500), (0.01, 5000)], ids=["usual", "a tiny factor"])
@scopes
@gates
def test_types_mix_and_norms_and_products_have_float32_at_least(gate, scope, sizes, reached, types):
    """float16 could not sum the squares, and would round a tiny factor to zero."""
    generator = torch.Generator().manual_seed(0)
    task, transfer = (
        [torch.randn(300, generator=generator, dtype=dtype) * size for dtype in types]
        for size in sizes
    )
    transfer = [g if n in reached else None for n, g in enumerate(transfer)]
    gradients, factors = merge(task, transfer, gate, scope=scope)
    merged, wanted_factors, _ = reference.gated_gradients([(task, transfer)], gate, scope)
    assert factors == pytest.approx(wanted_factors, rel=1e-6)
    for got, wanted in zip(gradients, merged, strict=True):
        rtol = max(1e-6, torch.finfo(got.dtype).eps)
        torch.testing.assert_close(got, wanted.to(got), rtol=rtol, atol=3 * sizes[0] * rtol)


def test_autocast_around_backward_changes_nothing():
    weight, optimizer = wrapped((6, 5))
    loss = (torch.randn(4, 5) @ weight.T @ torch.ones(6, 3)).tanh().square().mean()
    (wanted,) = torch.autograd.grad(loss, weight, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.backward(loss, 1 * loss)
    assert torch.equal(weight.grad, 2 * wanted)


# The graph.


@pytest.mark.parametrize("factors", [(1, 2), (1,)])
def test_the_graph_is_freed_and_the_error_says_what_to_run_again(factors):
    param, optimizer = wrapped(1)
    losses = [factor * param.square() for factor in factors]
    optimizer.backward(*losses)
    with pytest.raises(
        RuntimeError, match=r"go backward through the graph a second time\. Run the student"
    ):
        optimizer.backward(losses[-1])


def test_errors_of_the_backward_pass_come_through():
    def fail(_gradient):
        raise RuntimeError("of a hook")

    param, optimizer = wrapped(1)
    param.register_hook(fail)
    with pytest.raises(RuntimeError, match=r"^of a hook$"):
        optimizer.backward(param.sum())


def test_refuses_a_graphed_student_whose_buffers_two_gradients_would_share():
    class Graphed(torch.autograd.Function):  # as torch.cuda.make_graphed_callables names its own
        @staticmethod
        def forward(_ctx, x):
            return x.clone()

        @staticmethod
        def backward(_ctx, grad):
            return grad

    param, optimizer = wrapped((2,))
    output = Graphed.apply(param)
    with pytest.raises(RuntimeError, match=r"`torch.cuda.make_graphed_callables`.*whole step"):
        optimizer.backward(output.sum(), output.square().sum())
    optimizer.backward(Graphed.apply(param).sum())  # one gradient is what it holds
    assert param.grad.tolist() == [1, 1]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_refuses_reentrant_checkpoints_which_would_train_nothing_inside_them(use_reentrant):
    refused = pytest.raises(RuntimeError, match="Pass use_reentrant=False")
    inside, head, optimizer = wrapped(1, 1)
    x = torch.ones(1, requires_grad=True)
    output = head * checkpoint(lambda x: inside * x, x, use_reentrant=use_reentrant)
    with refused if use_reentrant else nullcontext():
        optimizer.backward(1 * output, output.exp())
    assert (inside.grad is None) == use_reentrant


# What is refused.


def use(name, value):
    """Change a setting later than in the constructor, and call `backward`."""
    param, optimizer = wrapped(1)
    setattr(optimizer, name, value)
    optimizer.backward(1 * param, 1 * param)


REFUSED = [
    *[(partial(GatedGradClip, o), TypeError, "`optimizer` must be .*Optimizer; got .* Build one")
      for o in (None, [], SGD)],
    (lambda: GatedGradClip(wrapped(1)[-1]), TypeError, "`optimizer` must be a plain .* GatedGr"),
    # Those of the constructor's settings are in `test_checks.py`.
    (partial(use, "gate", "tanh"), ValueError, "`gate` must be one of .* a callable; got 'tanh'"),
    *[(partial(use, "scope", s), ValueError, "`scope` must be one of 'parameter', 'global'; got ")
      for s in ("globl", max)],
    *[(partial(use, "bound", b), ValueError, f"`bound` must be a finite number ≥ 0; got {b}")
      for b in (math.nan, math.inf, -1.0)],
    *[(partial(use, "gate", lambda *_, v=v: v), ValueError,
       "`gate` must return a single number; .* Return a float or ")
      for v in (None, "1", torch.ones(2))],
    (lambda: wrap([torch.ones(1)], capturable=True).backward(torch.ones(1)), ValueError,
     "`optimizer` must hold .* requires .* its 1 .*, not frozen ones"),
    (lambda: wrapped(1)[-1].backward(None), TypeError, "`task_loss` must be a tensor; got NoneTy"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_rejects_settings_in_the_constructor_and_made_later(call, error, message):
    with pytest.raises(error, match=message):
        call()


def rows_of(table):
    return F.embedding(torch.tensor([0, 3]), table, sparse=True).sum()


DENSE = r"must give dense .* shape \(5, 2\) .* sparse=F"


@pytest.mark.parametrize("which", ["task_loss", "transfer_loss"])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda *_: 1.0, TypeError, "must be a tensor; got float"),
        (lambda param, _: param, ValueError, r"must be a scalar; got shape \(5, 2\)"),
        (lambda param, _: param.detach().sum(), ValueError, r"must depend on .* `detach`\?"),
        (lambda *_: torch.zeros((), requires_grad=True), ValueError, "must depend on .* none of"),
        (lambda _, other: other.sum(), ValueError, "must depend on .* none of the 1 gets a gr"),
        (lambda param, _: rows_of(param), ValueError, DENSE),
        (lambda param, other: param.sum() + rows_of(other), ValueError, DENSE),
    ],
)
def test_rejects_losses_that_can_not_train_the_parameters(which, bad, error, message):
    param, other, optimizer = wrapped((5, 2), (5, 2), held=1)
    losses = {"task_loss": param.sum(), "transfer_loss": param.square().sum()}
    losses[which] = bad(param, other)
    with pytest.raises(error, match=f"`{which}` {message}") as caught:
        optimizer.backward(**losses)
    assert param.grad is None
    of_transfer = which == "transfer_loss" and "must depend on" in message
    assert ("the first argument of the loss?" in str(caught.value)) == of_transfer


@pytest.mark.parametrize("which", ["task_loss", "transfer_loss"])
def test_a_loss_must_reach_one_of_several_parameters(which):
    a, b, other, optimizer = wrapped(1, 1, 1, held=2)
    losses = {"task_loss": 1 * a, "transfer_loss": 1 * b}
    optimizer.backward(**losses)
    assert optimizer.gates == [1.0]
    with pytest.raises(ValueError, match=f"`{which}` must depend on .* none of the 2 gets a gr"):
        optimizer.backward(**losses | {which: 1 * other})


@pytest.mark.parametrize("processes", [4, 1])
def test_several_processes_need_a_process_group(monkeypatch, processes):
    refused = pytest.raises(RuntimeError, match=r"`process_group` must be given among 4 .*\. Pass")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    param, optimizer = wrapped(1)
    with refused if processes > 1 else nullcontext():
        optimizer.backward(1 * param, 1 * param)
    assert (param.grad is None) == (processes > 1)
