"""Laws of the singular vectors: values, signs, invariances and gradients, and their alignment."""

import pytest
import reference
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from strategies import as_map, matrix_of, orthonormal, seeds

from graph_kd import GraphTransferLoss, SVDFeature, align_singular_vectors
from graph_kd._svd import top_singular_vectors

SHAPES = {"tall": (3, 3, 5), "wide": (2, 2, 7), "square": (3, 2, 6)}  # h, w, c
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def random_map(shape, batch=3, seed=0, dtype=torch.float64):
    h, w, c = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, c, h, w, generator=generator, dtype=dtype)


def built_map(shape, singular_values, seed=0):
    h, w, c = shape
    return as_map(matrix_of(singular_values, h * w, c, seed)[0], h, w)


def rows_of(features):
    return rearrange(features, "b c h w -> b (h w) c")


def vectors_and_gradient(k, features, target):
    features = features.detach().requires_grad_()
    vectors = SVDFeature(k)(features)
    (gradient,) = torch.autograd.grad((vectors * target).sum(), features)
    return vectors.detach(), gradient


def gradcheck(function, features):
    return torch.autograd.gradcheck(function, (features.requires_grad_(),))


@shapes
@pytest.mark.parametrize("k", [1, 2, 4])
@given(seed=seeds)
def test_equals_a_full_svd_with_canonical_signs(shape, k, seed):
    features = random_map(shape, seed=seed)
    wanted = reference.top_right_singular_vectors(rows_of(features), k)
    torch.testing.assert_close(SVDFeature(k)(features), wanted, rtol=0, atol=1e-6)


@shapes
@given(seed=seeds)
def test_vectors_turn_with_the_channels_and_not_with_the_positions(shape, seed):
    h, w, c = shape
    features, generator = random_map(shape, seed=seed), torch.Generator().manual_seed(seed)
    of_positions, of_channels = (orthonormal(n, n, generator) for n in (h * w, c))
    turned = as_map(of_positions @ rows_of(features) @ of_channels, h, w)
    cosine = (SVDFeature(4)(turned) * (SVDFeature(4)(features) @ of_channels)).sum(dim=-1)
    torch.testing.assert_close(cosine.abs(), torch.ones_like(cosine), rtol=0, atol=1e-7)


@shapes
@given(seed=seeds, k=st.integers(1, 4), rank=st.integers(0, 4))
def test_rows_are_orthonormal_whatever_the_rank(shape, seed, k, rank):
    vectors = SVDFeature(k)(built_map(shape, [2.0**-r for r in range(rank)], seed))
    torch.testing.assert_close(
        vectors @ vectors.mT, torch.eye(k, dtype=torch.float64)[None], rtol=0, atol=1e-9
    )


@precisions
@pytest.mark.parametrize("shape", [(3, 3, 5), (2, 2, 7), (8, 8, 24), (4, 5, 40)])
@pytest.mark.parametrize("scale", [1e-15, 1e-10, 1e-7, 1e-3, 1e3, 1e6, 6e8, 1e9, 1e12, 1e15])
def test_positive_scale_does_not_matter_and_its_gradient_is_inverse(shape, dtype, scale):
    features = built_map(shape, [1.3**-i for i in range(4)]).to(dtype)
    target = torch.randn(4, shape[2], dtype=dtype, generator=torch.Generator().manual_seed(1))
    vectors, gradient = vectors_and_gradient(4, features, target)
    scaled_vectors, scaled_gradient = vectors_and_gradient(4, features * scale, target)
    torch.testing.assert_close(scaled_vectors, vectors, rtol=0, atol=2e-5)
    torch.testing.assert_close(scaled_gradient * scale, gradient, rtol=2e-3, atol=1e-4)


@given(seed=seeds)
def test_samples_do_not_see_each_other(seed):
    features = random_map((3, 3, 5), batch=4, seed=seed)
    features[2] = 0
    target = torch.arange(5)
    together = vectors_and_gradient(2, features, target)
    one_by_one = [vectors_and_gradient(2, feature[None], target) for feature in features]
    for ours, wanted in zip(together, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.cat(wanted))


