"""Laws of the transfer loss: zero at the teacher, symmetric in the batch, frozen heads."""

import copy
import pickle

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import feature_lists, seeds
from torch import nn

from graph_kd import FeatureHooks, GraphTransferLoss, SVDFeature, align_singular_vectors

CHANNELS = (6, 8, 10)
squashes = pytest.mark.parametrize("squash", [None, "tanh", "scaled"])


def make(seed=0, **settings):
    """Return a loss in float64 whose heads and running statistics are not at their start."""
    torch.manual_seed(seed)
    loss = GraphTransferLoss(CHANNELS, num_heads=3, **settings).double()
    for _ in range(3):
        loss.estimator_loss([torch.randn(16, c, 3, 3, dtype=torch.float64) for c in CHANNELS])
    return loss


def features(seed=0, batch=6, size=4):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, c, size, size, generator=generator, dtype=torch.float64)
        for c in CHANNELS
    ]


def slow_loss(loss, student, teacher):
    total = 0.0
    for p, estimator in enumerate(loss.estimators, start=1):
        pairs = []
        for f in (p - 1, p):
            targets = SVDFeature(1)(teacher[f])
            aligned = align_singular_vectors(SVDFeature(4)(student[f]), targets)
            pairs.append((aligned[:, 0], targets[:, 0]))
        logits = [
            reference.logits(estimator, pairs[0][who], pairs[1][who], training=False)
            for who in (0, 1)
        ]
        if loss.squash == "tanh":
            logits = [s.tanh() for s in logits]
        elif loss.squash == "scaled":
            logits = [s / estimator.head_channels**0.5 for s in logits]
        total = total + reference.transfer_loss(*logits)
    return total


@squashes
@settings(max_examples=6)  # the loops are slow
@given(student=feature_lists(), teacher=feature_lists(), seed=st.integers(0, 3))
def test_equals_the_loops(squash, student, teacher, seed):
    loss = make(seed, squash=squash)
    torch.testing.assert_close(loss(student, teacher), slow_loss(loss, student, teacher))


@squashes
@given(teacher=feature_lists())
def test_teacher_as_student_gives_zero_loss_and_zero_gradient(squash, teacher):
    student = [feature.clone().requires_grad_() for feature in teacher]
    value = make(squash=squash)(student, teacher)
    assert abs(value.item()) < 1e-12
    for gradient in torch.autograd.grad(value, student):
        assert gradient.abs().max() < 1e-9


@squashes
@given(student=feature_lists(), teacher=feature_lists())
def test_is_not_negative(squash, student, teacher):
    assert make(squash=squash)(student, teacher) >= 0


@squashes
@given(teacher=feature_lists())
def test_rows_of_a_graph_sum_to_one(squash, teacher):
    for graph in make(squash=squash).graphs(teacher):
        assert graph.shape == (3, 6, 6)
        torch.testing.assert_close(graph.sum(dim=-1), torch.ones(3, 6, dtype=torch.float64))
        assert graph.min() >= 0


@given(student=feature_lists(), teacher=feature_lists(), seed=seeds)
def test_permuting_the_batch_permutes_the_graphs_and_leaves_the_loss(student, teacher, seed):
    loss = make()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    permuted = [[f[order] for f in maps] for maps in (student, teacher)]
    torch.testing.assert_close(loss(*permuted), loss(student, teacher))
    for graph, turned in zip(loss.graphs(teacher), loss.graphs(permuted[1]), strict=True):
        torch.testing.assert_close(turned, graph[:, order][:, :, order])


@given(student=feature_lists(), teacher=feature_lists(), scale=st.floats(1e-3, 1e3))
def test_scale_of_the_features_does_not_matter(student, teacher, scale):
    loss = make()
    scaled = loss([f * scale for f in student], [f / scale for f in teacher])
    torch.testing.assert_close(scaled, loss(student, teacher))


@given(student=feature_lists(), teacher=feature_lists())
def test_sign_of_the_student_does_not_matter(student, teacher):
    loss = make()
    torch.testing.assert_close(loss([-f for f in student], teacher), loss(student, teacher))


