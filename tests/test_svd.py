"""Laws of the singular vectors: values, signs, invariances and gradients."""

import pytest
import reference
import torch
from einops import rearrange, reduce
from hypothesis import given
from hypothesis import strategies as st
from strategies import as_map, decaying_values, matrix_of, orthonormal, seeds

from graph_kd import SVDFeature, align_singular_vectors

SHAPES = {"tall": (3, 3, 5), "wide": (2, 2, 7), "square": (3, 2, 6)}  # h, w, c
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def random_map(shape, batch=3, seed=0, dtype=torch.float64):
    h, w, c = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, c, h, w, generator=generator, dtype=dtype)


def rows_of(features):
    return rearrange(features, "b c h w -> b (h w) c")


def mean_side(vectors, features):
    return (vectors @ reduce(features, "b c h w -> b c 1", "mean"))[..., 0]


@shapes
@pytest.mark.parametrize("k", [1, 2, 4])
@given(seed=seeds)
def test_equals_a_full_svd_with_canonical_signs(shape, k, seed):
    features = random_map(shape, seed=seed)
    wanted = reference.top_right_singular_vectors(rows_of(features), k)
    torch.testing.assert_close(SVDFeature(k)(features), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 4, 9), (3, 3, 20)])
@given(values=decaying_values(4), seed=seeds)
def test_known_vectors_of_a_built_matrix(shape, values, seed):
    h, w, c = shape
    matrix, right = matrix_of(values, h * w, c, seed)
    vectors = SVDFeature(4)(as_map(matrix, h, w))
    cosine = (vectors * right).sum(dim=-1)
    torch.testing.assert_close(cosine.abs(), torch.ones_like(cosine), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(8, 8, 16), (4, 4, 32)])
def test_float32_resolves_values_a_float32_gram_matrix_would_lose(shape):
    h, w, c = shape
    matrix, right = matrix_of([1.0, 1e-2, 1e-3, 5e-4], h * w, c)
    cosine = (SVDFeature(4)(as_map(matrix, h, w).float()) * right).sum(dim=-1).abs()
    assert (1 - cosine).max() < 1e-6


@shapes
@given(seed=seeds, k=st.integers(1, 4), rank=st.integers(0, 4))
def test_rows_are_orthonormal_whatever_the_rank(shape, seed, k, rank):
    h, w, c = shape
    features = as_map(matrix_of([2.0**-r for r in range(rank)], h * w, c, seed)[0], h, w)
    vectors = SVDFeature(k)(features)
    torch.testing.assert_close(
        vectors @ vectors.mT, torch.eye(k, dtype=torch.float64)[None], rtol=0, atol=1e-9
    )


@shapes
@given(seed=seeds)
def test_mean_position_is_on_the_positive_side(shape, seed):
    features = random_map(shape, seed=seed)
    assert mean_side(SVDFeature(4)(features), features).min() >= 0


@shapes
@given(seed=seeds)
def test_negating_a_map_negates_its_vectors(shape, seed):
    features = random_map(shape, seed=seed)
    torch.testing.assert_close(SVDFeature(4)(-features), -SVDFeature(4)(features))


@shapes
@given(seed=seeds)
def test_order_of_positions_does_not_matter(shape, seed):
    features = random_map(shape, seed=seed)
    h, w, _ = shape
    order = torch.randperm(h * w, generator=torch.Generator().manual_seed(seed))
    shuffled = as_map(rows_of(features)[:, order], h, w)
    torch.testing.assert_close(SVDFeature(4)(shuffled), SVDFeature(4)(features))


@shapes
@given(seed=seeds)
def test_rotation_of_positions_changes_no_more_than_signs(shape, seed):
    h, w, _ = shape
    features = random_map(shape, seed=seed)
    rotation = orthonormal(h * w, h * w, torch.Generator().manual_seed(seed))
    rotated = as_map(rotation @ rows_of(features), h, w)
    cosine = (SVDFeature(4)(rotated) * SVDFeature(4)(features)).sum(dim=-1)
    torch.testing.assert_close(cosine.abs(), torch.ones_like(cosine), rtol=0, atol=1e-7)


