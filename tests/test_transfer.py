"""Laws of the transfer loss: as in the paper, and with attention heads of the student's own."""

import copy
import pickle
from functools import cache

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import feature_lists, seeds
from torch import nn

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss, SVDFeature

TEACHER = (6, 8, 10)
FORMS = {"paper": None, "own heads": (5, 4, 7), "own heads, equal channels": TEACHER}
forms = pytest.mark.parametrize("form", FORMS)
trainings = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
squashes = pytest.mark.parametrize("squash", [None, "tanh", "scaled"])


def make(form="paper", seed=0, **settings):
    """Return a loss in float64 whose heads and running statistics are not at their start."""
    loss = copy.deepcopy(_made(form, seed, **settings))
    torch.manual_seed(seed)  # whether it was made now or before
    return loss


@cache
def _made(form, seed, **settings):
    torch.manual_seed(seed)
    loss = GraphTransferLoss(TEACHER, 3, student_channels=FORMS[form], **settings).double()
    for step in range(3):
        loss.estimator_loss(features(seed=step, batch=16))
        loss(features(form, seed=10 + step, batch=16), features(seed=step, batch=16))
    return loss


def features(form="paper", seed=0, batch=6, size=4):
    """Return maps of the teacher, or of the student of a form."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, c, size, size) for c in FORMS[form] or TEACHER]
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]


def slow_loss(loss, student, teacher):
    """Compute the loss entry by entry."""
    theirs = [SVDFeature(loss.k)(m) for m in teacher]
    if loss.student_heads:  # the top k vectors as they are
        ours = [SVDFeature(loss.k)(m) for m in student]
    else:
        candidates = [SVDFeature(loss.student_k)(m) for m in student]
        ours = [reference.align(*pair) for pair in zip(candidates, theirs, strict=True)]
    ours, theirs = ([v.flatten(1) / loss.k**0.5 for v in vectors] for vectors in (ours, theirs))
    total = 0.0
    for p, shared in enumerate(loss.estimators):
        own = loss.student_heads[p] if loss.student_heads else shared
        training = loss.training and own is not shared
        student_logits = reference.logits(own, ours[p], ours[p + 1], training=training)
        teacher_logits = reference.logits(shared, theirs[p], theirs[p + 1], training=False)
        squash = {
            None: lambda s: s,
            "tanh": torch.tanh,
            "scaled": lambda s, d=shared.head_channels: s / d**0.5,
        }[loss.squash]
        total = total + reference.transfer_loss(squash(student_logits), squash(teacher_logits))
    return total


def state_of(module):
    return copy.deepcopy(module.state_dict())


def network(channels):
    layers, incoming = [], 3
    for width in channels:
        layers += [nn.Conv2d(incoming, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        incoming = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(incoming, 5))


@forms
def test_training_lowers_the_transfer_loss_and_moves_the_graphs_to_the_teachers(form):
    torch.manual_seed(0)
    teacher, student = (
        network(TEACHER).eval().requires_grad_(False),
        network(FORMS[form] or TEACHER),
    )
    loss = GraphTransferLoss(TEACHER, 2, student_channels=FORMS[form], squash="scaled")
    images, labels = torch.randn(16, 3, 8, 8), torch.randint(5, (16,))
    points = ["2", "5", "8"]
    of_student, of_teacher = FeatureHooks(student, points), FeatureHooks(teacher, points)
    heads = torch.optim.Adam(loss.estimators.parameters(), 1e-2)
    for _ in range(10):
        teacher(images)
        heads.zero_grad()
        loss.estimator_loss(of_teacher.features).backward()
        heads.step()
    trained = [*student.parameters(), *loss.student_heads.parameters()]
    optimizer = GatedGradClip(torch.optim.Adam(trained, 1e-2), bound=10.0)

    def distance():
        with torch.no_grad():
            student(images), teacher(images)
            graphs = loss.graphs(of_student.features, align_to=of_teacher.features)
            pairs = zip(graphs, loss.graphs(of_teacher.features), strict=True)
            return sum((ours - theirs).abs().sum().item() for ours, theirs in pairs)

    values, before = [], distance()
    for _ in range(20):
        task = nn.functional.cross_entropy(student(images), labels)
        teacher(images)
        transfer = loss(of_student.features, of_teacher.features)
        values.append(transfer.item())
        optimizer.zero_grad()
        optimizer.backward(task, transfer)
        optimizer.step()
    assert values[-1] < 0.7 * values[0]
    assert distance() < 0.9 * before


@forms
@trainings
@pytest.mark.parametrize(("k", "squash"), [(1, None), (1, "tanh"), (1, "scaled"), (2, None)])
@settings(max_examples=3)  # the loops are slow
@given(data=st.data(), teacher=feature_lists(), student_k=st.integers(3, 5))
def test_equals_the_loops(form, training, k, squash, data, teacher, student_k):
    """In training mode the student's own heads use the statistics of the batch, no others do."""
    student = data.draw(feature_lists(FORMS[form] or TEACHER))
    loss = make(form, k=k, squash=squash, student_k=student_k).train(training)
    assert loss.estimators[0].front_channels == k * TEACHER[0]
    wanted = slow_loss(copy.deepcopy(loss), student, teacher)
    value = loss(student, teacher)
    torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-9)
    assert value >= 0