def test_gradient_is_the_derivative():
    loss, teacher = make(), features(seed=1, batch=3)
    student = [f.requires_grad_() for f in features(batch=3)]
    assert torch.autograd.gradcheck(lambda *maps: loss(maps, teacher), student, fast_mode=True)


@pytest.mark.parametrize("training", [True, False])
def test_heads_and_teacher_stay_as_they_are(training):
    loss = make().train(training)
    state = copy.deepcopy(loss.state_dict())
    student = [f.requires_grad_() for f in features()]
    teacher = [f.requires_grad_() for f in features(seed=1)]
    loss(student, teacher).backward()
    assert all(f.grad is not None for f in student)
    assert all(f.grad is None for f in teacher)
    assert all(p.grad is None for p in loss.parameters())
    assert all(torch.equal(state[name], tensor) for name, tensor in loss.state_dict().items())


def test_train_mode_does_not_change_the_loss():
    loss = make()
    value = loss.train()(features(), features(seed=1))
    assert torch.equal(value, loss.eval()(features(), features(seed=1)))


def test_estimator_loss_trains_the_heads_alone():
    loss, teacher = make(), [f.requires_grad_() for f in features()]
    before = copy.deepcopy(dict(loss.named_buffers()))
    loss.estimator_loss(teacher).backward()
    assert all(f.grad is None for f in teacher)
    assert all(p.grad is not None for p in loss.parameters())
    assert not any(torch.equal(before[n], b) for n, b in loss.named_buffers())


def test_estimator_loss_is_the_sum_over_pairs():
    loss, teacher = make().eval(), features()
    rows = [SVDFeature(1)(f)[:, 0] for f in teacher]
    wanted = sum(e.loss(rows[p], rows[p + 1]) for p, e in enumerate(loss.estimators))
    torch.testing.assert_close(loss.estimator_loss(teacher), wanted)


@squashes
@pytest.mark.parametrize("block_rows", [1, 4, 5])
def test_blocks_of_rows_give_the_loss_and_gradient_of_the_whole(squash, block_rows):
    whole, blocks = make(squash=squash), make(squash=squash, block_rows=block_rows)
    student = [f.requires_grad_() for f in features()]
    values = [loss(student, features(seed=1)) for loss in (whole, blocks)]
    torch.testing.assert_close(*values)
    gradients = [torch.autograd.grad(value, student) for value in values]
    torch.testing.assert_close(*gradients)


def test_memory_of_a_large_batch_grows_linearly(monkeypatch):
    monkeypatch.setattr("graph_kd._graphs.BLOCK_ENTRIES", 64 * 64)
    entries = {}
    for batch in (128, 256):
        loss, largest = make(), []
        loss.squash = lambda logits, largest=largest: largest.append(logits.numel()) or logits
        student = [f.requires_grad_() for f in features(batch=batch)]
        loss(student, features(seed=1, batch=batch)).backward()
        entries[batch] = max(largest)
    assert entries == {128: 3 * 64 * 64, 256: 3 * 64 * 64}


def test_batchmean_divides_the_sum_by_the_samples():
    summed, mean = make(reduction="sum"), make(reduction="batchmean")
    student, teacher = features(), features(seed=1)
    torch.testing.assert_close(mean(student, teacher), summed(student, teacher) / 6)


def test_callable_squash_takes_logits_to_logits():
    student, teacher = features(), features(seed=1)
    tanh = make(squash="tanh")(student, teacher)
    torch.testing.assert_close(make(squash=torch.tanh)(student, teacher), tanh)


def test_graphs_aligned_to_the_teacher_are_those_of_the_loss():
    loss, student, teacher = make(), features(), features(seed=1)
    pairs = zip(loss.graphs(student, align_to=teacher), loss.graphs(teacher), strict=True)
    value = sum((s * (s.log() - t.log())).sum() for s, t in pairs)
    torch.testing.assert_close(loss(student, teacher), value)