@shapes
@given(seed=seeds)
def test_rotation_of_channels_rotates_the_vectors(shape, seed):
    c = shape[2]
    features = random_map(shape, seed=seed)
    rotation = orthonormal(c, c, torch.Generator().manual_seed(seed))
    rotated = torch.einsum("b c h w, c d -> b d h w", features, rotation)
    torch.testing.assert_close(SVDFeature(4)(rotated), SVDFeature(4)(features) @ rotation)


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e3, 1e15])
def test_positive_scale_does_not_matter_and_its_gradient_is_inverse(shape, dtype, scale):
    features = random_map(shape, dtype=dtype).requires_grad_()
    scaled = (features.detach() * scale).requires_grad_()
    target = torch.randn(3, 4, shape[2], dtype=dtype, generator=torch.Generator().manual_seed(1))
    vectors, scaled_vectors = SVDFeature(4)(features), SVDFeature(4)(scaled)
    torch.testing.assert_close(scaled_vectors, vectors, rtol=0, atol=2e-5)
    (gradient,) = torch.autograd.grad((vectors * target).sum(), features)
    (scaled_gradient,) = torch.autograd.grad((scaled_vectors * target).sum(), scaled)
    torch.testing.assert_close(scaled_gradient * scale, gradient, rtol=2e-3, atol=1e-4)


@given(seed=seeds)
def test_samples_do_not_see_each_other(seed):
    features = random_map((3, 3, 5), batch=4, seed=seed)
    one_by_one = torch.cat([SVDFeature(2)(feature[None]) for feature in features])
    torch.testing.assert_close(SVDFeature(2)(features), one_by_one)


def gradcheck(k, features):
    return torch.autograd.gradcheck(SVDFeature(k), (features.requires_grad_(),))


@shapes
@pytest.mark.parametrize("k", [1, 4])
def test_gradient_is_the_derivative(shape, k):
    assert gradcheck(k, random_map(shape, batch=2))


@shapes
@pytest.mark.parametrize("k", [1, 4])
def test_gradient_is_the_derivative_with_dead_channels(shape, k):
    features = random_map(shape, batch=2).relu()
    features[:, 1] = 0
    assert gradcheck(k, features)


@pytest.mark.parametrize("shape", [(3, 2, 5), (2, 2, 7)])
def test_gradient_is_the_derivative_at_rank_one(shape):
    h, w, c = shape
    assert gradcheck(1, as_map(matrix_of([3.0], h * w, c)[0], h, w))


@pytest.mark.parametrize("shape", [(3, 2, 5), (2, 3, 8), (2, 3, 6)])
def test_gradient_is_the_derivative_with_repeated_values_behind_it(shape):
    h, w, c = shape
    assert gradcheck(2, as_map(matrix_of([3.0, 2.0, 1.0, 1.0], h * w, c)[0], h, w))


@pytest.mark.parametrize("shape", [(3, 2, 5), (2, 3, 8), (2, 3, 6)])
def test_repeated_returned_values_give_the_derivative_of_their_plane(shape):
    h, w, c = shape
    features = as_map(matrix_of([3.0, 2.0, 2.0, 1.0], h * w, c)[0], h, w)

    def projector(x):
        plane = SVDFeature(3)(x)[:, 1:]
        return plane.mT @ plane  # does not depend on how the plane's vectors are turned

    assert torch.autograd.gradcheck(projector, (features.requires_grad_(),))


@pytest.mark.parametrize("shape", [(3, 2, 4), (2, 2, 4)])
def test_gradient_of_the_smallest_vector_at_full_rank(shape):
    h, w, c = shape
    matrix, _ = matrix_of([3.0, 2.0, 1.0, 0.5], h * w, c)
    assert gradcheck(4, as_map(matrix, h, w))


def test_gradient_of_a_null_vector_that_the_others_leave_no_choice():
    features = as_map(matrix_of([3.0, 2.0], 6, 3)[0], 3, 2).requires_grad_()

    def plane(x):
        null = SVDFeature(3)(x)[:, 2:]
        return null.mT @ null  # does not depend on the sign

    assert torch.autograd.gradcheck(plane, (features,))