@pytest.mark.parametrize(
    ("shape", "channel_dim", "rows"),
    [
        ((2, 5, 3, 4), None, "b c h w -> b (h w) c"),
        ((2, 5, 3, 2, 2), None, "b c t h w -> b (t h w) c"),
        ((2, 7, 5), None, "b n c -> b n c"),
        ((2, 5), None, "b c -> b 1 c"),  # one position: the vector itself, normalised
        ((2, 3, 4, 5), -1, "b h w c -> b (h w) c"),
        ((2, 5, 7), 1, "b c n -> b n c"),
    ],
)
def test_channels_are_where_the_rank_or_channel_dim_says(shape, channel_dim, rows):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = reference.top_right_singular_vectors(rearrange(features, rows), 1)
    torch.testing.assert_close(SVDFeature(channel_dim=channel_dim)(features), wanted)


@precisions
@pytest.mark.parametrize("shape", [(64, 24), (12, 40), (12, 8)])
def test_vectors_of_an_exactly_centred_map_have_unit_length(shape, dtype):
    half = torch.randint(-8, 9, (3, *shape), generator=torch.Generator().manual_seed(0)).to(dtype)
    vectors = SVDFeature(4)(torch.cat([half, -half], dim=1))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3, 4, dtype=dtype))


def test_settings_are_shown():
    assert repr(SVDFeature(2, channel_dim=-1)) == "SVDFeature(k=2, channel_dim=-1)"


# Gradients.


@shapes
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("dead_channels", [False, True])
def test_gradient_is_the_derivative(shape, k, dead_channels):
    features = random_map(shape, batch=2)
    if dead_channels:
        features = features.relu()
        features[:, 1] = 0
    assert gradcheck(SVDFeature(k), features)


@pytest.mark.parametrize("shape", [(3, 2, 4), (2, 2, 7), (2, 3, 6)])
@pytest.mark.parametrize(
    ("k", "values"),
    [(1, [3.0]), (2, [3.0, 2.0, 1.0, 1.0]), (4, [3.0, 2.0, 1.0, 0.5])],
    ids=["no other", "equal others", "the smallest one too"],
)
def test_gradient_is_the_derivative_whatever_the_other_values(shape, k, values):
    assert gradcheck(SVDFeature(k), built_map(shape, values))


@pytest.mark.parametrize(
    ("shape", "values", "plane"),
    [
        ((3, 2, 5), [3.0, 2.0, 2.0, 1.0], slice(1, 3)),
        ((2, 3, 8), [3.0, 2.0, 2.0, 1.0], slice(1, 3)),
        ((2, 3, 6), [3.0, 2.0, 2.0, 1.0], slice(1, 3)),
        ((3, 2, 3), [3.0, 2.0], slice(2, 3)),  # a null vector that the others leave no choice
    ],
)
def test_equal_values_have_the_derivative_of_their_plane(shape, values, plane):
    def projector(x):
        vectors = SVDFeature(3)(x)[:, plane]
        return vectors.mT @ vectors  # does not depend on how the vectors of the plane are turned

    assert gradcheck(projector, built_map(shape, values))


def test_no_gradient_of_a_null_vector_that_is_one_of_many():
    features = built_map((2, 2, 7), [3.0, 2.0]).requires_grad_()
    SVDFeature(3)(features)[:, 2].sum().backward()
    assert not features.grad.any()


@pytest.mark.parametrize(("roundings", "resolved"), [(4, True), (0.125, False)])
def test_what_rounding_the_input_could_exchange_has_no_gradient(roundings, resolved):
    n, c = 64, 16
    gap = roundings * torch.finfo(torch.float32).eps * (n**0.5 + c**0.5) / (n * c) ** 0.5
    matrix, right = matrix_of([1.0, 1.0 - gap, 0.3, 0.2], n, c)
    features = as_map(matrix, 8, 8).float().requires_grad_()
    vectors = SVDFeature(1)(features)
    (vectors @ right[:, :2].sum(dim=1)[..., None].float()).sum().backward()
    assert bool(features.grad.norm() * gap > 0.1) is resolved


