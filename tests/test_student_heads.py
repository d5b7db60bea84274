"""A student with attention heads of its own: any channels, trained with it by the transfer loss."""

import copy

import pytest
import reference
import torch
from torch import nn

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss, SVDFeature

TEACHER, STUDENT = (6, 8, 10), (3, 4, 7)
forms = pytest.mark.parametrize("student_channels", [STUDENT, TEACHER], ids=["fewer", "equal"])
squashes = pytest.mark.parametrize("squash", [None, "tanh", "scaled"])


def make(student_channels=STUDENT, seed=0, **settings):
    """Return a loss in float64 whose statistics are not at their start."""
    torch.manual_seed(seed)
    loss = GraphTransferLoss(TEACHER, 3, student_channels=student_channels, **settings).double()
    for step in range(3):
        loss.estimator_loss(features(TEACHER, step, batch=16))
        loss(features(student_channels, 10 + step, batch=16), features(TEACHER, step, batch=16))
    return loss


def features(channels, seed=0, batch=6, size=4):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, c, size, size) for c in channels]
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]


def slow_loss(loss, student, teacher, k=1):
    """Compute the loss entry by entry: the student's top k vectors as they are, no alignment."""

    def rows(maps):
        return [SVDFeature(k)(m).flatten(1) / k**0.5 for m in maps]

    total = 0.0
    ours, theirs = rows(student), rows(teacher)
    for p, (own, shared) in enumerate(zip(loss.student_heads, loss.estimators, strict=True)):
        logits = [
            reference.logits(own, ours[p], ours[p + 1], training=loss.training),
            reference.logits(shared, theirs[p], theirs[p + 1], training=False),
        ]
        if loss.squash == "tanh":
            logits = [s.tanh() for s in logits]
        elif loss.squash == "scaled":
            logits = [s / shared.head_channels**0.5 for s in logits]
        total = total + reference.transfer_loss(*logits)
    return total


@forms
@squashes
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_the_loops(student_channels, squash, training):
    loss = make(student_channels, squash=squash).train(training)
    student, teacher = features(student_channels), features(TEACHER, seed=1)
    wanted = slow_loss(copy.deepcopy(loss), student, teacher)
    torch.testing.assert_close(loss(student, teacher), wanted)


@pytest.mark.parametrize("k", [2, 3])
def test_several_vectors_a_sample_equal_the_loops(k):
    loss = make((5, 4, 7), k=k).eval()
    student, teacher = features((5, 4, 7)), features(TEACHER, seed=1)
    torch.testing.assert_close(
        loss(student, teacher), slow_loss(loss, student, teacher, k), rtol=1e-6, atol=0
    )


def test_heads_are_as_many_and_as_wide_as_the_teachers_and_hold_theta_and_phi_only():
    loss = make()
    assert len(loss.student_heads) == len(loss.estimators) == 2
    for own, shared, front, back in zip(
        loss.student_heads, loss.estimators, STUDENT[:-1], STUDENT[1:], strict=True
    ):
        assert {name.split(".")[0] for name, _ in own.named_parameters()} == {"theta", "phi"}
        assert own.theta[0].weight.shape == (shared.theta[0].weight.shape[0], back)
        assert own.phi[0].weight.shape == (shared.phi[0].weight.shape[0], front)
        assert (own.num_heads, own.head_channels) == (shared.num_heads, shared.head_channels)


@forms
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradient_reaches_the_student_and_its_heads_and_nothing_of_the_teacher(
    student_channels, training
):
    loss = make(student_channels).train(training)
    student = [f.requires_grad_() for f in features(student_channels)]
    teacher = [f.requires_grad_() for f in features(TEACHER, seed=1)]
    loss(student, teacher).backward()
    assert all(p.grad is not None for p in loss.student_heads.parameters())
    assert all(f.grad is not None and f.grad.any() for f in student)
    assert all(p.grad is None for p in loss.estimators.parameters())
    assert all(f.grad is None for f in teacher)


def test_gradient_is_the_derivative():
    loss, teacher = make(), features(TEACHER, seed=1, batch=3)
    student = [f.requires_grad_() for f in features(STUDENT, batch=3)]
    weights = list(loss.student_heads.parameters())
    assert torch.autograd.gradcheck(
        lambda *_: loss(student, teacher), (*student, *weights), fast_mode=True
    )


def test_own_statistics_move_in_training_alone_and_the_teachers_never():
    loss = make()
    student, teacher = features(STUDENT), features(TEACHER, seed=1)
    before = copy.deepcopy(loss.state_dict())
    loss.eval()(student, teacher)
    assert all(torch.equal(before[name], t) for name, t in loss.state_dict().items())
    loss.train()(student, teacher)
    for name, tensor in loss.state_dict().items():
        moves = name.startswith("student_heads") and name not in dict(loss.named_parameters())
        assert torch.equal(before[name], tensor) != moves, name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_graphs_of_the_student_are_those_of_its_heads_and_move_no_statistic(training):
    loss = make().train(training)
    student, teacher = features(STUDENT), features(TEACHER, seed=1)
    before = copy.deepcopy(loss.state_dict())
    graphs = loss.graphs(student)
    assert all(torch.equal(before[name], t) for name, t in loss.state_dict().items())
    divergence = sum(
        (g * (g.log() - t.log())).sum() for g, t in zip(graphs, loss.graphs(teacher), strict=True)
    )
    torch.testing.assert_close(divergence, loss(student, teacher))
    assert not any(graph.requires_grad for graph in graphs)


