"""Feature lists of any layout: channel axes, mappings, and vectors that rounding alone decides."""

from itertools import product

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from graph_kd import GraphTransferLoss, SVDFeature, align_singular_vectors

CHANNELS = (6, 8, 10)


def make(channels=CHANNELS, **settings):
    torch.manual_seed(0)
    return GraphTransferLoss(channels, 3, **settings).double()


def features(seed=0, batch=6, channels=CHANNELS):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, c, 4, 5) for c in channels]
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]


def last(maps):
    return [rearrange(m, "b c h w -> b h w c") for m in maps]


def volumes(maps):
    return [rearrange(m, "b c (t h) w -> b c t h w", t=2) for m in maps]


# Layouts.


@pytest.mark.parametrize("student_channels", [None, CHANNELS], ids=["paper", "own heads"])
@pytest.mark.parametrize(
    ("channel_dim", "teacher", "student"),
    [
        (-1, last, last),
        (3, last, last),
        ((None, -1), list, last),
        ((-1, None), last, list),
        ([-1, 1], last, list),
        (1, list, list),
        ((-1, None), last, volumes),
        (-1, lambda m: last(m), lambda m: [v.movedim(1, -1) for v in volumes(m)]),
    ],
)
def test_the_layout_of_the_maps_does_not_matter(channel_dim, teacher, student, student_channels):
    maps, targets = features(), features(seed=1)
    plain = make(student_channels=student_channels).eval()
    loss = make(student_channels=student_channels, channel_dim=channel_dim).eval()
    torch.testing.assert_close(loss(student(maps), teacher(targets)), plain(maps, targets))
    torch.testing.assert_close(loss.estimator_loss(teacher(targets)), plain.estimator_loss(targets))
    torch.testing.assert_close(
        loss.graphs(student(maps), align_to=teacher(targets)), plain.graphs(maps, align_to=targets)
    )


def test_tokens_and_vectors_keep_their_channels_last_whatever_channel_dim_says():
    tokens = [rearrange(m, "b c h w -> b (h w) c") for m in features()]
    vectors = [m[..., 0, 0] for m in features(seed=1)]
    for student in (tokens, vectors):
        wanted = make()(student, features(seed=2))
        torch.testing.assert_close(
            make(channel_dim=1)(student, features(seed=2)), wanted, rtol=1e-9, atol=0
        )


# Mappings.

equal = pytest.mark.parametrize("channels", [CHANNELS, (6, 6, 6)])


def shuffled(mapping):
    return {name: mapping[name] for name in ("b", "c", "a")}


@equal
def test_maps_come_in_any_iterable_and_those_of_mappings_are_paired_by_key(channels):
    loss = make(channels)
    maps = features(channels=channels), features(seed=1, channels=channels)
    wanted, graphs = loss(*maps), loss.graphs(maps[0], align_to=maps[1])
    assert torch.equal(loss(*map(iter, maps)), wanted)
    student, teacher = (dict(zip("abc", of_one, strict=True)) for of_one in maps)
    assert torch.equal(make(channels)(shuffled(student), teacher), wanted)
    for pair in product((student, shuffled(student)), (teacher, shuffled(teacher))):
        assert torch.equal(loss(*pair), wanted)
    aligned = loss.graphs(shuffled(student), align_to=shuffled(teacher))
    torch.testing.assert_close(aligned, graphs, rtol=0, atol=0)


@equal
def test_the_teacher_phase_sets_the_order_of_the_keys(channels):
    loss, maps = make(channels).eval(), features(channels=channels)
    named = dict(zip("abc", maps, strict=True))
    wanted = loss.estimator_loss(named)
    assert torch.equal(loss.estimator_loss(shuffled(named)), wanted)
    assert torch.equal(loss(shuffled(named), shuffled(named)), loss(maps, maps))


def test_neither_a_look_at_graphs_nor_refused_features_set_an_order():
    channels = (6, 6, 6)
    loss, maps = make(channels).eval(), features(channels=channels)
    named = dict(zip("abc", maps, strict=True))
    loss.graphs(shuffled(named))
    with pytest.raises(ValueError, match="must hold 3 tensors"):
        loss.estimator_loss({**shuffled(named), "logits": maps[0]})
    with pytest.raises(ValueError, match="must have 6 channels"):
        loss.estimator_loss({**shuffled(named), "c": maps[0][:, :5]})
    assert torch.equal(loss.estimator_loss(named), loss.estimator_loss(maps))