def test_no_gradient_of_a_null_vector_that_is_one_of_many():
    features = as_map(matrix_of([3.0, 2.0], 4, 7)[0], 2, 2).requires_grad_()
    vectors = SVDFeature(3)(features)
    (gradient,) = torch.autograd.grad(vectors[:, 2].sum(), features)
    assert not gradient.any()


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "kind", ["zero", "constant", "rank one", "duplicate channels", "identity", "tiny", "huge"]
)
def test_value_and_gradient_are_finite_where_the_derivative_is_not_defined(shape, dtype, kind):
    h, w, c = shape
    random = random_map(shape, dtype=dtype)
    features = {
        "zero": torch.zeros_like(random),
        "constant": torch.ones_like(random),
        "rank one": random[:, :1] * random[:1, :, :1, :1],
        "duplicate channels": random[:, :1].expand_as(random),
        "identity": as_map(torch.eye(h * w, c, dtype=dtype).expand(3, -1, -1), h, w),
        "tiny": random * torch.finfo(dtype).tiny,
        "huge": random / random.abs().max() * torch.finfo(dtype).max,
    }[kind]
    features = features.clone().requires_grad_()
    vectors = SVDFeature(4)(features)
    assert vectors.dtype == dtype
    gram = vectors @ vectors.mT
    torch.testing.assert_close(gram, torch.eye(4, dtype=dtype).expand_as(gram), rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(vectors.square().sum() + vectors.sum(), features)
    assert gradient.isfinite().all()
    if kind in ("zero", "tiny"):
        assert not gradient.any()


def test_zero_maps_do_not_disturb_their_neighbours():
    features = random_map((3, 3, 5)).requires_grad_()
    alone = features.detach()[:2].clone().requires_grad_()
    with_zero = torch.cat([features[:2], torch.zeros_like(features[:1])])
    target = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad((SVDFeature(2)(with_zero) @ target).sum(), features)
    (wanted,) = torch.autograd.grad((SVDFeature(2)(alone) @ target).sum(), alone)
    torch.testing.assert_close(gradient[:2], wanted)
    assert not gradient[2].any()


def test_gradient_can_not_be_differentiated_again():
    features = random_map((3, 3, 5)).requires_grad_()
    (gradient,) = torch.autograd.grad(SVDFeature(1)(features).sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="SVDFeature can not be differentiated again"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_weighs_the_vectors_is_no_constant_of_their_gradient(dtype):
    features = random_map((3, 3, 5)).to(dtype).requires_grad_()
    weight = torch.ones((), dtype=dtype, requires_grad=True)
    loss = (weight * SVDFeature(1)(features)[..., 0]).sum()
    (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError, match="SVDFeature can not be differentiated again"):
        torch.autograd.grad(gradient.square().sum(), weight)


@pytest.mark.parametrize(
    ("shape", "channel_dim", "rows"),
    [
        ((2, 5, 3, 4), None, "b c h w -> b (h w) c"),
        ((2, 5, 3, 2, 2), None, "b c t h w -> b (t h w) c"),
        ((2, 7, 5), None, "b n c -> b n c"),
        ((2, 5), None, "b c -> b 1 c"),
        ((2, 3, 4, 5), -1, "b h w c -> b (h w) c"),
        ((2, 5, 7), 1, "b c n -> b n c"),
    ],
)
def test_channels_are_where_the_rank_or_channel_dim_says(shape, channel_dim, rows):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = reference.top_right_singular_vectors(rearrange(features, rows), 1)
    torch.testing.assert_close(SVDFeature(channel_dim=channel_dim)(features), wanted)


def test_one_position_is_the_normalised_vector():
    features = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    wanted = torch.nn.functional.normalize(features, dim=1)
    torch.testing.assert_close(SVDFeature()(features)[:, 0], wanted)


@pytest.mark.parametrize("scale", [1e-10, 1.0])
def test_gradient_at_one_position_is_that_of_the_normalisation(scale):
    generator = torch.Generator().manual_seed(0)
    features = (scale * torch.randn(4, 7, generator=generator)).requires_grad_()
    target = torch.randn(4, 7, generator=generator)
    normalised = torch.nn.functional.normalize(features, dim=1, eps=0)
    (wanted,) = torch.autograd.grad((normalised * target).sum(), features)
    (gradient,) = torch.autograd.grad((SVDFeature()(features)[:, 0] * target).sum(), features)
    torch.testing.assert_close(gradient * scale, wanted * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(64, 24), (12, 40), (12, 8)])
def test_vectors_of_an_exactly_centred_map_have_unit_length(shape, dtype):
    half = torch.randint(-8, 9, (3, *shape), generator=torch.Generator().manual_seed(0)).to(dtype)
    vectors = SVDFeature(4)(torch.cat([half, -half], dim=1))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3, 4, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_comes_in_and_float32_goes_out(dtype, autocast):
    features = random_map((4, 4, 6)).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        vectors = SVDFeature(2)(features)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, SVDFeature(2)(features.detach().float()))
    vectors.sum().backward()
    assert features.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1e-5])