def test_graphs_say_whose_they_are_where_channels_agree():
    loss, maps = make(TEACHER), features(TEACHER)
    teachers, own = loss.graphs(maps, of="teacher"), loss.graphs(maps, of="student")
    assert not torch.equal(teachers[0], own[0])
    assert torch.equal(loss.graphs(maps)[0], teachers[0])
    assert torch.equal(loss.graphs(maps, align_to=features(TEACHER, seed=1))[0], own[0])
    with pytest.raises(ValueError, match=r"`of` must be one of None, 'teacher', 'student'; got 1"):
        loss.graphs(maps, of=1)


@pytest.mark.parametrize("block_rows", [1, 4])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_blocks_of_rows_give_the_loss_and_gradient_of_the_whole(block_rows, training):
    losses = [make().train(training), make(block_rows=block_rows).train(training)]
    student = [f.requires_grad_() for f in features(STUDENT)]
    values = [loss(student, features(TEACHER, seed=1)) for loss in losses]
    torch.testing.assert_close(*values)
    gradients = [
        torch.autograd.grad(value, [*student, *loss.student_heads.parameters()])
        for value, loss in zip(values, losses, strict=True)
    ]
    torch.testing.assert_close(*gradients)


def test_permuting_the_batch_leaves_the_loss():
    loss, student, teacher = make(), features(STUDENT), features(TEACHER, seed=1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    permuted = loss([f[order] for f in student], [f[order] for f in teacher])
    torch.testing.assert_close(permuted, loss(student, teacher))


def test_a_state_of_version_0_1_loads_without_student_channels_and_copies_agree():
    loss = GraphTransferLoss(TEACHER, 3).double()
    assert not any("student" in name for name in loss.state_dict())
    assert len(loss.student_heads) == 0
    own = make()
    other = GraphTransferLoss(TEACHER, 3, student_channels=STUDENT).double()
    other.load_state_dict(own.state_dict())
    maps = features(STUDENT), features(TEACHER, seed=1)
    for twin in (other, copy.deepcopy(own)):
        assert torch.equal(twin(*maps), copy.deepcopy(own)(*maps))


def test_settings_are_shown():
    assert "channels=[6, 8, 10], student_channels=[3, 4, 7], k=1" in repr(make())


@pytest.mark.parametrize(
    ("student_channels", "error", "message"),
    [
        ([4, 8], ValueError, r"`student_channels` must have one entry .* 3 .*; got \[4, 8\]"),
        (8, ValueError, r"`student_channels` must list .*got 8"),
        ([4, 8, 0], ValueError, r"`student_channels\[2\]` must be an int ≥ 1; got 0"),
    ],
)
def test_rejects_channels_that_do_not_fit(student_channels, error, message):
    with pytest.raises(error, match=message):
        GraphTransferLoss(TEACHER, student_channels=student_channels)


def test_a_student_of_other_channels_is_told_of_student_channels():
    loss = GraphTransferLoss(TEACHER).double()
    with pytest.raises(ValueError, match=r"`student_features\[0\]` must have 6 .*`student_channel"):
        loss(features(STUDENT), features(TEACHER))
    with pytest.raises(ValueError, match=r"as student_channels\[1\] says; got 5 in shape"):
        make()(features((3, 5, 7)), features(TEACHER))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("student_channels", [None, STUDENT], ids=["paper", "own heads"])
def test_heads_held_in_half_precision_compute_in_float32(dtype, student_channels):
    loss = make(student_channels or TEACHER).to(dtype)
    if student_channels is None:
        loss.student_heads = nn.ModuleList()
    whole = copy.deepcopy(loss).float()
    student = [f.to(dtype).requires_grad_() for f in features(student_channels or TEACHER)]
    teacher = [f.to(dtype) for f in features(TEACHER, seed=1)]
    for value, wanted in [
        (loss(student, teacher), whole(student, teacher)),
        (loss.eval().estimator_loss(teacher), whole.eval().estimator_loss(teacher)),
    ]:
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=0)
    loss.train()(student, teacher).backward()
    loss.estimator_loss(teacher).backward()
    for parameter in loss.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype == dtype
        assert parameter.grad.isfinite().all()
    whole.train()(student, teacher)
    for own, wanted in zip(loss.student_heads, whole.student_heads, strict=True):
        for name, buffer in own.named_buffers():
            torch.testing.assert_close(
                buffer.float(), wanted.get_buffer(name).float(), rtol=0.02, atol=2e-3
            )


def network(channels):
    layers, incoming = [], 3
    for width in channels:
        layers += [nn.Conv2d(incoming, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        incoming = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(incoming, 5))


@pytest.mark.parametrize("form", ["paper", "own heads, equal", "own heads, fewer"])
def test_training_lowers_the_transfer_loss_and_moves_the_graphs_to_the_teachers(form):
    torch.manual_seed(0)
    channels = STUDENT if form == "own heads, fewer" else TEACHER
    teacher, student = network(TEACHER).eval().requires_grad_(False), network(channels)
    loss = GraphTransferLoss(
        TEACHER, 2, student_channels=None if form == "paper" else channels, squash="scaled"
    )
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
            student(images)
            teacher(images)
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