def test_graphs_of_a_network_aligned_to_itself_are_its_graphs():
    loss, teacher = make(), features()
    for own, aligned in zip(loss.graphs(teacher), loss.graphs(teacher, teacher), strict=True):
        torch.testing.assert_close(own, aligned)


def test_teacher_and_student_may_differ_in_rank_and_space():
    loss, teacher = make(), features()
    tokens = [torch.randn(6, 7, c, dtype=torch.float64) for c in CHANNELS]
    vectors = [torch.randn(6, c, dtype=torch.float64) for c in CHANNELS]
    video = [torch.randn(6, c, 2, 3, 3, dtype=torch.float64) for c in CHANNELS]
    for student in (features(size=2), tokens, vectors, video):
        assert loss(student, teacher).isfinite()


def test_a_mapping_is_read_in_its_order():
    loss, teacher = make(), features()
    named = dict(zip("abc", teacher, strict=True))
    assert torch.equal(loss(named, teacher), loss(teacher, teacher))


@pytest.mark.parametrize("k", [2, 3])
def test_several_vectors_a_sample(k):
    loss, teacher = make(k=k, student_k=5), features()
    student = [f.requires_grad_() for f in features(seed=1)]
    assert loss.estimators[0].front_channels == k * CHANNELS[0]
    assert loss(student, teacher) > 0
    assert abs(loss(teacher, teacher).item()) < 1e-12
    loss.estimator_loss(teacher).backward()


def test_moves_to_another_precision():
    student, teacher = [f.float() for f in features()], [f.half() for f in features(seed=1)]
    value = make().float()(student, teacher)
    assert value.dtype == torch.float32
    wanted = make()([f.double() for f in student], [f.double() for f in teacher])
    torch.testing.assert_close(value.double(), wanted, rtol=1e-4, atol=0)


def test_autocast_leaves_the_loss_in_float32():
    loss = make().float()
    student = [f.bfloat16() for f in features()]
    teacher = [f.bfloat16() for f in features(seed=1)]
    plain, plain_heads = loss(student, teacher), loss.eval().estimator_loss(teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(student, teacher), plain)
        assert torch.equal(loss.estimator_loss(teacher), plain_heads)


def test_survives_copy_pickle_and_state_dict():
    loss, student, teacher = make(), features(), features(seed=1)
    other = GraphTransferLoss(CHANNELS, num_heads=3).double()
    other.load_state_dict(loss.state_dict())
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), other):
        assert torch.equal(twin(student, teacher), loss(student, teacher))


@pytest.mark.parametrize("block_rows", [None, 2])
def test_a_squash_may_take_edges_out_of_the_graphs(block_rows):
    def without_first(logits):
        return logits.masked_fill(torch.arange(logits.shape[-1]) == 0, -torch.inf)

    student, teacher = features(), features(seed=1)
    for maps in student:
        maps.requires_grad_()
    loss = make(squash=without_first, block_rows=block_rows)
    value = loss(student, teacher)
    gradients = torch.autograd.grad(value, student)
    assert value.isfinite()
    assert all(g.isfinite().all() and g.any() for g in gradients)
    assert not any(graph[..., 0].any() for graph in loss.graphs(teacher))


@pytest.mark.parametrize("squash", [lambda s: s.mean(-1, keepdim=True), lambda _: None])
def test_rejects_a_squash_that_returns_something_else(squash):
    with pytest.raises(ValueError, match=r"`squash` must return logits of the shape"):
        make(squash=squash)(features(), features(seed=1))


def one_wrong(index, tensor):
    maps = features()
    maps[index] = tensor
    return maps