def test_small_half_precision_maps_are_not_taken_for_zero(dtype, scale):
    features = (random_map((4, 4, 6)) * scale).to(dtype).requires_grad_()
    vectors = SVDFeature(2)(features)
    torch.testing.assert_close(vectors, SVDFeature(2)(features.detach().float()))
    vectors[:, 0].sum().backward()
    assert features.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 3, 6), (2, 2, 7)])
def test_gradient_is_finite_at_the_rank_that_rounding_to_half_makes(dtype, shape):
    h, w, c = shape
    generator = torch.Generator().manual_seed(0)
    columns = torch.rand(200, c, 1, 1, generator=generator)
    features = (columns * torch.rand(200, 1, h, w, generator=generator)).to(dtype).requires_grad_()
    vectors = SVDFeature(4)(features)
    (vectors * torch.randn(vectors.shape, generator=generator)).sum().backward()
    assert features.grad.isfinite().all()


def test_memory_format_does_not_matter():
    features = random_map((4, 4, 6))
    channels_last = features.to(memory_format=torch.channels_last)
    torch.testing.assert_close(SVDFeature(2)(channels_last), SVDFeature(2)(features))


# torch.compile itself makes a Function object to trace one.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_to_one_graph_with_the_same_gradient():
    torch._dynamo.reset()
    features = random_map((4, 4, 6)).requires_grad_()
    compiled = torch.compile(SVDFeature(4), fullgraph=True, backend="aot_eager")
    (wanted,) = torch.autograd.grad(SVDFeature(4)(features).sum(), features)
    (gradient,) = torch.autograd.grad(compiled(features).sum(), features)
    torch.testing.assert_close(gradient, wanted)


@given(seed=seeds, k_teacher=st.integers(1, 3))
def test_alignment_equals_the_loops(seed, k_teacher):
    generator = torch.Generator().manual_seed(seed)
    student = torch.stack([orthonormal(4, 6, generator) for _ in range(5)])
    teacher = torch.stack([orthonormal(k_teacher, 6, generator) for _ in range(5)])
    aligned = align_singular_vectors(student, teacher)
    torch.testing.assert_close(aligned, reference.align(student, teacher))
    assert (aligned * teacher).sum(dim=-1).min() >= 0


def test_alignment_undoes_order_and_sign_of_the_student():
    generator = torch.Generator().manual_seed(0)
    teacher = orthonormal(4, 6, generator)[None]
    turned = teacher[:, [2, 0, 3, 1]] * torch.tensor([1.0, -1.0, -1.0, 1.0])[:, None]
    torch.testing.assert_close(align_singular_vectors(turned, teacher), teacher)


def test_alignment_keeps_unit_rows_at_a_cosine_of_zero_and_at_ties():
    axes = torch.eye(4)[None]
    orthogonal = align_singular_vectors(axes[:, :2], axes[:, 3:])
    torch.testing.assert_close(orthogonal, axes[:, :1])
    tied = align_singular_vectors(axes[:, :2], torch.tensor([[[0.6, 0.6, 0.0, 0.0]]]))
    torch.testing.assert_close(tied, axes[:, :1])


def test_alignment_does_not_choose_by_what_rounding_left():
    axes = torch.eye(4, dtype=torch.float64)[None]
    teacher = torch.tensor([[[-1e-13, 2e-13, 0.0, 1.0]]], dtype=torch.float64)
    torch.testing.assert_close(align_singular_vectors(axes[:, :2], teacher), axes[:, :1])


@pytest.mark.parametrize(("null", "chosen"), [([True, False], 1), ([True, True], 0)])
def test_alignment_chooses_a_null_vector_only_where_there_is_no_other(null, chosen):
    axes = torch.eye(4)[None]
    aligned = align_singular_vectors(axes[:, :2], axes[:, 3:], null=torch.tensor([null]))
    torch.testing.assert_close(aligned, axes[:, chosen : chosen + 1])


