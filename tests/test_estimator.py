"""Laws of the estimator, against slow loops and by its symmetries."""

import copy
from functools import partial

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import frozen_logits
from strategies import seeds

from graph_kd import MultiHeadGraphEstimator

FRONT, BACK, BATCH = 5, 7, 6


def unit_rows(count, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, channels, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


def make(seed=0, **settings):
    """Return an estimator whose batch norms are not at their identity."""
    torch.manual_seed(seed)
    estimator = MultiHeadGraphEstimator(FRONT, BACK, **settings).double()
    for tensor in [*estimator.parameters(), *estimator.buffers()]:
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.data = 0.5 + torch.rand_like(tensor)
    return estimator


def vectors(seed=0, count=BATCH):
    return unit_rows(count, FRONT, seed), unit_rows(count, BACK, seed + 1)


def test_training_learns_to_predict_the_back_end():
    torch.manual_seed(0)
    estimator = MultiHeadGraphEstimator(FRONT, BACK, num_heads=2)
    front = torch.nn.functional.normalize(torch.randn(64, FRONT), dim=1)
    back = torch.nn.functional.normalize(front @ torch.randn(FRONT, BACK), dim=1)
    optimizer = torch.optim.Adam(estimator.parameters(), lr=1e-2)
    before = estimator.loss(front, back).item()
    for _ in range(60):
        optimizer.zero_grad()
        estimator.loss(front, back).backward()
        optimizer.step()
    assert estimator.loss(front, back).item() < 0.5 * before


@pytest.mark.parametrize("training", [True, False])
@given(seed=seeds, num_heads=st.integers(1, 4), head_channels=st.sampled_from([None, 3]))
def test_logits_and_estimate_equal_the_loops(training, seed, num_heads, head_channels):
    estimator = make(seed, num_heads=num_heads, head_channels=head_channels).train(training)
    front, back = vectors(seed)
    kept = torch.randint(0, 2, (num_heads, BATCH)).double()
    wanted = reference.logits(estimator, front, back, training=training)
    estimate = reference.estimate(estimator, front, back, kept, training=training)
    torch.testing.assert_close(estimator.attention_logits(front, back), wanted)
    torch.testing.assert_close(estimator(front, back, kept_heads=kept), estimate)


@pytest.mark.parametrize("training", [True, False])
def test_a_process_may_ask_for_the_frozen_logits_of_one_row(training):
    estimator, (front, back) = make().train(training), vectors()
    row = frozen_logits(estimator, front, back[2:3])
    torch.testing.assert_close(row, frozen_logits(estimator, front, back)[:, 2:3])
    if not training:
        torch.testing.assert_close(estimator.attention_logits(front, back[2:3]), row)


@given(seed=seeds)
def test_frozen_logits_are_those_of_inference_whatever_train_says(seed):
    estimator, (front, back) = make(seed), vectors(seed)
    state = {name: tensor.clone() for name, tensor in estimator.state_dict().items()}
    frozen = frozen_logits(estimator.train(), front, back)
    torch.testing.assert_close(frozen, estimator.eval().attention_logits(front, back))
    assert not frozen.requires_grad
    for name, tensor in estimator.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@given(seed=seeds)
def test_permuting_samples_permutes_rows_and_columns_and_leaves_the_loss(seed):
    estimator, (front, back) = make(seed, drop_heads=False), vectors(seed)
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(seed))
    logits = estimator.attention_logits(front, back)
    torch.testing.assert_close(
        estimator.attention_logits(front[order], back[order]), logits[:, order][:, :, order]
    )
    torch.testing.assert_close(estimator.attention_logits(front[order], back), logits[..., order])
    torch.testing.assert_close(
        estimator.loss(front[order], back[order]), estimator.loss(front, back)
    )


@given(seed=seeds, num_heads=st.integers(2, 8))
def test_some_head_stays_and_some_head_goes_in_every_row(seed, num_heads):
    torch.manual_seed(seed)
    kept = make(num_heads=num_heads).draw_kept_heads(torch.ones(50, BACK))
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert ((kept.sum(dim=0) > 0) & (kept.sum(dim=0) < num_heads)).all()


@pytest.mark.parametrize(
    ("settings", "training"),
    [({}, True), ({"drop_heads": False}, True), ({"num_heads": 1}, True), ({}, False)],
    ids=["default", "switched off", "single head", "evaluation"],
)
def test_heads_are_dropped_at_random_in_training_alone(settings, training):
    estimator, (front, back) = make(**settings).train(training), vectors()
    random = training and not settings
    assert (estimator.draw_kept_heads(back) is not None) == random
    assert torch.equal(estimator(front, back), estimator(front, back)) != random


def test_gradcheck_of_logits_and_loss():
    estimator, (front, back) = make(num_heads=2, drop_heads=False).eval(), vectors(count=3)
    inputs = (front.requires_grad_(), back.requires_grad_())
    assert torch.autograd.gradcheck(partial(frozen_logits, estimator), inputs)
    assert torch.autograd.gradcheck(estimator.loss, inputs)


def test_state_dict_reads_like_the_method():
    estimator = MultiHeadGraphEstimator(17, 24, num_heads=8)
    shapes = {name: tuple(t.shape) for name, t in estimator.named_parameters()}
    assert shapes == {
        "theta.0.weight": (160, 24),
        "theta.1.weight": (160,),
        "theta.1.bias": (160,),
        "phi.0.weight": (160, 17),
        "phi.1.weight": (160,),
        "phi.1.bias": (160,),
        "f1.0.weight": (20, 17),
        "f1.1.weight": (20,),
        "f1.1.bias": (20,),
        "f2.weight": (24, 160),
        "f2.bias": (24,),
    }
    assert "num_heads=8, head_channels=20" in repr(estimator)


@pytest.mark.parametrize("whole_norms", [False, True])
def test_half_precision_parameters_compute_in_float32(whole_norms):
    half, (front, back) = make().eval().bfloat16(), (rows.bfloat16() for rows in vectors())
    for module in half.modules():
        if whole_norms and isinstance(module, torch.nn.BatchNorm1d):
            module.float()
    whole = copy.deepcopy(half).float()
    torch.testing.assert_close(half(front, back), whole(front.float(), back.float()))


def test_weights_start_from_hes_normal_distribution_by_fan_out_and_the_bias_at_zero():
    torch.manual_seed(0)
    estimator = MultiHeadGraphEstimator(40, 60, num_heads=8)
    for layer in (estimator.theta[0], estimator.phi[0], estimator.f1[0], estimator.f2):
        wanted = (2 / layer.weight.shape[0]) ** 0.5
        assert layer.weight.std().item() == pytest.approx(wanted, rel=0.05)
    assert not estimator.f2.bias.any()