@shapes
@precisions
@pytest.mark.parametrize(
    "kind", ["zero", "constant", "duplicate channels", "identity", "tiny", "huge"]
)
def test_value_and_gradient_are_finite_where_the_derivative_is_not_defined(shape, dtype, kind):
    h, w, c = shape
    random = random_map(shape, dtype=dtype)
    features = {
        "zero": torch.zeros_like(random),
        "constant": torch.ones_like(random),
        "duplicate channels": random[:, :1].expand_as(random),
        "identity": as_map(torch.eye(h * w, c, dtype=dtype).expand(3, -1, -1), h, w),
        "tiny": random * torch.finfo(dtype).tiny,
        "huge": random / random.abs().max() * torch.finfo(dtype).max,
    }[kind]
    vectors, gradient = vectors_and_gradient(4, features, torch.ones(c))
    assert vectors.dtype == dtype
    gram = vectors @ vectors.mT
    torch.testing.assert_close(gram, torch.eye(4, dtype=dtype).expand_as(gram), rtol=0, atol=1e-5)
    assert gradient.isfinite().all()
    if kind in ("zero", "tiny"):
        assert not gradient.any()


@pytest.mark.parametrize("capturable", [False, True])
@precisions
def test_gradient_can_not_be_differentiated_again(dtype, capturable):
    """What weighs the vectors is no constant of their gradient."""
    rows = rows_of(random_map((3, 3, 5), dtype=dtype)).requires_grad_()
    (found,) = top_singular_vectors([rows], [1], ["map"], capturable=capturable)
    weight = torch.ones((), dtype=dtype, requires_grad=True)
    loss = (weight * found.vectors()[..., 0]).sum()
    (gradient,) = torch.autograd.grad(loss, rows, create_graph=True)
    for tensor in (rows, weight):
        with pytest.raises(RuntimeError, match="SVDFeature can not be differentiated again"):
            torch.autograd.grad(gradient.square().sum(), tensor)


@halves
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize("steep", [False, True])
def test_half_precision_comes_in_and_float32_goes_out(dtype, autocast, scale, steep):
    """Small maps are not taken for zero, whether float32 suffices for them or not."""
    features = random_map((4, 4, 6))
    features = features[:, :1] * torch.arange(1, 7)[:, None, None] if steep else features
    features = (features * scale).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        vectors = SVDFeature(2)(features)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, SVDFeature(2)(features.detach().float()))
    vectors[:, 0, 0].sum().backward()
    assert features.grad.dtype == dtype
    assert features.grad.any()


@halves
@pytest.mark.parametrize("kind", ["dense", "nearly dead"])
@pytest.mark.parametrize("scale", [1e-6, 2e-7])
def test_gradient_of_maps_near_the_smallest_number_of_float16_is_finite(dtype, kind, scale):
    features = random_map((4, 4, 8)) * scale
    if kind == "nearly dead":
        features[:, :, :, 1:] = features[:, :, 1:] = 0
    vectors, gradient = vectors_and_gradient(1, features.to(dtype), torch.arange(8.0))
    assert vectors.any()
    assert gradient.isfinite().all()


@halves
@pytest.mark.parametrize("shape", [(3, 3, 6), (2, 2, 7)])
def test_gradient_is_finite_at_the_rank_that_rounding_to_half_makes(dtype, shape):
    h, w, c = shape
    generator = torch.Generator().manual_seed(0)
    columns = torch.rand(200, c, 1, 1, generator=generator)
    features = (columns * torch.rand(200, 1, h, w, generator=generator)).to(dtype)
    _, gradient = vectors_and_gradient(4, features, torch.randn(200, 4, c, generator=generator))
    assert gradient.isfinite().all()


# Alignment.


@given(seed=seeds, k_teacher=st.integers(1, 3))
def test_alignment_equals_the_loops(seed, k_teacher):
    generator = torch.Generator().manual_seed(seed)
    student = torch.stack([orthonormal(4, 6, generator) for _ in range(5)])
    teacher = torch.stack([orthonormal(k_teacher, 6, generator) for _ in range(5)])
    aligned = align_singular_vectors(student, teacher)
    torch.testing.assert_close(aligned, reference.align(student, teacher))


