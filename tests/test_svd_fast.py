"""Laws of the subspace iteration: as good as float64 where singular values are isolated.

It has two forms. The CPU filters as often as the maps need. Other devices, and a loss with
capturable=True, filter twice; that form is tested here on the CPU.

Maps are rows ``b n c``, a batch of n positions each.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import matrix_of, seeds

from graph_kd import SVDFeature, _leading, _svd
from graph_kd._svd import top_singular_vectors


def falling(ratio, count):
    return [ratio**-i for i in range(count)]


# Sensing points of the paper's networks: n, c.
POINTS = [(256, 64), (64, 128), (16, 256), (4, 512), (64, 256)]
SPECTRA = {
    "slow": falling(1.015, 64),
    "fast": [0.4 ** min(i, 8) for i in range(64)],
    "plateau": [1.02 ** -min(i, 4) for i in range(64)],
    "threes, 1.1 % apart": [1.5 ** -(i // 3) * 1.011 ** -(i % 3) for i in range(64)],
    "one dominates": [10.0, *falling(1.02, 63)],
}
points = pytest.mark.parametrize("point", POINTS, ids=str)
forms = pytest.mark.parametrize("capturable", [False, True], ids=["CPU", "capturable"])
both_sides = pytest.mark.parametrize("shape", [(40, 16), (16, 40)], ids=str)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relu_noise(n, c, batch=4, seed=0):
    """Return what a convolution gives, laid out as its maps are."""
    return noise(batch, c, n, seed=seed).relu().mT


def with_values(values, n, c, count=1):
    """Return maps of given singular values that differ in their vectors."""
    values = values[: min(n, c)]
    return torch.cat([matrix_of(values, n, c, seed)[0] for seed in range(count)]).float()


def isolated(rows, k, gap=0.01):
    """Tell which of the top k singular values stand off zero, and off their neighbours."""
    values = torch.nn.functional.pad(torch.linalg.svdvals(rows.double()), (0, 1))
    own, after = values[:, :k], values[:, 1 : k + 1]
    before = torch.cat([torch.full_like(own[:, :1], torch.inf), own[:, :-1]], dim=1)
    apart = (own - after >= gap * own) & (before - own >= gap * own)
    return apart & (own > 1e-4 * values[:, :1])


def top_of(rows, k, *, capturable=False):
    (found,) = top_singular_vectors([rows], [k], ["features"], capturable=capturable)
    return found


def check_against_float64(rows, k, *, capturable=False):
    """Check vectors and gradients where values are isolated; return which samples are doubtful.

    Samples that are doubtful on the CPU are decomposed in float64; in a capturable loss they are
    not, and need not be accurate.
    """
    rows = rows.detach().requires_grad_()
    truth = rows.detach().double().requires_grad_()
    found, wanted = top_of(rows, k, capturable=capturable), SVDFeature(k)(truth)
    vectors = found.vectors()
    trusted = ~found.doubtful if capturable else torch.ones(len(rows), dtype=torch.bool)
    gram = (vectors @ vectors.mT)[trusted]
    torch.testing.assert_close(gram, torch.eye(k).expand_as(gram), rtol=0, atol=2e-6)
    assert ((vectors.double().norm(dim=-1) - 1).abs()[trusted] <= 2e-7).all()
    good = isolated(rows.detach(), k) & trusted[:, None]
    cosine = (vectors.double() * wanted).sum(dim=-1)
    assert torch.where(good, 1 - cosine, 0).max() <= 1e-6
    target = noise(*vectors.shape, seed=1)
    for i in range(k):
        (got,) = torch.autograd.grad((vectors[:, i] * target[:, i]).sum(), rows, retain_graph=True)
        (true,) = torch.autograd.grad((wanted[:, i] * target[:, i]).sum(), truth, retain_graph=True)
        difference = (got - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)
        assert (difference[good[:, i]] <= 1e-3).all()
        assert got.isfinite().all()
    return found.doubtful


@points
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("kind", ["relu", *SPECTRA])
@forms
def test_isolated_vectors_and_their_gradients_are_those_of_float64(point, k, kind, capturable):
    rows = relu_noise(*point) if kind == "relu" else with_values(SPECTRA[kind], *point)
    check_against_float64(rows, k, capturable=capturable)


@settings(max_examples=20)
@example(seed=0, n=1, c=7, k=1)
@given(seed=seeds, n=st.integers(9, 64), c=st.integers(9, 40), k=st.integers(1, 5))
def test_any_shape_is_as_good(seed, n, c, k):
    check_against_float64(relu_noise(n, c, seed=seed), k)


@pytest.mark.parametrize(("k", "channels"), [(6, 10), (6, 24), (20, 24), (6, 48), (20, 48)])
@pytest.mark.parametrize("ratio", [1.05, 1.3, 2.0])
def test_many_vectors_are_as_good_without_the_host(k, channels, ratio):
    rows = with_values(falling(ratio, channels), 64, channels, count=8)
    check_against_float64(rows, k, capturable=True)


@pytest.mark.parametrize("ratio", [100.0, 1000.0, 10000.0])
@pytest.mark.parametrize("decay", [1.1, 1.015])
@pytest.mark.parametrize("shape", [(12, 40), (16, 40), (64, 100), (64, 12)])
def test_vectors_and_gradients_beside_a_dominating_value_are_exact(shape, ratio, decay):
    check_against_float64(with_values([ratio, *falling(decay, 63)], *shape, count=8), 4)


@pytest.mark.parametrize("shape", [(72, 64), (64, 72)])
@pytest.mark.parametrize("scale", [1e-9, 1e-8, 1e-7])
def test_small_maps_are_not_taken_for_converged(shape, scale):
    """The squares of what is left to converge underflow, while the maps are far from zero."""
    check_against_float64(scale * with_values(falling(1.015, 64), *shape, count=8), 4)


@both_sides
@pytest.mark.parametrize("exponent", [-21, -17, 20])
def test_the_scale_of_a_map_does_not_matter_without_the_host(shape, exponent):
    target = noise(4, 3, shape[1])

    def vectors_and_gradient(scale):
        rows = (scale * relu_noise(*shape)).requires_grad_()
        found = top_of(rows, 3, capturable=True)
        assert not found.doubtful.any()
        (gradient,) = torch.autograd.grad((found.vectors() * target).sum(), rows)
        return found.all, scale * gradient

    for scaled, plain in zip(*map(vectors_and_gradient, (2.0**exponent, 1.0)), strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-3, atol=1e-4)


@points
def test_close_values_leave_vectors_within_their_common_subspace(point):
    values = [3.0, 2.0, 2.0 * (1 - 1e-6), 2.0 * (1 - 2e-6), *[0.5] * 60][: min(point)]
    matrix, right = matrix_of(values, *point)
    rows = matrix.float().requires_grad_()
    # The second vector is not known, although nothing is wrong with the two that follow it.
    assert top_of(rows, 2).doubtful.all()
    vectors = SVDFeature(2)(rows)
    inside = (vectors.double() @ right[:, :4].mT).square().sum(dim=-1)
    assert (1 - inside).abs().max() <= 1e-6
    vectors.sum().backward()
    assert rows.grad.isfinite().all()


@forms
@pytest.mark.parametrize("shape", [(16, 16), (10, 12), (40, 256), (256, 40)])
@pytest.mark.parametrize(("small", "gap"), [(0.0147, 0.0102), (0.02, 0.012), (0.05, 0.0102)])
def test_what_is_lost_in_a_gram_matrix_is_found_in_the_map(small, gap, shape, capturable):
    """Its rounding errors are those of the largest value, and these values are far below it."""
    values = [1.0, small, small * (1 - gap), small * (1 - 2 * gap), *[0.2 * small] * 36]
    check_against_float64(with_values(values, *shape, count=12), 4, capturable=capturable)


@forms
@pytest.mark.parametrize("shape", [(40, 256), (256, 40), (8, 64), (12, 40)])
def test_values_have_their_own_precision_not_that_of_the_largest(shape, capturable):
    values = [1.0, 0.1, 0.099, 0.098, *(0.02 - 0.0001 * i for i in range(36))]
    found = top_of(with_values(values, *shape, count=12), 4, capturable=capturable)
    assert not found.doubtful.any()
    wanted = torch.tensor(values[:4]).square().expand(12, -1)
    torch.testing.assert_close(found.values, wanted, rtol=1e-6, atol=0)


def test_a_vector_that_the_iteration_hardly_starts_with_is_found():
    """Until it has grown its value hides in a vector that is not wanted."""
    start = _leading._start(8, 24, torch.device("cpu")).double()
    orthogonal = torch.linalg.svd(start)[2][8]
    hidden = orthogonal + 1.1e-5 * torch.nn.functional.normalize(start.sum(dim=0), dim=0)
    others = noise(12, 24, 23, seed=1).double()
    hidden = hidden[:, None].expand(12, -1, -1)
    right = torch.linalg.qr(torch.cat([hidden, others], dim=2))[0].mT
    values = torch.tensor([0.75, 1.0, 0.9, 0.8, 0.7, *[0.5] * 19]).sqrt()
    check_against_float64((values[:, None] * right).float(), 4)


@forms
@pytest.mark.parametrize(
    ("values", "k"),
    [
        *[(falling(1.1, 5), k) for k in (1, 4)],  # filtered vectors of low rank are dependent
        *[(falling(1.1, 24), k) for k in (1, 4, 20)],
        *[([ratio, *falling(1.1, 63)], 4) for ratio in (5.0, 10.0)],
    ],
)
def test_float32_suffices_for_low_rank_and_beside_a_dominating_value(values, k, capturable):
    assert not check_against_float64(with_values(values, 72, 64), k, capturable=capturable).any()


@pytest.mark.parametrize("rows", [relu_noise(64, 128), with_values(SPECTRA["slow"], 64, 128)])
def test_what_did_not_converge_is_not_returned(monkeypatch, rows):
    monkeypatch.setattr(_leading, "FILTERS_CPU", 1)
    monkeypatch.setattr(_leading, "MOST", 2)
    assert check_against_float64(rows, 4).any()


def test_two_filters_suffice_for_what_stands_off_by_a_few_per_cent():
    """The capturable form has no more; `GraphTransferLoss.doubtful` counts the rest."""
    apart = with_values([1.06, 1.04, 1.02, 1.0, *[1 / 1.042] * 60], 72, 64, count=20)
    assert not check_against_float64(apart, 4, capturable=True).any()
    evenly = with_values(falling(1.012, 64), 72, 64, count=20)
    assert check_against_float64(evenly, 4, capturable=True).sum() <= 8


@pytest.mark.parametrize(("values", "known"), [([1.0, 0.9, 0.03], 2), ([1.0, 0.3, 0.09, 0.027], 3)])
def test_a_vector_that_two_filters_do_not_find_is_called_null(values, known):
    """Else rounding, here the order of the positions, decides which one the loss gets."""
    rows = with_values(values + [1e-3] * 9, 100, 48, count=8)
    orders = [torch.arange(100), torch.randperm(100)]
    a, b = (top_of(rows[:, order], 4, capturable=True) for order in orders)
    assert a.doubtful.all()
    assert torch.equal(a.null, b.null)
    assert torch.equal(a.null, (torch.arange(4) >= known).expand(8, 4))
    torch.testing.assert_close(a.all[~a.null], b.all[~b.null], rtol=0, atol=1e-3)


@pytest.mark.parametrize("ratio", [1.003, 1.005])
def test_what_two_filters_find_is_within_a_hundredth_radian_of_the_leading_subspace(ratio):
    rows = with_values(falling(ratio, 64), 72, 64, count=20)
    found = top_of(rows, 4, capturable=True)
    leading = torch.linalg.svd(rows.double())[2][:, : 3 + _leading.EXTRA]
    sine = (1 - (found.all.double() @ leading.mT).square().sum(dim=-1)).sqrt()
    assert sine.max() > 0.01 >= sine[~found.null].max()


@forms
@pytest.mark.parametrize("shape", [(64, 32), (6, 40)])
def test_vectors_of_value_zero_are_called_null(shape, capturable):
    rows = torch.cat([with_values([3.0, 2.0], *shape), torch.zeros(1, *shape)])
    assert top_of(rows, 3, capturable=capturable).null[0].tolist() == [False, False, True]


@pytest.mark.parametrize("scale", [1.0, 2.0**-24])
def test_what_half_precision_hides_is_null_at_any_scale(scale):
    """By a scale of 2^-24 the map goes to the other solver: its squares are too small."""
    rows = scale * with_values([1.0, 0.019], 2, 64)
    assert top_of(rows.bfloat16(), 2).null.tolist() == [[False, True]]
    assert top_of(rows, 2).null.tolist() == [[False, False]]


def test_float32_does_not_suffice_for_steep_maps_and_float64_does():
    steep = with_values([1.0, 1e-2, 1e-5], 64, 32)
    assert top_of(steep, 3, capturable=True).doubtful.all()
    for rows in (steep, steep.double()):
        found = top_of(rows, 3)
        assert found.doubtful.all()
        assert not found.null.any()


@both_sides
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_gradient_of_a_doubtful_sample_is_bounded_without_the_host(shape, scale):
    gap = 1e-5
    close = scale * with_values([1.0, 1.0 - gap, *[0.5] * 14], *shape)
    rows = torch.cat([close, torch.zeros(1, *shape)]).requires_grad_()
    found = top_of(rows, 1, capturable=True)
    assert found.doubtful.all()
    target = noise(2, 1, shape[1])
    (found.vectors() * target).sum().backward()
    # Its norm would be about |target| / gap; it is bounded as for a relative gap of 0.1 %.
    assert 50 < scale * rows.grad[0].norm() / target[0].norm() <= 2.1e3
    assert rows.grad.isfinite().all()


def test_maps_solved_together_have_the_vectors_that_they_have_alone():
    shapes = [(36, 32), (4, 24), (36, 20), (20, 48), (5, 8), (49, 32), (1, 9)]
    counts = [1, 4, 4, 3, 2, 4, 1, 1]
    maps = [relu_noise(*shape, batch=2 + i) for i, shape in enumerate(shapes)]
    # Equal values of which none is wanted make no sample doubtful.
    maps.append(with_values([3.0, 2.0, 2.0, 2.0, *[0.5] * 20], 36, 24))
    together = top_singular_vectors(maps, counts, ["map"] * len(maps), capturable=True)
    for rows, k, found in zip(maps, counts, together, strict=True):
        alone = top_of(rows, k)
        assert not found.doubtful.any()
        assert not alone.doubtful.any()
        torch.testing.assert_close(found.all, alone.all, rtol=0, atol=1e-3)
        torch.testing.assert_close(found.values, alone.values, rtol=1e-4, atol=0)
        assert not found.null.any()


def nasty_mates(n, c):
    """Return maps that ask more of the iteration than others, one of a kind."""
    channel = torch.arange(c)
    return {
        "zero": torch.zeros(n, c),
        "rank one": noise(c).expand(n, c),
        "nearly constant": 0.05 * noise(n, c) + 0.3,
        "far from zero": 300 + noise(n, c),
        "large": 1e12 * noise(n, c),
        "small": 1e-12 * noise(n, c),
        "steep": noise(n, c) * 2.0**-channel,
        "one channel": noise(n, c) * (channel == 0),
        "diagonal": 2.0**-channel * torch.eye(n, c),
    }


@pytest.mark.parametrize("kind", nasty_mates(2, 2))
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (32, 64), (64, 24), (16, 40)])
def test_no_map_spoils_the_vectors_and_gradients_of_others(shape, rectified, k, kind):
    rows = noise(5, *shape, seed=1)
    rows = rows.relu() if rectified else rows
    for count in (1, 4):
        rows[5 - count :] = nasty_mates(*shape)[kind]
        check_against_float64(rows, k)


@pytest.mark.parametrize("largest", [2.5, 3.0])
@pytest.mark.parametrize("channels", [24, 64])
def test_maps_of_few_entries_stop_no_others(channels, largest):
    """Their filtered vectors are zero, and their values exactly so, while others need a filter."""
    one = torch.zeros(channels, channels + 4, channels)
    one[:, 0] = torch.eye(channels)
    two = one.clone()
    two[:, 1] = 0.5 * torch.eye(channels).roll(1, 1)
    slow = with_values([largest, *falling(1.012, channels - 1)], channels + 4, channels)
    check_against_float64(torch.cat([one, two, slow.expand(2 * channels + 10, -1, -1)]), 2)


@both_sides
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_a_map_out_of_range_reaches_no_other_without_the_host(bad, shape):
    good = noise(3, *shape)
    spoilt = good.clone()
    spoilt[1, 2, 3] = bad
    found, wanted = (top_of(rows, 2, capturable=True) for rows in (spoilt, good))
    assert found.doubtful.tolist() == [False, True, False]
    torch.testing.assert_close(found.all[::2], wanted.all[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(64, 64), (16, 8), (20, 40)])
def test_no_maps_have_no_vectors(shape, dtype):
    rows = torch.zeros(0, *shape, dtype=dtype, requires_grad=True)
    vectors = SVDFeature(2)(rows)
    assert vectors.shape == (0, 2, shape[1])
    assert vectors.dtype == torch.promote_types(dtype, torch.float32)
    vectors.sum().backward()
    assert rows.grad.shape == rows.shape


@pytest.mark.parametrize("shape", [(64, 32), (32, 64)])
@pytest.mark.parametrize("values", [[1.0, 0.8, 0.6, 0.4], [1.0, 1e-2, 1e-4, 1e-6]])
def test_vectors_that_are_not_chosen_change_nothing_of_the_gradient(shape, values):
    """Alignment chooses; whether a sample is doubtful makes no difference."""
    rows = with_values(values, *shape, count=4).requires_grad_()
    index = torch.tensor([[2, 0], [1, 1], [3, 2], [0, 1]])
    target = noise(4, 2, shape[1])
    target[3] = 0
    found = top_of(rows, 4)
    (gradient,) = torch.autograd.grad(found.vectors(index), rows, target)
    chosen = torch.stack([v[i] for v, i in zip(found.vectors(), index, strict=True)])
    (wanted,) = torch.autograd.grad(chosen, rows, target)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    assert gradient.flatten(1).any(dim=1).tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("size", "capturable"),
    [*[(size, False) for size in (0.0, 1e-30, 1e-10, 1e15, 1e30)], (0.0, True), (1e15, True)],
)
def test_gradients_are_proportional_to_cotangents_of_any_size(size, capturable):
    rows = relu_noise(64, 24).requires_grad_()
    vectors = top_of(rows, 2, capturable=capturable).vectors()
    target = noise(*vectors.shape, seed=1)
    (wanted,) = torch.autograd.grad(vectors, rows, target, retain_graph=True)
    (gradient,) = torch.autograd.grad(vectors, rows, size * target)
    torch.testing.assert_close(gradient, size * wanted, rtol=1e-3, atol=1e-4 * size)


@pytest.fixture
def decomposed(monkeypatch):
    """List how many samples each call of `torch.linalg.eigh` decomposes."""
    counts, eigh = [], torch.linalg.eigh

    def counting(matrix):
        counts.append(len(matrix))
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counting)
    return counts


@pytest.mark.parametrize(("ratio", "filters"), [(1.05, 1), (1.1, 1), (1.5, 1), (2.0, 2)])
def test_the_cpu_needs_one_filter_or_one_more_after_a_look_at_the_values(
    decomposed, ratio, filters
):
    assert not top_of(with_values(falling(ratio, 64), 72, 64, count=8), 4).doubtful.any()
    assert len(decomposed) == filters


def test_the_cpu_filters_few_maps_with_gaps_of_one_and_a_half_per_cent_again(decomposed):
    top_of(with_values(falling(1.015, 64), 72, 64, count=64), 4)
    assert sum(decomposed[1:]) <= 8 < decomposed[0]


@pytest.mark.parametrize("ratio", [1.001, 3.6, 4.0])
def test_the_cpu_finds_four_values_that_fall_slowly_or_fast_in_float32(ratio):
    assert not top_of(with_values(falling(ratio, 64), 72, 64, count=8), 4).doubtful.any()


@pytest.mark.parametrize(("slow", "filtered"), [(2, 2), (6, 8)])
def test_the_cpu_filters_what_needs_it_or_all_if_that_is_most(decomposed, slow, filtered):
    rows = with_values(falling(1.005, 64), 72, 64, count=8)
    rows[slow:] = with_values([1.06, 1.04, 1.02, 1.0, *[0.3] * 60], 72, 64, count=8 - slow)
    assert not top_of(rows, 4).doubtful.any()  # the degree is the one that the slowest needs
    assert decomposed[1] == filtered


def test_the_cpu_does_not_filter_what_float32_can_not_resolve(decomposed):
    steep = [1.0, *(1e-3 * 1.01**-i for i in range(63))]
    assert top_of(with_values(steep, 72, 64, count=8), 4).doubtful.all()
    assert len(decomposed) == 2  # one after the first filter, one of the map's own products


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype, capturable):
    maps = noise(4, 40, 33 + capturable)  # a size of no other test: constants are kept
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        vectors = top_of(maps, 2, capturable=capturable).all
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(vectors, top_of(maps, 2, capturable=capturable).all)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(24, 8, 8), (40, 4, 5)])
def test_memory_format_does_not_matter_and_is_that_of_the_gradient(memory_format, shape):
    maps = noise(4, *shape).relu()
    features = maps.to(memory_format=memory_format).requires_grad_()
    vectors = SVDFeature(2)(features)
    torch.testing.assert_close(vectors, SVDFeature(2)(maps))
    (gradient,) = torch.autograd.grad(vectors.sum(), features)
    assert gradient.is_contiguous(memory_format=memory_format)


def precision():
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision
    return {"highest": "ieee", "high": "tf32", "medium": "bf16"}[  # before torch 2.9
        torch.get_float32_matmul_precision()
    ]


def test_float32_products_are_whole_whatever_the_user_allows_other_layers(monkeypatch):
    seen = {}

    def spy(name, inner):
        def asked(*arguments):
            seen[name] = precision()
            return inner(*arguments)

        monkeypatch.setattr(torch.linalg, name, asked)

    spy("eigh", torch.linalg.eigh)  # one on the way forward, one on the way back
    spy("solve_ex", torch.linalg.solve_ex)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        SVDFeature(1)(relu_noise(20, 24).requires_grad_()).sum().backward()
        assert precision() == "bf16"
        with pytest.raises(ValueError, match="must be finite"):
            SVDFeature(1)(torch.full((2, 20, 24), torch.nan))
        assert precision() == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {"eigh": "ieee", "solve_ex": "ieee"}


@pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="before torch 2.9 nothing is inherited"
)
def test_a_precision_that_was_inherited_stays_so():
    backends, matmul = torch.backends, torch.backends.mkldnn.matmul
    before, own = backends.fp32_precision, matmul.fp32_precision
    try:
        matmul.fp32_precision = "none"  # another test may have set it
        backends.fp32_precision = "tf32"
        SVDFeature(1)(relu_noise(20, 24))
        backends.fp32_precision = "ieee"
        assert precision() == "ieee"
    finally:
        backends.fp32_precision, matmul.fp32_precision = before, own


# torch.compile itself makes a Function object to trace one.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((64, 24), torch.float32), ((20, 40), torch.float32), ((16, 6), torch.float64)],
)
def test_compiles_to_one_graph_whatever_the_content_needs(shape, dtype):
    torch._dynamo.reset()
    compiled = torch.compile(SVDFeature(4), fullgraph=True, backend="aot_eager")
    slow = with_values(SPECTRA["slow"], *shape, count=4)
    maps = [m.to(dtype) for m in (noise(4, *shape).relu(), slow, torch.zeros_like(slow))]

    def run(module, rows):
        rows = rows.clone().requires_grad_()
        vectors = module(rows)
        (gradient,) = torch.autograd.grad((vectors * noise(*vectors.shape)).sum(), rows)
        return vectors.detach(), gradient

    run(compiled, maps[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in maps:
            torch.testing.assert_close(run(compiled, rows), run(SVDFeature(4), rows))
        with pytest.raises(ValueError, match="`features` must be finite"):
            compiled(torch.full_like(maps[0], torch.nan).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 30, 20), (3, 20, 30), (3, 30, 6)])
@forms
def test_a_compiled_graph_expects_the_shapes_that_there_are(shape, dtype, capturable):
    find, maps = _svd.FIND[capturable], noise(*shape).to(dtype)
    torch.library.opcheck(find, ([maps], [2], ["map"], capturable), test_utils="test_faketensor")
    # Elsewhere the flags of the form that syncs are on the host.
    *_, doubtful = find([maps.to("meta")], [2], ["map"], capturable)
    assert doubtful.device.type == ("meta" if capturable else "cpu")


def test_a_compiled_graph_expects_the_layout_that_the_gradient_has():
    tokens = noise(12, 3, 40)
    sequence_first = tokens.transpose(0, 1)
    expanded = sequence_first[..., :1].expand(-1, -1, 24)
    for rows in (tokens, sequence_first, sequence_first[..., ::2], expanded):
        found = top_of(rows, 1)
        index = torch.zeros(len(rows), 1, dtype=torch.long)
        saved = (index, found.all, found.values, found.basis, found.doubtful, found.all)
        arguments = (rows, *saved, False)
        torch.library.opcheck(_svd.GRADIENT[False], arguments, test_utils="test_faketensor")