def test_alignment_gives_gradient_to_the_chosen_student_vector_alone():
    student = torch.eye(4)[None, :2].clone().requires_grad_()
    teacher = torch.tensor([[[0.1, -0.9, 0.0, 0.0]]], requires_grad=True)
    align_singular_vectors(student, teacher).sum().backward()
    assert teacher.grad is None
    wanted = torch.stack([torch.zeros(4), -torch.ones(4)])[None]
    torch.testing.assert_close(student.grad, wanted)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ([1.0], TypeError, r"`features` must be a tensor; got list"),
        (torch.ones(2, 3, 4, 4, dtype=torch.int64), TypeError, r"`features` .*got torch.int64"),
        (torch.ones(3), ValueError, r"`features` must have axes .* got shape \(3,\)"),
        (torch.ones(1, 1, 2, 2, 2, 2), ValueError, r"`features` must have axes .*1, 1, 2, 2, 2, 2"),
        (torch.ones(2, 4, 0, 3), ValueError, r"`features` .* at least one position .*\(2, 4, 0, 3"),
        (torch.ones(2, 3, 1, 1), ValueError, r"`k` must be at most .* = 1 for `features`; got 2"),
        (torch.full((2, 3, 4, 4), torch.nan), ValueError, r"`features` must be finite; .* 2 of 2"),
        (torch.full((2, 3, 4, 4), torch.inf), ValueError, r"`features` must be finite"),
    ],
)
def test_rejects_features_that_do_not_fit(features, error, message):
    with pytest.raises(error, match=message):
        SVDFeature(k=2)(features)


@pytest.mark.parametrize("channel_dim", [0, -4, 4])
def test_rejects_a_channel_dim_that_is_none(channel_dim):
    with pytest.raises(ValueError, match=r"`channel_dim` must name an axis of `features` other"):
        SVDFeature(channel_dim=channel_dim)(torch.ones(2, 3, 4, 4))


def test_rejects_k_that_is_no_count():
    with pytest.raises(ValueError, match=r"`k` must be an int ≥ 1; got 0"):
        SVDFeature(k=0)
    with pytest.raises(TypeError, match=r"`k` must be an int; got 1.5"):
        SVDFeature(k=1.5)


def test_rejects_vectors_that_do_not_pair_up():
    with pytest.raises(ValueError, match=r"`student` and `teacher` must have axes .*\(2, 4, 5\)"):
        align_singular_vectors(torch.ones(2, 4, 5), torch.ones(2, 1, 6))
    for shapes in [((2, 4, 5, 1), (2, 1, 5)), ((2, 4, 5), (2, 1, 5, 1)), ((2, 5), (2, 1, 5))]:
        with pytest.raises(ValueError, match=r"must have axes \(b, i, c\) and \(b, k, c\)"):
            align_singular_vectors(*map(torch.ones, shapes))
    with pytest.raises(TypeError, match=r"`teacher` must be a tensor"):
        align_singular_vectors(torch.ones(2, 4, 5), None)


def test_settings_are_shown():
    assert repr(SVDFeature(2, channel_dim=-1)) == "SVDFeature(k=2, channel_dim=-1)"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_features_that_are_not_finite_are_refused_in_every_precision(bad, dtype):
    features = torch.randn(3, 4, 5, 5).to(dtype)
    features[1, 2, 3, 4] = bad
    with pytest.raises(ValueError, match=r"`features` must be finite; .*in 1 of 3 .*first is 1\)"):
        SVDFeature()(features)


@pytest.mark.parametrize("shape", [(2, 0, 3, 3), (2, 3, 0, 3), (2, 0, 4), (2, 4, 0)])
def test_features_without_a_position_or_a_channel_are_refused(shape):
    with pytest.raises(ValueError, match=r"at least one position and one channel; got shape \(2,"):
        SVDFeature()(torch.ones(shape))


def test_the_choice_of_a_vector_is_made_in_the_higher_precision_of_the_two():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        teacher = torch.randn(4, 1, 8, generator=generator, dtype=torch.float64)
        student = torch.randn(4, 4, 8, generator=generator).bfloat16()
        wanted = align_singular_vectors(student.double(), teacher)
        assert torch.equal(align_singular_vectors(student, teacher).double(), wanted)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            # Autocast leaves float64 alone: both have to be float32.
            aligned = align_singular_vectors(student.float(), teacher.float())
        assert torch.equal(aligned.double(), wanted)