@pytest.mark.parametrize(
    ("maps", "error", "message"),
    [
        ([], ValueError, r"` must hold 3 tensors, .*channels=\[6, 8, 10\]; got 0"),
        (features()[:2], ValueError, r"` must hold 3 tensors, .*; got 2"),
        (torch.ones(6, 6, 4, 4), TypeError, r"` must be a list with one tensor .*; got Tensor"),
        (None, TypeError, r"` must be a list with one tensor .*; got NoneType"),
        (one_wrong(1, None), TypeError, r"\[1\]` must be a tensor; got NoneType"),
        (one_wrong(2, torch.ones(6, 10, 4, 4).int()), TypeError, r"\[2\]` .* got torch.int32"),
        (one_wrong(1, torch.ones(8)), ValueError, r"\[1\]` must have axes .* got shape \(8,\)"),
        (one_wrong(1, torch.ones(6, 9, 4, 4)), ValueError, r"\[1\]` must have 8 channels.*got 9"),
        (one_wrong(2, torch.ones(5, 10, 4, 4)), ValueError, r"\[2\]` must hold the same 6 .*got 5"),
        (features(batch=1), ValueError, r"\[0\]` must hold at least 2 samples.*got 1"),
        (one_wrong(1, torch.full((6, 8, 4, 4), torch.nan)), ValueError, r"\[1\]` must be finite"),
        (one_wrong(1, torch.ones(6, 8, 4, 4, device="meta")), ValueError, r"\[1\]` must be on cpu"),
        (one_wrong(0, torch.ones(6, 6, 0, 4)), ValueError, r"\[0\]` must have at least one posit"),
    ],
)
def test_rejects_features_that_do_not_fit_and_names_the_point(maps, error, message):
    loss = make()
    with pytest.raises(error, match="`teacher_features" + message):
        loss.estimator_loss(maps)
    with pytest.raises(error, match="`student_features" + message):
        loss(maps, features())
    if not (isinstance(maps, list) and len(maps) == 3 and message.startswith(r"\[0\]` must hold")):
        with pytest.raises(error, match="`teacher_features" + message):
            loss(features(), maps)


def test_rejects_batches_that_differ():
    with pytest.raises(ValueError, match=r"`teacher_features\[0\]` must hold the same 6 samples"):
        make()(features(), features(batch=5))


def test_rejects_a_precision_above_the_heads():
    with pytest.raises(
        TypeError, match=r"`teacher_features\[0\]` of torch.float64 .*torch.float32"
    ):
        make().float().estimator_loss(features())


def test_rejects_more_vectors_than_a_map_has():
    maps = features(size=1)
    with pytest.raises(ValueError, match=r"`k` must be at most .* `teacher_features\[0\]`; got 2"):
        make(k=2)(features(), maps)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"channels": None}, ValueError, r"`channels` must list .* got None"),
        ({"process_group": 1}, TypeError, r"`process_group` must be a torch.distributed .*got 1"),
        ({"channels": 64}, ValueError, r"`channels` must list .* got 64"),
        ({"channels": [64]}, ValueError, r"`channels` must list .* at least two .* got \[64\]"),
        ({"channels": [64, 0]}, ValueError, r"`channels\[1\]` must be an int ≥ 1; got 0"),
        ({"num_heads": 0}, ValueError, r"`num_heads` must be an int ≥ 1; got 0"),
        ({"k": 5}, ValueError, r"`student_k` must be an int ≥ 5; got 4"),
        ({"squash": "sqrt"}, ValueError, r"`squash` must be one of .* a callable; got 'sqrt'"),
        ({"block_rows": 0}, ValueError, r"`block_rows` must be an int ≥ 1; got 0"),
        ({"reduction": "mean"}, ValueError, r"`reduction` must be one of .*; got 'mean'"),
    ],
)
def test_rejects_settings_that_do_not_fit(settings, error, message):
    with pytest.raises(error, match=message):
        GraphTransferLoss(**({"channels": [4, 8]} | settings))


def test_settings_are_shown():
    assert "channels=[6, 8, 10], k=1, student_k=4, squash='tanh'" in repr(make(squash="tanh"))


def hooked(seed, norm=True):
    torch.manual_seed(seed)
    layers, incoming = [], 3
    for c in CHANNELS:
        layers += [nn.Conv2d(incoming, c, 3, padding=1), nn.BatchNorm2d(c) if norm else nn.Tanh()]
        incoming = c
    net = nn.Sequential(*layers).double()
    return net, FeatureHooks(net, ["1", "3", "5"])


