"""Every refusal names the argument, what was expected and what came, and often the fix."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from einops import rearrange

from graph_kd import (
    GatedGradClip,
    GraphTransferLoss,
    MultiHeadGraphEstimator,
    SVDFeature,
    align_singular_vectors,
)

CHANNELS = (6, 8, 10)


def maps(channels=CHANNELS, batch=6, size=(4, 5), **changed):
    """Return features of a network; ``p1=…`` replaces those of point 1."""
    made = [torch.ones(batch, c, *size) for c in channels]
    for name, tensor in changed.items():
        made[int(name[1:])] = tensor
    return made


def moved(features, axis):
    return [m.movedim(1, axis) for m in features]


def named(keys="abc"):
    return dict.fromkeys(keys, torch.ones(6, 6, 4, 5))


def estimator(front, back, **settings):
    return MultiHeadGraphEstimator(5, 7, 2).attention_logits(front, back, **settings)


def gated(**settings):
    return GatedGradClip(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), **settings)


loss = partial(GraphTransferLoss, CHANNELS)
heads = partial(MultiHeadGraphEstimator, 5, 7)
ONES, BACK, TENSOR = torch.ones(4, 5), torch.ones(4, 7), torch.tensor(2)

SETTINGS = [
    # Counts.
    *[(partial(SVDFeature, v), TypeError, rf"^`k` must be an int; got .* \({type(v).__name__}\)\.$")
      for v in (True, False, 1.0, "2", None, TENSOR)],
    (partial(SVDFeature, 0), ValueError, r"^`k` must be an int ≥ 1; got 0\.$"),
    (partial(SVDFeature, -3), ValueError, r"^`k` must be an int ≥ 1; got -3\.$"),
    (partial(SVDFeature, channel_dim=-5), ValueError, r"^`channel_dim` must be .* ≥ -4; got -5"),
    (partial(loss, k=5), ValueError, r"^`student_k` must be at least `k` = 5; got 4\. Pass st"),
    (partial(loss, num_heads=0), ValueError, r"`num_heads` must be an int ≥ 1; got 0"),
    (partial(loss, block_rows=0), ValueError, r"`block_rows` must be an int ≥ 1; got 0"),
    (partial(MultiHeadGraphEstimator, 0, 2), ValueError, r"`front_channels` .* ≥ 1; got 0"),
    (partial(MultiHeadGraphEstimator, 2, 0), ValueError, r"`back_channels` .* ≥ 1; got 0"),
    (partial(heads, num_heads=0), ValueError, r"`num_heads` .* ≥ 1; got 0"),
    (partial(heads, head_channels=0), ValueError, r"`head_channels` .* ≥ 1; got 0"),
    # Other numbers, switches and choices.
    *[(partial(gated, bound=v), ValueError, rf"^`bound` must be a finite number > 0; got {v}\.$")
      for v in (0, 0.0, -0.0, -1, math.inf, -math.inf, math.nan)],
    *[(partial(gated, bound=v), TypeError, rf"`bound` .* number; got .* \({type(v).__name__}\)\.$")
      for v in (True, "1", None, 1j, torch.tensor(1.0))],
    *[(partial(make, capturable=1), TypeError, r"`capturable` must be True or False; got 1\.")
      for make in (loss, gated)],
    (partial(heads, drop_heads="no"), TypeError, r"`drop_heads` must be True or False; got 'no'"),
    *[(partial(gated, gate=v), ValueError, rf"`gate` .* 'sigmoid' or a callable; got {v!r}\.$")
      for v in ("Norm", "", None, 0, 1.5)],
    (partial(gated, scope=abs), ValueError, r"^`scope` must be one of 'parameter', 'global'; got"),
    (partial(loss, squash="sqrt"), ValueError, r"`squash` .* None, 'scaled', 'tanh' or a callable"),
    *[(partial(make, **{name: torch.nn.Tanh}), ValueError, rf"`{name}` must be .*; got <class")
      for make, name in ((loss, "squash"), (gated, "gate"))],
    (partial(loss, reduction="mean"), ValueError, r"`reduction` must be one of .*; got 'mean'"),
    *[(partial(make, process_group=1), TypeError, "`process_group` must be a torch.distr.*; got 1")
      for make in (loss, gated)],
    # Channels and their axis.
    (partial(GraphTransferLoss, None), ValueError, r"`channels` must be a list .* got None"),
    (partial(GraphTransferLoss, 64), ValueError, r"`channels` must be a list .* got 64"),
    (partial(GraphTransferLoss, "64"), ValueError, r"`channels` must be a list .* got '64'"),
    (partial(GraphTransferLoss, [64]), ValueError, r"`channels` .* at least two .* got \[64\]"),
    (partial(GraphTransferLoss, [64, 0]), ValueError, r"`channels\[1\]` .* int ≥ 1; got 0"),
    (partial(loss, student_channels=[4, 8]), ValueError, r"one entry .* 3 .*; got \[4, 8\]"),
    (partial(loss, student_channels=8), ValueError, r"`student_channels` must be a list .*got 8"),
    (partial(loss, student_channels=[4, 8, 0]), ValueError, r"`student_channels\[2\]` .*; got 0"),
    *[(partial(loss, channel_dim=v), ValueError, "`channel_dim` must name an axis of maps")
      for v in (0, 5, -5, (1, 0))],
    *[(partial(loss, channel_dim=v), TypeError, "`channel_dim` must be an int, None, or a pair")
      for v in ("last", (1, 2, 3), True, 1.0)],
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), SETTINGS)
def test_rejects_settings_that_do_not_fit(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        partial(SVDFeature, 7),
        partial(SVDFeature, channel_dim=-4),
        partial(loss, squash=torch.tanh, k=4, student_k=4, channel_dim=[-4, 4]),
        partial(gated, bound=1e-300, gate=abs, scope="global"),
        partial(gated, bound=1),
    ],
)
def test_accepts_settings_up_to_their_limits(call):
    call()


def test_a_count_of_another_kind_of_int_becomes_an_int():
    assert type(SVDFeature(np.int64(2)).k) is int


DOUBLE = [m.double() for m in maps()]
CONVERT = r"^`features` must be a floating-point tensor; got {}\. Convert it with `\.float\(\)`"
VALUES = [
    *[(partial(SVDFeature(), torch.zeros(2, 3, dtype=d)), TypeError, CONVERT.format(d))
      for d in (torch.int64, torch.uint8, torch.bool)],
    (partial(SVDFeature(), torch.zeros(2, 3) * 1j), TypeError, r"complex64\. .* with `\.abs\(\)`"),
    *[(partial(SVDFeature(), v), TypeError, rf"`features` must be a tensor; got {type(v).__name__}")
      for v in (None, 1.0, [torch.zeros(2)], "x")],
    (partial(estimator, torch.ones(4, 3), BACK), ValueError, r"`front` .*s, 5\); got \(4, 3\)"),
    (partial(estimator, ONES, torch.ones(4)), ValueError, r"`back` must have shape \(samples, 7\)"),
    (partial(estimator, ONES[:1], BACK[:1]), ValueError, r"at least 2 samples.*got 1 and 1"),
    (partial(estimator, ONES, BACK[:1]), ValueError, r"at least 2 samples.*got 4 and 1"),
    (partial(estimator, ONES.int(), BACK), TypeError, r"`front` must be a floating"),
    (partial(estimator, ONES.double(), BACK), TypeError, r"`front` .*float32 on cpu"),
    (partial(estimator, ONES, BACK.to("meta")), TypeError, r"`back` .*float32 on cpu.*on meta"),
    (partial(estimator, None, BACK), TypeError, r"`front` must be a tensor; got NoneType"),
    *[(partial(heads(2), ONES, BACK, kept_heads=torch.ones(shape)), ValueError,
       rf"`kept_heads` must have shape .* = \(2, 4\); got {re.escape(str(shape))}")
      for shape in ((4, 2), (1, 4), (2, 1))],
    (partial(heads(2).embeddings, ONES[:1], BACK, frozen=True), ValueError,
     r"at least 2 samples.*got 1 and 4"),
    (partial(loss(), maps(), maps(batch=5)), ValueError, r"`teacher_features\[0\]` .* same 6 sam"),
    (partial(loss(student_channels=[5, 4, 7]).graphs, maps(batch=1)), ValueError,
     r"`features\[0\]` must hold at least 2 samples"),
    (partial(loss().graphs, maps(), of=1), ValueError, r"`of` .* 'teacher', 'student'; got 1"),
    *[(partial(loss(squash=s), maps(), maps()), ValueError,
       rf"`squash` must return floating-point logits of the shape .* 6, 6\); got {got}\.$")
      for s, got in ((lambda s: s.mean(-1, keepdim=True), r"\(., 6, 1\) of torch\.float32"),
                     (lambda s: s > 0, r"\(., 6, 6\) of torch\.bool"),
                     (lambda _: None, "NoneType"))],
    (partial(loss(k=2), maps(), maps(size=(1, 1))), ValueError,
     r"`k` must be at most .* `teacher_features\[0\]`; got 2"),
    (partial(loss(k=2), maps(size=(1, 1)), maps()), ValueError,
     r"`k` must be at most .* `student_features\[0\]`; got 2"),
    *[(partial(loss(), named(keys), named()), ValueError, r"`student_features` must have the keys "
       r"\['a', 'b', 'c'\], .*got \['a', 'b'.*by position") for keys in ("abd", "ab", "abcd")],
    (partial(loss(channel_dim=4).estimator_loss, maps()), ValueError,
     r"`channel_dim` must name an axis of `teacher_features\[0\]`"),
    (partial(loss(channel_dim=-1).estimator_loss, maps()), ValueError,
     r"6 channels on axis 3.*6 entries are on axis 1.*channel_dim=1"),
    (partial(loss(capturable=True).double(), DOUBLE, DOUBLE), TypeError,
     r"`student_features\[0\]` must not be float64 with capturable=True"),
    (partial(align_singular_vectors, torch.ones(2, 4, 5), None), TypeError,
     r"`teacher` must be a tensor; got NoneType"),
    (partial(align_singular_vectors, torch.ones(2, 0, 5), torch.ones(2, 1, 5)), ValueError,
     r"`student` must hold at least one candidate"),
    *[(partial(align_singular_vectors, torch.ones(2, 3, 5), torch.ones(2, 1, 5), null=null),
       ValueError, r"`null` must be a bool tensor with axes \(b, i\) = \(2, 3\), .*; got [lt]")
      for null in (torch.ones(3).bool(), torch.ones(2, 2).bool(), torch.ones(2, 3), [True])],
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), VALUES)
def test_rejects_values_that_do_not_fit(call, error, message):
    with pytest.raises(error, match=message):
        call()


VIDEO = [torch.ones(6, c, 2, 2, 5) for c in CHANNELS]
FEATURES = [
    ([], ValueError, r"` must hold 3 tensors, .*channels=\[6, 8, 10\]; got 0"),
    (maps()[:2], ValueError, r"` must hold 3 tensors, .*; got 2"),
    (torch.ones(6, 6, 4, 4), TypeError, r"` must be a list with one tensor .*; got Tensor"),
    (None, TypeError, r"` must be a list with one tensor .*; got NoneType"),
    *[(kind(maps()), TypeError, rf"` must be a list with one tensor .*; got {kind.__name__}")
      for kind in (set, frozenset)],
    (maps(p1=None), TypeError, r"\[1\]` must be a tensor; got NoneType"),
    (maps(p2=torch.ones(6, 10, 4, 4).int()), TypeError, r"\[2\]` .* got torch.int32"),
    (maps(p1=torch.ones(8)), ValueError, r"\[1\]` must have axes .* got shape \(8,\)"),
    (maps(p1=torch.ones(6, 9, 4, 4)), ValueError, r"\[1\]` must have 8 channels.*got 9"),
    (maps(p2=torch.ones(5, 10, 4, 4)), ValueError, r"\[2\]` must hold the same 6 .*got 5"),
    (maps(p1=torch.ones(9, 6, 8)), ValueError, r"the same 6 samples.*got 9.*Axis 0 is the batch"),
    (maps(p1=torch.full((6, 8, 4, 4), torch.nan)), ValueError, r"\[1\]` must be finite"),
    (maps(p1=torch.ones(6, 8, 4, 4, device="meta")), ValueError, r"\[1\]` must be on cpu"),
    (maps(p0=torch.ones(6, 6, 0, 4)), ValueError, r"\[0\]` must have at least one posit"),
    (maps(p1=maps()[1].double()), TypeError, r"\[1\]` of torch.float64 .*float32.*\.to\(tor"),
    # Maps that would fit with another axis are told which.
    (moved(maps(), -1), ValueError, r"6 entries are on axis -1: if .*, pass channel_dim=-1"),
    (moved(maps(), 2), ValueError, r"6 entries are on axis 2: .* pass channel_dim=2"),
    (moved(VIDEO, -1), ValueError, r"6 entries are on axis -1: .*channel_dim=-1"),
    ([rearrange(m, "b c h w -> b c (h w)") for m in maps()], ValueError,
     r"\[0\]` must have 6 .*Axis 1 has 6: .* tokens `b n c`; .*Conv1d.*`features\.mT`"),
    ([m[0] for m in maps()], ValueError,
     r"\[0\]` must have 6 .*Axis 0 has 6: if the batch axis is missing, pass `features\[None\]`"),
]  # fmt: skip


@pytest.mark.parametrize(("features", "error", "message"), FEATURES)
def test_rejects_features_that_do_not_fit_and_names_the_point(features, error, message):
    with pytest.raises(error, match="`teacher_features.*" + message):
        loss().estimator_loss(features)
    with pytest.raises(error, match="`student_features.*" + message):
        loss()(features, maps())
    with pytest.raises(error, match="`teacher_features.*" + message):
        loss()(maps(), features)


def test_two_samples_are_enough_and_one_is_refused():
    for call in (loss().estimator_loss, partial(loss(), maps(batch=1))):
        with pytest.raises(ValueError, match=r"_features\[0\]` .* at least 2 samples.*got 1"):
            call(maps(batch=1))
    assert loss()(maps(batch=2), maps(batch=2)).isfinite()


@pytest.mark.parametrize("features", [maps((6, 9, 10)), maps((6, 7, 10))])
def test_only_a_student_is_told_of_student_channels(features):
    with pytest.raises(ValueError, match=r"`student_features\[1\]` .*`student_channels`"):
        loss()(features, maps())
    with pytest.raises(ValueError, match=r"`teacher_features\[1\]` must have 8 [^`]*$"):
        loss()(maps(), features)
    with pytest.raises(ValueError, match=r"as student_channels\[1\] says; got . in shape [^`]*$"):
        loss(student_channels=[6, 5, 10])(features, maps())


def test_a_student_whose_height_is_the_teachers_channels_is_told_of_both_ways():
    student = [torch.ones(6, c // 2, c, c) for c in CHANNELS]
    with pytest.raises(ValueError, match=r"6 .* on axis 2 and axis -1.*`student_channels`"):
        loss()(student, maps())


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantiz:UserWarning")
def test_quantised_maps_are_told_to_dequantise():
    quantised = [torch.quantize_per_tensor(m, 0.1, 0, torch.quint8) for m in maps()]
    with pytest.raises(TypeError, match=r"`student_features\[0\]` .*quint8.*`\.dequantize\(\)`"):
        loss()(quantised, quantised)
    with pytest.raises(TypeError, match=r"`features` .*`\.dequantize\(\)`"):
        SVDFeature()(quantised[0])