@pytest.mark.parametrize("k", [1, 2])
@given(teacher=feature_lists())
def test_teacher_as_student_gives_zero_loss_and_zero_gradient(k, teacher):
    student = [feature.clone().requires_grad_() for feature in teacher]
    value = make(k=k)(student, teacher)
    assert abs(value.item()) < 1e-12
    for gradient in torch.autograd.grad(value, student):
        assert gradient.abs().max() < 1e-9


@squashes
def test_rows_of_a_graph_sum_to_one(squash):
    for graph in make(squash=squash).graphs(features()):
        assert graph.shape == (3, 6, 6)
        torch.testing.assert_close(graph.sum(dim=-1), torch.ones(3, 6, dtype=torch.float64))
        assert graph.min() >= 0


@pytest.mark.parametrize("form", ["paper", "own heads"])
@given(data=st.data(), teacher=feature_lists(), seed=seeds)
def test_permuting_the_batch_permutes_the_graphs_and_leaves_the_loss(form, data, teacher, seed):
    loss, student = make(form), data.draw(feature_lists(FORMS[form] or TEACHER))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    permuted = [[f[order] for f in maps] for maps in (student, teacher)]
    torch.testing.assert_close(loss(*permuted), loss(student, teacher))
    for graph, turned in zip(loss.graphs(teacher), loss.graphs(permuted[1]), strict=True):
        torch.testing.assert_close(turned, graph[:, order][:, :, order])


@given(student=feature_lists(), teacher=feature_lists(), scale=st.floats(1e-3, 1e3))
def test_scale_of_the_features_and_sign_of_the_students_do_not_matter(student, teacher, scale):
    loss = make()
    scaled = loss([-f * scale for f in student], [f / scale for f in teacher])
    torch.testing.assert_close(scaled, loss(student, teacher))


@forms
def test_gradient_is_the_derivative(form):
    loss, teacher = make(form), features(seed=1, batch=3)
    inputs = [f.requires_grad_() for f in features(form, batch=3)]
    inputs += loss.student_heads.parameters()
    student = inputs[: len(teacher)]
    assert torch.autograd.gradcheck(lambda *_: loss(student, teacher), inputs, fast_mode=True)


@forms
@trainings
def test_gradient_reaches_the_student_and_its_heads_alone_and_no_other_statistic_moves(
    form, training
):
    loss = make(form).train(training)
    before = state_of(loss)
    student = [f.requires_grad_() for f in features(form)]
    teacher = [f.requires_grad_() for f in features(seed=1)]
    loss(student, teacher).backward()
    assert all(f.grad is not None and f.grad.any() for f in student)
    assert all(p.grad is not None for p in loss.student_heads.parameters())
    assert all(f.grad is None for f in teacher)
    assert all(p.grad is None for p in loss.estimators.parameters())
    moving = dict(loss.student_heads.named_buffers(prefix="student_heads")) if training else {}
    for name, tensor in loss.state_dict().items():
        assert torch.equal(before[name], tensor) != (name in moving), name


def test_estimator_loss_is_the_sum_over_pairs():
    loss, teacher = make().eval(), features()
    rows = [SVDFeature(1)(f)[:, 0] for f in teacher]
    wanted = sum(e.loss(rows[p], rows[p + 1]) for p, e in enumerate(loss.estimators))
    torch.testing.assert_close(loss.estimator_loss(teacher), wanted)


@pytest.mark.parametrize("k", [1, 2])
def test_estimator_loss_trains_the_teachers_heads_alone(k):
    loss, teacher = make("own heads", k=k), [f.requires_grad_() for f in features()]
    before = state_of(loss)
    loss.estimator_loss(teacher).backward()
    assert all(f.grad is None for f in teacher)
    assert all(p.grad is not None for p in loss.estimators.parameters())
    assert all(p.grad is None for p in loss.student_heads.parameters())
    for name, buffer in loss.named_buffers():
        assert torch.equal(before[name], buffer) != name.startswith("estimators"), name