# Vectors of singular value zero.


def of_rank(rank, n, c, seed, batch=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(batch, n, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(batch, rank, c, generator=generator, dtype=torch.float64)
    return (left @ right).to(dtype)


@pytest.mark.parametrize("form", ["paper", "own heads"])
@pytest.mark.parametrize(("n", "c"), [(4, 16), (16, 4), (7, 7)])
@given(
    rank=st.integers(1, 3),
    k=st.integers(1, 4),
    seed=seeds,
    level=st.sampled_from([1e-17, 1e-16, 1e-15]),
)
def test_rounding_does_not_decide_the_loss(form, n, c, rank, k, seed, level):
    """Noise in the last digits of rank-deficient maps changes the loss in its last digits."""
    own = {} if form == "paper" else {"student_channels": (c, c)}
    loss = make((c, c), k=k, **own).eval()
    student, teacher = ([of_rank(rank, n, c, seed + s) for s in pair] for pair in ((0, 1), (2, 3)))
    torch.manual_seed(seed)
    noisy = [[m + level * torch.randn_like(m) for m in maps] for maps in (student, teacher)]
    assert abs(loss(*noisy) - loss(student, teacher)) < 1e-9


@pytest.mark.parametrize(("n", "c"), [(4, 16), (16, 4), (7, 7), (64, 32), (32, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_null_vector_is_chosen_only_where_there_is_no_other(n, c, dtype):
    """The teacher looks where the student has nothing: its closest candidate is a null vector."""
    loss = make((c, c)).to(dtype)
    student = of_rank(2, n, c, seed=0, dtype=dtype)
    null = SVDFeature(4)(student)[:, 3]
    vectors = SVDFeature(2)(student)
    teacher = rearrange(null + 0.1 * vectors[:, 1], "b c -> b 1 c")
    wanted = [align_singular_vectors(vectors, SVDFeature(1)(teacher))] * 2
    flat = [rearrange(v, "b 1 c -> b c") for v in wanted]
    torch.testing.assert_close(
        loss([student] * 2, [teacher] * 2), loss(flat, [teacher] * 2), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["paper", "own heads"])
def test_dead_maps_give_a_finite_loss_equal_nodes_and_no_gradient_of_their_own(form, dtype):
    own = {} if form == "paper" else {"student_channels": CHANNELS}
    loss = make(**own).to(dtype)
    student = [f.to(dtype) for f in features()]
    for maps in student:
        maps[2:4] = 0
        maps.requires_grad_()
    teacher = [f.to(dtype) for f in features(seed=1)]
    value = loss(student, teacher)
    assert value.isfinite()
    for graph in loss.graphs(student, align_to=teacher):  # they enter the heads as zeros
        torch.testing.assert_close(graph[:, 2], graph[:, 3])
        torch.testing.assert_close(graph[..., 2], graph[..., 3])
    for gradient in torch.autograd.grad(value, student):
        assert gradient.isfinite().all()
        assert not gradient[2:4].any()
        assert gradient[:2].any()


# Padding.


def test_padding_times_its_mask_changes_nothing():
    tokens = [torch.randn(6, 10, c, dtype=torch.float64) for c in CHANNELS]
    padding = torch.randn(1, 1, 1, dtype=torch.float64)
    padded = [torch.cat([t, padding.expand(6, 20, t.shape[2])], dim=1) for t in tokens]
    mask = torch.cat([torch.ones(6, 10), torch.zeros(6, 20)], dim=1)
    masked = [t * rearrange(mask, "b n -> b n 1") for t in padded]
    loss, teacher = make(), features()
    torch.testing.assert_close(loss(masked, teacher), loss(tokens, teacher))
    assert (loss(padded, teacher) - loss(tokens, teacher)).abs() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_does_not_choose_among_orthogonal_vectors(dtype):
    """Student and teacher have no live channel in common."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 6, 16, 4, 4, generator=generator, dtype=torch.float64)
    maps[0, :, 8:], maps[1, :, :8] = 0, 0
    student, teacher = ([m.to(dtype)] * 2 for m in maps)
    loss = make((16, 16)).to(dtype)
    level = 4 * torch.finfo(dtype).eps
    for _ in range(5):
        noisy = [m + level * torch.randn(m.shape, generator=generator).to(dtype) for m in student]
        tolerance = 1e-9 if dtype == torch.float64 else 1e-3
        assert abs(loss(noisy, teacher) - loss(student, teacher)) < tolerance