IMAGES = torch.randn(2, 6, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
own_or_not = pytest.mark.parametrize("own", [{}, {"student_channels": CHANNELS}], ids=["", "own"])


@own_or_not
@pytest.mark.parametrize("as_list", [True, False], ids=["features", "hooks"])
def test_a_second_step_on_features_of_the_first_is_refused(own, as_list):
    """A copy of the teacher runs, so that its hooks still show the first batch."""
    loss = make(**own)
    (student, of_student), (teacher, of_teacher) = hooked(1), hooked(2)
    student.eval(), teacher.eval()
    twin = copy.deepcopy(teacher)

    def step(model, images):
        student(images)
        model(images)
        return loss(*(h.features if as_list else h for h in (of_student, of_teacher)))

    step(teacher, IMAGES[0]), step(teacher, IMAGES[1])
    with pytest.raises(RuntimeError, match=r"The teacher's features .*'1'.* a copy of it runs"):
        step(twin, IMAGES[0])
    step(teacher, IMAGES[0])


def test_the_heads_notice_that_a_copy_of_the_teacher_runs():
    loss, (teacher, of_teacher) = make(), hooked(2)
    teacher.eval()(IMAGES[0])
    for _ in range(2):  # several steps on one batch are the user's to choose
        loss.estimator_loss(of_teacher)
    copy.deepcopy(teacher)(IMAGES[1])
    with pytest.raises(RuntimeError, match=r"teacher's features .*earlier step"):
        loss.estimator_loss(of_teacher)


def test_a_teacher_with_batch_norm_in_training_mode_is_warned_of_once():
    loss, (student, of_student), (teacher, of_teacher) = make(), hooked(1), hooked(2)
    student(IMAGES[0]), teacher(IMAGES[0])
    with pytest.warns(
        UserWarning, match=r"teacher is in training mode \(see '1'\).*teacher\.eval\(\)"
    ):
        loss(of_student, of_teacher)
    loss.estimator_loss(of_teacher)
    with pytest.warns(UserWarning, match="is in training mode"):
        make().estimator_loss(of_teacher)
    teacher.eval()(IMAGES[0])
    make().estimator_loss(of_teacher)


@pytest.mark.parametrize("k", [2, 3])
def test_several_vectors_a_sample_equal_the_loops(k):
    loss, student, teacher = make(k=k), features(), features(seed=1)

    def rows(vectors):
        return vectors.flatten(1) / k**0.5

    total = 0.0
    targets = [SVDFeature(k)(f) for f in teacher]
    aligned = [
        reference.align(SVDFeature(4)(f), target)
        for f, target in zip(student, targets, strict=True)
    ]
    for p, estimator in enumerate(loss.estimators):
        logits = [
            reference.logits(estimator, rows(v[p]), rows(v[p + 1]), training=False)
            for v in (aligned, targets)
        ]
        total = total + reference.transfer_loss(*logits)
    torch.testing.assert_close(loss(student, teacher), total)


def test_graphs_keep_no_autograd_graph():
    loss, student = make(), [f.requires_grad_() for f in features()]
    for graph in (*loss.graphs(student), *loss.graphs(student, align_to=features(seed=1))):
        assert not graph.requires_grad


def test_autocast_leaves_the_graphs_and_the_choice_of_vectors_alone():
    loss = make().float()
    for seed in range(20):
        student = [f.float() for f in features(seed)]
        teacher = [f.float() for f in features(seed + 1)]
        wanted = loss.graphs(student, align_to=teacher)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = loss.graphs(student, align_to=teacher)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_logits_of_a_block_are_computed_again_in_the_backward_pass():
    calls = []
    loss = make(block_rows=2, squash=lambda logits: calls.append(logits.shape) or logits)
    value = loss([f.requires_grad_() for f in features()], features(seed=1))
    forward = len(calls)
    value.backward()
    assert len(calls) == 2 * forward


def test_a_generator_of_features_is_read_once():
    loss, student, teacher = make(), features(), features(seed=1)
    wanted = loss(student, teacher)
    assert torch.equal(loss((f for f in student), (f for f in teacher)), wanted)