def test_own_heads_are_as_many_and_as_wide_as_the_teachers_and_hold_theta_and_phi_only():
    loss = make("own heads")
    assert len(loss.student_heads) == len(loss.estimators) == 2
    student = FORMS["own heads"]
    for own, shared, front, back in zip(
        loss.student_heads, loss.estimators, student[:-1], student[1:], strict=True
    ):
        assert {name.split(".")[0] for name, _ in own.named_parameters()} == {"theta", "phi"}
        assert own.theta[0].weight.shape == (shared.theta[0].weight.shape[0], back)
        assert own.phi[0].weight.shape == (shared.phi[0].weight.shape[0], front)
        assert (own.num_heads, own.head_channels) == (shared.num_heads, shared.head_channels)


@forms
@pytest.mark.parametrize("block_rows", [1, 4])
def test_blocks_of_rows_give_the_loss_and_gradient_of_the_whole(form, block_rows):
    losses = [make(form, squash="tanh", block_rows=rows) for rows in (None, block_rows)]
    student = [f.requires_grad_() for f in features(form)]
    values = [loss(student, features(seed=1)) for loss in losses]
    torch.testing.assert_close(*values)
    gradients = [
        torch.autograd.grad(value, [*student, *loss.student_heads.parameters()])
        for value, loss in zip(values, losses, strict=True)
    ]
    torch.testing.assert_close(*gradients)


def test_a_large_batch_is_taken_in_blocks_whose_logits_are_computed_again(monkeypatch):
    """So memory grows linearly in the batch."""
    monkeypatch.setattr("graph_kd._graphs.BLOCK_ENTRIES", 64 * 64)
    for batch in (64, 128, 256):
        loss, calls = make(), []
        loss.squash = lambda logits, calls=calls: calls.append(logits.numel()) or logits
        value = loss([f.requires_grad_() for f in features(batch=batch)], features(batch=batch))
        forward = len(calls)
        value.backward()
        assert max(calls) == 3 * 64 * 64
        # The blocks of two networks and two pairs, and again in the backward pass.
        assert forward == 4 * (batch // 64) ** 2
        assert len(calls) == (forward if batch == 64 else 2 * forward)
    wanted = make()(features(), features(seed=1))
    monkeypatch.setattr("graph_kd._graphs.BLOCK_ENTRIES", 4)  # less than a row has
    torch.testing.assert_close(make()(features(), features(seed=1)), wanted)


@pytest.mark.parametrize("batch", [3, 6])
def test_batchmean_divides_the_sum_by_the_samples(batch):
    summed, mean = make(reduction="sum"), make(reduction="batchmean")
    student, teacher = features(batch=batch), features(seed=1, batch=batch)
    torch.testing.assert_close(mean(student, teacher), summed(student, teacher) / batch)


@pytest.mark.parametrize(("name", "value"), [("reduction", "mean"), ("squash", "tan")])
def test_settings_are_checked_when_they_are_used(name, value):
    loss = make()
    setattr(loss, name, value)
    with pytest.raises(ValueError, match=f"`{name}` must be one of .*; got '{value}'"):
        loss(features(), features())


def test_callable_squash_takes_logits_to_logits_and_leaves_the_loss_its_dtype():
    maps = features(), features(seed=1)
    wanted = make(squash="tanh")(*maps)
    torch.testing.assert_close(make(squash=torch.tanh)(*maps), wanted)
    half = make(squash=lambda logits: logits.tanh().half())(*maps)
    torch.testing.assert_close(half, wanted, rtol=0.01, atol=0)


def test_the_graphs_of_the_teacher_are_constants_for_a_squash_that_learns():
    loss, seen = make(), []
    loss.squash = lambda logits: seen.append(torch.is_grad_enabled()) or logits
    loss(features(), features(seed=1))
    assert seen == [False, True] * 2  # of the teacher, of the student


def test_a_random_squash_draws_the_same_again_in_the_backward_pass():
    drawn = []

    def noisy(logits):
        drawn.append(torch.rand(()).item())
        return logits * drawn[-1]

    loss = make(squash=noisy, block_rows=3)
    student, teacher = features(seed=0), features(seed=1)
    drawn.clear()  # of `make`
    value = loss([m.requires_grad_() for m in student], teacher)
    forward = len(drawn)
    value.backward()
    assert sorted(drawn[forward:]) == sorted(drawn[:forward])
    assert len(set(drawn)) == forward


def test_blocks_leave_the_random_state_alone_which_a_cuda_graph_could_not_read(monkeypatch):
    def refuse():
        raise AssertionError

    loss, student, teacher = make(block_rows=3), features(seed=0), features(seed=1)
    monkeypatch.setattr(torch, "get_rng_state", refuse)
    loss([m.requires_grad_() for m in student], teacher).backward()


@pytest.mark.parametrize("block_rows", [None, 2])
def test_a_squash_may_take_edges_out_of_the_graphs(block_rows):
    def without_first(logits):
        return logits.masked_fill(torch.arange(logits.shape[-1]) == 0, -torch.inf)

    student, teacher = [f.requires_grad_() for f in features()], features(seed=1)
    loss = make(squash=without_first, block_rows=block_rows)
    value = loss(student, teacher)
    assert value.isfinite()
    assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(value, student))
    assert not any(graph[..., 0].any() for graph in loss.graphs(teacher))