@pytest.mark.parametrize(
    ("teacher", "null", "chosen"),
    [
        ([0.0, 0.0, 0.0, 1.0], [False, False], 0),
        ([0.6, 0.6, 0.0, 0.0], [False, False], 0),
        ([-1e-13, 2e-13, 0.0, 1.0], [False, False], 0),
        ([0.0, 0.0, 0.0, 1.0], [True, False], 1),
        ([0.0, 0.0, 0.0, 1.0], [True, True], 0),
        ([0.0, 1e-10, 0.0, 1.0], [False, False], 1),
    ],
    ids=["orthogonal", "tie", "but for rounding", "first is null", "all are null", "close"],
)
def test_alignment_takes_the_closest_vector_else_the_first_that_is_not_null(teacher, null, chosen):
    axes = torch.eye(4, dtype=torch.float64)[None]
    teacher, null = torch.tensor([[teacher]], dtype=torch.float64), torch.tensor([null])
    aligned = align_singular_vectors(axes[:, :2], teacher, null=null)
    torch.testing.assert_close(aligned, axes[:, chosen : chosen + 1])


def test_alignment_gives_gradient_to_the_chosen_student_vector_alone():
    student = torch.eye(4)[None, :2].clone().requires_grad_()
    teacher = torch.tensor([[[0.1, -0.9, 0.0, 0.0]]], requires_grad=True)
    align_singular_vectors(student, teacher).sum().backward()
    assert teacher.grad is None
    wanted = torch.stack([torch.zeros(4), -torch.ones(4)])[None]
    torch.testing.assert_close(student.grad, wanted)


def test_the_choice_of_a_vector_is_made_in_the_higher_precision_of_the_two():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(800, 1, 8, generator=generator, dtype=torch.float64)
    student = torch.randn(800, 4, 8, generator=generator).bfloat16()
    wanted = align_singular_vectors(student.double(), teacher)
    assert torch.equal(align_singular_vectors(student, teacher).double(), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # Autocast leaves float64 alone: both have to be float32.
        aligned = align_singular_vectors(student.float(), teacher.float())
    assert torch.equal(aligned.double(), wanted)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("student_channels", [None, (8, 8)], ids=["paper", "own heads"])
def test_a_sample_without_a_vector_is_no_error_at_a_point_of_few_candidates(
    student_channels, capturable
):
    """Points with fewer candidates than others are padded; the padding is never chosen."""
    maps = [torch.randn(4, 8, 3, 3), torch.randn(4, 8, 2, 1)]
    students = [m.clone() for m in maps]
    students[1][2] = 0
    settings = {"student_channels": student_channels, "capturable": capturable}
    assert GraphTransferLoss([8, 8], num_heads=1, **settings)(students, maps).isfinite()


# Refusals.

EMPTY = [(2, 0, 3, 3), (2, 3, 0, 3), (2, 0, 4), (2, 4, 0)]


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((3,), {}, r"`features` must have axes .* got shape \(3,\)"),
        ((1, 1, 2, 2, 2, 2), {}, r"`features` must have axes .*1, 1, 2, 2, 2, 2"),
        *[(s, {}, r"`features` .*one position and one channel; got shape \(2, .") for s in EMPTY],
        ((2, 3, 1, 1), {"k": 2}, r"`k` must be at most .* = 1 for `features`; got 2"),
        *[((2, 3, 4, 4), {"channel_dim": axis}, r"`channel_dim` must name an axis of `features` o")
          for axis in (0, -4, 4)],
    ],
)  # fmt: skip
def test_rejects_features_that_do_not_fit(shape, settings, message):
    with pytest.raises(ValueError, match=message):
        SVDFeature(**settings)(torch.ones(shape))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [4, 24])
def test_features_that_are_not_finite_are_refused_beside_a_steep_map(bad, dtype, channels):
    features = torch.randn(3, channels, 8, 5).to(dtype)
    features[0, 0] *= 100
    features[1, 2, 3, 4] = bad
    with pytest.raises(ValueError, match=r"`features` must be finite; .*in 1 of 3 .*first is 1\)"):
        SVDFeature(2)(features)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((2, 4, 5), (2, 1, 6)), ((2, 4, 5), (3, 1, 5)), ((2, 4, 5), (2, 1, 5, 1)),
     ((2, 4, 5, 1), (2, 1, 5)), ((2, 5), (2, 1, 5))],
)  # fmt: skip
def test_rejects_vectors_that_do_not_pair_up(student, teacher):
    message = r"`student` and `teacher` must have axes \(b, i, c\) and \(b, k, c\).*\(2, "
    with pytest.raises(ValueError, match=message):
        align_singular_vectors(torch.ones(student), torch.ones(teacher))