@forms
@trainings
def test_graphs_are_those_of_the_loss_and_leave_no_trace(form, training):
    loss = make(form).train(training)
    student = [f.requires_grad_() for f in features(form)]
    teacher = [f.requires_grad_() for f in features(seed=1)]
    before = state_of(loss)
    pairs = zip(loss.graphs(student, align_to=teacher), loss.graphs(teacher), strict=True)
    divergence = sum((s * (s.log() - t.log())).sum() for s, t in pairs)
    assert all(torch.equal(before[name], t) for name, t in loss.state_dict().items())
    assert not divergence.requires_grad
    torch.testing.assert_close(divergence, loss(student, teacher).detach())


def test_graphs_say_whose_they_are_where_channels_agree():
    loss, maps = make("own heads, equal channels"), features()
    teachers, own = loss.graphs(maps, of="teacher"), loss.graphs(maps, of="student")
    assert not torch.equal(teachers[0], own[0])
    assert torch.equal(loss.graphs(maps)[0], teachers[0])
    assert torch.equal(loss.graphs(maps, align_to=features(seed=1))[0], own[0])
    with pytest.raises(ValueError, match="`of` must be 'student' or None if `align_to`"):
        loss.graphs(maps, align_to=maps, of="teacher")
    other = make("own heads")  # only the student has these channels
    maps = features("own heads")
    assert torch.equal(other.graphs(maps)[0], other.graphs(maps, of="student")[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["paper", "own heads"])
def test_heads_held_in_half_precision_compute_in_float32(dtype, form):
    loss = make(form).to(dtype)
    whole = copy.deepcopy(loss).float()
    student = [f.to(dtype).requires_grad_() for f in features(form)]
    teacher = [f.to(dtype) for f in features(seed=1)]
    for value, wanted in [
        (loss(student, teacher), whole(student, teacher)),
        (loss.eval().estimator_loss(teacher), whole.eval().estimator_loss(teacher)),
    ]:
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=0)
    loss.train()(student, teacher).backward()
    loss.estimator_loss(teacher).backward()
    for parameter in loss.parameters():
        assert parameter.grad.dtype == parameter.dtype == dtype
        assert parameter.grad.isfinite().all()
    whole.train()(student, teacher)
    for name, buffer in whole.student_heads.named_buffers():
        kept = loss.student_heads.get_buffer(name)
        torch.testing.assert_close(kept.float(), buffer.float(), rtol=0.02, atol=2e-3)


def test_autocast_changes_neither_losses_nor_graphs_nor_the_choice_of_vectors():
    loss = make(squash=lambda logits: logits @ torch.eye(logits.shape[1]).to(logits)).float().eval()
    for seed in range(20):
        student = [f.bfloat16() for f in features(seed=seed)]
        teacher = [f.bfloat16() for f in features(seed=seed + 1)]

        def everything(student=student, teacher=teacher):
            values = loss(student, teacher), loss.estimator_loss(teacher)
            return [*values, *loss.graphs(student, align_to=teacher)]

        wanted = everything()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(everything(), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["paper", "own heads"])
def test_survives_copy_pickle_and_state_dict(form):
    loss = make(form).eval()
    other = GraphTransferLoss(TEACHER, 3, student_channels=FORMS[form]).double().eval()
    other.load_state_dict(loss.state_dict())
    maps = features(form), features(seed=1)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), other):
        assert torch.equal(twin(*maps), loss(*maps))


def test_the_count_of_doubtful_samples_stays_where_a_cuda_graph_counts():
    loss = GraphTransferLoss(TEACHER, 3, capturable=True)
    loss.load_state_dict(GraphTransferLoss(TEACHER, 3).state_dict())  # which has no count
    counted, maps = loss.doubtful, [torch.zeros(2, c, 4, 4) for c in TEACHER]
    loss(maps, maps)
    assert counted.item() == 12  # two samples at three points of two networks


def test_a_student_with_own_heads_needs_no_candidates():
    loss = GraphTransferLoss([8, 8], 2, student_channels=[8, 8], k=5)
    maps = [torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
    assert loss(maps, maps).isfinite()


def test_a_state_of_version_0_1_fits_a_loss_without_student_channels():
    loss = GraphTransferLoss(TEACHER, 3)
    assert {name.split(".")[0] for name in loss.state_dict()} == {"estimators"}
    assert len(loss.student_heads) == 0


def test_settings_are_shown():
    assert "channels=[6, 8, 10], k=1, student_k=4, squash='tanh'" in repr(make(squash="tanh"))
    assert "channels=[6, 8, 10], student_channels=[5, 4, 7], k=1" in repr(make("own heads"))
