"""Laws of the subspace iteration: as good as float64 where singular values are isolated.

It has two forms. The CPU filters as often as the maps need. Other devices, and a loss with
capturable=True, filter twice; that form is tested here on the CPU.
"""

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import as_map, matrix_of, seeds

from graph_kd import GraphTransferLoss, SVDFeature, _leading, _svd
from graph_kd._svd import top_singular_vectors


def steps(size):
    """Return values in threes, 1.1 % apart, a factor of 1.5 between one three and the next."""
    i = torch.arange(size, dtype=torch.float64)
    return 1.5 ** -(i // 3) * 1.011 ** -(i % 3)


# Sensing points of the paper's networks: h, w, c.
POINTS = [(16, 16, 64), (8, 8, 128), (4, 4, 256), (2, 2, 512), (32, 32, 64), (8, 8, 256)]
SPECTRA = {
    "slow": lambda size: 1.015 ** -torch.arange(size, dtype=torch.float64),
    "fast": lambda size: 0.4 ** torch.arange(size, dtype=torch.float64).clamp(max=8),
    "plateau": lambda size: 1.02 ** -torch.arange(size, dtype=torch.float64).clamp(max=4),
    "threes": lambda size: steps(size),
    "one dominates": lambda size: torch.cat(
        [torch.tensor([10.0]).double(), 1.02 ** -torch.arange(size - 1, dtype=torch.float64)]
    ),
}
points = pytest.mark.parametrize("point", POINTS, ids=str)
forms = pytest.mark.parametrize("capturable", [False, True], ids=["CPU", "capturable"])


def relu_noise(point, batch=4, seed=0):
    h, w, c = point
    return torch.randn(batch, c, h, w, generator=torch.Generator().manual_seed(seed)).relu()


def with_spectrum(point, kind, seed=0):
    h, w, c = point
    values = SPECTRA[kind](min(h * w, c))
    return as_map(matrix_of(values.tolist(), h * w, c, seed)[0], h, w).float()


def rows_of(features):
    return rearrange(features, "b c h w -> b (h w) c")


def singular_values(features):
    return torch.linalg.svdvals(rows_of(features).double())


def isolated(features, k, gap=0.01):
    """Tell which of the top k singular values stand off their neighbours by a relative gap."""
    values = torch.nn.functional.pad(singular_values(features), (0, 1))
    own, after = values[:, :k], values[:, 1 : k + 1]
    before = torch.cat([torch.full_like(own[:, :1], torch.inf), own[:, :-1]], dim=1)
    return (own - after >= gap * own) & (before - own >= gap * own)


def top_of(rows, k, *, capturable=False):
    (found,) = top_singular_vectors([rows], [k], ["features"], capturable=capturable)
    return found


def check_against_float64(features, k, *, capturable=False):
    """Check vectors and gradients where values are isolated; return which samples are doubtful.

    Samples that are doubtful on the CPU are decomposed in float64; in a capturable loss they are
    not, and need not be accurate.
    """
    features = features.detach().requires_grad_()
    truth = features.detach().double().requires_grad_()
    found, wanted = top_of(rows_of(features), k, capturable=capturable), SVDFeature(k)(truth)
    vectors = found.vectors()
    good = isolated(features.detach(), k)
    if capturable:
        good &= ~found.doubtful[:, None]
    cosine = (vectors.double() * wanted).sum(dim=-1)
    assert torch.where(good, 1 - cosine, 0).max() <= 1e-6
    target = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))
    for i in range(k):
        (got,) = torch.autograd.grad(
            (vectors[:, i] * target[:, i]).sum(), features, retain_graph=True
        )
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
    features = relu_noise(point) if kind == "relu" else with_spectrum(point, kind)
    check_against_float64(features, k, capturable=capturable)


@settings(max_examples=20)
@given(
    seed=seeds,
    h=st.integers(3, 8),
    w=st.integers(3, 8),
    c=st.integers(17, 40),
    k=st.integers(1, 5),
)
def test_any_shape_is_as_good(seed, h, w, c, k):
    check_against_float64(relu_noise((h, w, c), seed=seed), k)


@points
@pytest.mark.parametrize("kind", ["relu", *SPECTRA])
def test_rows_are_orthonormal_to_float32(point, kind):
    features = relu_noise(point) if kind == "relu" else with_spectrum(point, kind)
    vectors = SVDFeature(4)(features)
    torch.testing.assert_close(
        vectors @ vectors.mT, torch.eye(4).expand(len(vectors), 4, 4), rtol=0, atol=2e-6
    )


@points
def test_close_values_leave_vectors_within_their_common_subspace(point):
    h, w, c = point
    size = min(h * w, c)
    values = [3.0, 2.0, 2.0 * (1 - 1e-6), 2.0 * (1 - 2e-6), *[0.5] * (size - 4)][:size]
    matrix, right = matrix_of(values, h * w, c)
    features = as_map(matrix, h, w).float().requires_grad_()
    # The second vector is not known, although nothing is wrong with the two that follow it.
    assert top_of(rows_of(features), 2).doubtful.all()
    vectors = SVDFeature(2)(features)
    inside = (vectors.double() @ right[:, :4].mT).square().sum(dim=-1)
    assert (1 - inside).abs().max() <= 1e-6
    vectors.sum().backward()
    assert features.grad.isfinite().all()


@forms
def test_float32_suffices_for_common_maps_and_not_for_steep_ones(capturable):
    assert not top_of(rows_of(relu_noise((16, 16, 64))), 4, capturable=capturable).doubtful.any()
    steep, _ = matrix_of([1.0, 1e-2, 1e-4, 1e-6], 64, 32)
    assert top_of(steep.float(), 4, capturable=capturable).doubtful.all()


@forms
@pytest.mark.parametrize("k", [1, 4, 20])
@pytest.mark.parametrize("rank", [5, 24])
def test_float32_suffices_for_maps_of_low_rank(rank, k, capturable):
    """Their filtered vectors are linearly dependent."""
    if k < rank:
        matrix, _ = matrix_of([1.1**-i for i in range(rank)], 64, 48)
        features = as_map(matrix, 8, 8).float()
        assert not check_against_float64(features, k, capturable=capturable).any()


@forms
@pytest.mark.parametrize("ratio", [5.0, 10.0])
def test_float32_suffices_beside_a_dominating_value(ratio, capturable):
    matrix, _ = matrix_of([ratio, *(1.1**-i for i in range(63))], 72, 64)
    features = as_map(matrix, 8, 9).float()
    assert not check_against_float64(features, 4, capturable=capturable).any()


def batch_of(values, count):
    matrices = [matrix_of(values, 72, 64, seed)[0] for seed in range(count)]
    return as_map(torch.cat(matrices), 8, 9).float()


def test_two_filters_suffice_for_what_stands_off_by_a_few_per_cent():
    """The capturable form has no more; `GraphTransferLoss.doubtful` counts the rest."""
    apart = batch_of([1.06, 1.04, 1.02, 1.0, *[1 / 1.042] * 60], 20)
    assert not check_against_float64(apart, 4, capturable=True).any()
    evenly = batch_of([1.012**-i for i in range(64)], 20)
    assert check_against_float64(evenly, 4, capturable=True).sum() <= 8


@pytest.fixture
def decomposed(monkeypatch):
    """List how many samples each call of `torch.linalg.eigh` decomposes."""
    counts = []
    eigh = torch.linalg.eigh

    def counting(matrix):
        counts.append(len(matrix))
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counting)
    return counts


@pytest.mark.parametrize("ratio", [1.03, 1.05, 1.1])
def test_the_cpu_filters_once_more_after_a_look_at_the_values(decomposed, ratio):
    assert not top_of(rows_of(batch_of([ratio**-i for i in range(64)], 8)), 4).doubtful.any()
    assert len(decomposed) == 2


@pytest.mark.parametrize(("slow", "filtered"), [(2, 2), (6, 8)])
def test_the_cpu_filters_what_needs_it_or_all_if_that_is_most(decomposed, slow, filtered):
    features = batch_of([1.01**-i for i in range(64)], 8)
    features[slow:] = batch_of([1.06, 1.04, 1.02, 1.0, *[0.3] * 60], 8 - slow)
    top_of(rows_of(features), 4)
    assert decomposed[1] == filtered


def test_the_cpu_does_not_filter_what_float32_can_not_resolve(decomposed):
    steep = [1.0, *[1e-3 * 1.01**-i for i in range(63)]]
    assert top_of(rows_of(batch_of(steep, 8)), 4).doubtful.all()
    assert len(decomposed) == 2  # one after the first filter, one of the map's own products


@pytest.mark.parametrize("k", [6, 20])
@pytest.mark.parametrize("channels", [10, 24, 48])
@pytest.mark.parametrize("ratio", [1.05, 1.3, 2.0])
def test_many_vectors_are_as_good_without_the_host(k, channels, ratio):
    if k <= channels:
        values = [ratio**-i for i in range(channels)]
        matrix = torch.cat([matrix_of(values, 64, channels, seed)[0] for seed in range(8)])
        check_against_float64(as_map(matrix, 8, 8).float(), k, capturable=True)


def test_a_capturable_loss_is_that_of_the_other_form():
    generator = torch.Generator().manual_seed(0)
    sizes = [(8, 6, 6), (24, 4, 4), (24, 5, 5)]  # of one Gram size, and of another
    teacher = [torch.randn(6, *size, generator=generator) for size in sizes]
    results = []
    for capturable in (False, True):
        torch.manual_seed(0)
        loss = GraphTransferLoss([8, 24, 24], num_heads=2, capturable=capturable)
        student = [(0.5 * m + m.roll(1, 0)).requires_grad_() for m in teacher]
        value = loss(student, teacher)
        results.append([value.detach(), *torch.autograd.grad(value, student)])
    assert int(loss.doubtful) == 0
    for wanted, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_maps_solved_together_have_the_vectors_that_they_have_alone():
    sizes = [(6, 6, 32), (2, 2, 24), (6, 6, 20), (4, 5, 48), (1, 5, 8), (7, 7, 32), (1, 1, 9)]
    counts = [1, 4, 4, 3, 2, 4, 1]
    maps = [rows_of(relu_noise(size, batch=2 + i)) for i, size in enumerate(sizes)]
    together = top_singular_vectors(maps, counts, ["map"] * len(maps), capturable=True)
    for rows, k, found in zip(maps, counts, together, strict=True):
        alone = top_of(rows, k)
        assert not found.doubtful.any()
        torch.testing.assert_close(found.all, alone.all, rtol=0, atol=1e-3)
        torch.testing.assert_close(found.values, alone.values, rtol=1e-4, atol=0)
        assert not found.null.any()


@forms
def test_vectors_that_are_not_wanted_make_no_sample_doubtful(capturable):
    """One map is asked for one vector, and its next values are equal; another is asked for more."""
    equal = matrix_of([3.0, 2.0, 2.0, 2.0, *[0.5] * 20], 36, 24)[0].float()
    maps = [equal, rows_of(relu_noise((6, 6, 24)))]
    found = top_singular_vectors(maps, [1, 4], ["a", "b"], capturable=capturable)
    assert not any(part.doubtful.any() for part in found)


@pytest.mark.parametrize("shape", [(40, 16), (16, 40)])
def test_the_gradient_of_a_doubtful_sample_is_bounded_without_the_host(shape):
    gap, size = 1e-5, min(shape)
    values = [1.0, 1.0 - gap, *[0.5] * (size - 2)]
    matrix = torch.cat([matrix_of(values, *shape)[0], torch.zeros(1, *shape)])
    rows = matrix.float().requires_grad_()
    found = top_of(rows, 1, capturable=True)
    assert found.doubtful.all()
    target = torch.randn(2, 1, shape[1], generator=torch.Generator().manual_seed(0))
    (found.vectors() * target).sum().backward()
    # Its norm would be about |target| / gap; it is bounded as for a relative gap of 0.1 %.
    assert 50 < rows.grad[0].norm() / target[0].norm() <= 2.1e3
    assert rows.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(40, 16), (16, 40)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_a_map_out_of_range_reaches_no_other_without_the_host(bad, shape):
    good = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    spoilt = good.clone()
    spoilt[1, 2, 3] = bad
    found, wanted = (top_of(rows, 2, capturable=True) for rows in (spoilt, good))
    assert found.doubtful.tolist() == [False, True, False]
    torch.testing.assert_close(found.all[::2], wanted.all[::2])


def test_a_map_that_is_not_finite_is_refused_beside_a_steep_one():
    rows = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0))
    rows[0, :, 0] *= 100
    rows[2, 5, 7] = torch.nan
    with pytest.raises(ValueError, match=r"`features` must be finite; .*in 1 of 3 .*first is 2\)"):
        SVDFeature(2)(rows)


def test_a_sample_without_any_vector_has_no_partner_at_a_point_of_few_candidates():
    """Points with fewer candidates than others are padded; the padding is never chosen."""
    maps = [torch.randn(4, 8, 3, 3), torch.randn(4, 8, 2, 1)]
    students = [m.clone() for m in maps]
    students[1][2] = 0
    loss = GraphTransferLoss([8, 8], num_heads=1)
    assert loss(students, maps).isfinite()


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(64, 32), (6, 40)])
def test_vectors_of_value_zero_are_called_null(shape, capturable, dtype):
    matrix = torch.cat([matrix_of([3.0, 2.0], *shape)[0], torch.zeros(1, *shape)]).to(dtype)
    if not capturable or dtype == torch.float32:
        null = top_of(matrix, 3, capturable=capturable).null
        assert null[0].tolist() == [False, False, True]


def test_what_float64_resolves_is_not_called_null():
    small, _ = matrix_of([1.0, 1e-2, 1e-5], 64, 32)
    for rows in (small.float(), small):
        found = top_of(rows, 3)
        assert found.doubtful.all()
        assert not found.null.any()


def test_vectors_lost_in_a_gram_matrix_are_found_in_the_map():
    values = [1.0, 0.02, 0.997 * 0.02, 0.994 * 0.02, *[0.2 * 0.02] * 36]
    matrix, right = map(
        torch.cat, zip(*(matrix_of(values, 40, 256, i) for i in range(12)), strict=True)
    )
    found = top_of(matrix.float(), 4)
    assert not found.doubtful.any()
    cosine = (found.all.double() * right[:, :4]).sum(dim=-1).abs()
    assert (1 - cosine).max() <= 1e-6


@forms
@pytest.mark.parametrize("shape", [(40, 256), (256, 40), (8, 64), (12, 40)])
def test_values_have_their_own_precision_not_that_of_the_largest(shape, capturable):
    wanted = torch.tensor([1.0, 0.1, 0.099, 0.098]).double()
    rest = [0.02 - 0.0001 * i for i in range(min(shape) - 4)]
    matrix = torch.cat([matrix_of([*wanted.tolist(), *rest], *shape, i)[0] for i in range(12)])
    found = top_of(matrix.float(), 4, capturable=capturable)
    assert not found.doubtful.any()
    values = wanted.square().float().expand(12, -1)
    torch.testing.assert_close(found.values, values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16)])
def test_vectors_of_all_pairs_have_unit_length(shape):
    matrix, _ = matrix_of(steps(16).tolist(), *shape)
    lengths = torch.linalg.vector_norm(SVDFeature(4)(matrix.float()).double(), dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=2e-7)


@pytest.mark.parametrize("scale", [1e-15, 1e-10, 1e-7, 1e6, 6e8, 1e9, 1e15])
@pytest.mark.parametrize("point", [(8, 8, 24), (4, 5, 40)])
def test_very_large_and_very_small_maps_have_the_same_vectors(point, scale):
    features = relu_noise(point)
    wanted = SVDFeature(4)(features.double())
    scaled = (scale * features).requires_grad_()
    vectors = SVDFeature(4)(scaled)
    good = isolated(features, 4)
    assert (1 - (vectors.double() * wanted).sum(dim=-1))[good].max() <= 1e-6
    vectors[:, 0].sum().backward()
    assert scaled.grad.isfinite().all()
    assert scaled.grad.abs().amax() > 0


@points
def test_a_vector_without_gradient_changes_nothing_of_the_others(point):
    features = relu_noise(point).requires_grad_()
    vectors = SVDFeature(4)(features)
    target = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))
    chosen = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0]])[..., None]
    (whole,) = torch.autograd.grad(vectors, features, chosen * target, retain_graph=True)
    parts = [
        torch.autograd.grad(vectors[:, i], features, (chosen * target)[:, i], retain_graph=True)[0]
        for i in range(4)
    ]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
    assert (whole[3] == 0).all()
    assert (whole[:3].flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("values", [[1.0, 0.8, 0.6, 0.4], [1.0, 1e-2, 1e-4, 1e-6]])
def test_the_gradient_of_chosen_vectors_is_that_of_these_among_all(values):
    """Alignment chooses; whether a sample is doubtful makes no difference."""
    rows = torch.cat([matrix_of(values, 64, 32, seed)[0] for seed in range(3)]).float()
    rows.requires_grad_()
    index = torch.tensor([[2, 0], [1, 1], [3, 2]])
    found = top_of(rows, 4)
    target = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(found.vectors(index), rows, target)
    chosen = torch.stack([v[i] for v, i in zip(found.vectors(), index, strict=True)])
    (wanted,) = torch.autograd.grad(chosen, rows, target)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@forms
def test_no_gradient_in_gives_no_gradient_out(capturable):
    rows = rows_of(relu_noise((6, 6, 24))).requires_grad_()
    (0 * top_of(rows, 4, capturable=capturable).vectors()).sum().backward()
    assert not rows.grad.any()


@pytest.mark.parametrize("kind", ["relu", "slow"])
def test_what_did_not_converge_is_not_returned(monkeypatch, kind):
    monkeypatch.setattr(_leading, "FILTERS_CPU", 1)
    monkeypatch.setattr(_leading, "MOST", 2)
    point = (8, 8, 128)
    features = relu_noise(point) if kind == "relu" else with_spectrum(point, kind)
    assert top_of(rows_of(features), 4).doubtful.any()
    check_against_float64(features, 4)


def test_one_bad_sample_does_not_disturb_the_others():
    features = relu_noise((8, 8, 24), batch=6)
    wanted = SVDFeature(4)(features)
    features[2] = 0
    features[4] *= 1e-16
    others = [0, 1, 3, 5]
    # How often the others are filtered may change with it; what that leaves is the tolerance.
    torch.testing.assert_close(SVDFeature(4)(features)[others], wanted[others], rtol=0, atol=6e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("point", [(8, 8, 24), (4, 5, 40)])
def test_gradient_is_laid_out_as_the_map(memory_format, point):
    features = relu_noise(point).to(memory_format=memory_format).requires_grad_()
    SVDFeature(2)(features).sum().backward()
    assert features.grad.is_contiguous(memory_format=memory_format)


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
        SVDFeature(1)(relu_noise((4, 5, 24)).requires_grad_()).sum().backward()
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
        SVDFeature(1)(relu_noise((4, 5, 24)))
        backends.fp32_precision = "ieee"
        assert precision() == "ieee"
    finally:
        backends.fp32_precision, matmul.fp32_precision = before, own


# torch.compile itself makes a Function object to trace one.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("point", [(8, 8, 24), (4, 5, 40)])
def test_compiles_to_one_graph_whatever_the_content_needs(point):
    torch._dynamo.reset()
    compiled = torch.compile(SVDFeature(4), fullgraph=True, backend="aot_eager")
    noise = relu_noise(point)
    slow = with_spectrum(point, "slow").expand(4, -1, -1, -1).contiguous()
    maps = [noise, slow, torch.zeros_like(noise)]
    target = torch.randn(4, 4, point[2], generator=torch.Generator().manual_seed(0))

    def run(module, features):
        features = features.clone().requires_grad_()
        vectors = module(features)
        (gradient,) = torch.autograd.grad((vectors * target).sum(), features)
        return vectors.detach(), gradient

    run(compiled, maps[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for features in maps:
            torch.testing.assert_close(run(compiled, features), run(SVDFeature(4), features))
        with pytest.raises(ValueError, match="`features` must be finite"):
            compiled(torch.full_like(maps[0], torch.nan).requires_grad_())


def nasty_mates(point):
    """Return maps that ask more of the iteration than others, one of a kind."""
    h, w, c = point
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(c, h, w, generator=generator)
    channel = torch.randn(c, 1, 1, generator=generator)
    return {
        "zero": torch.zeros(c, h, w),
        "rank one": channel.expand(c, h, w),
        "nearly constant": 0.05 * noise + 0.3,
        "far from zero": 300 + noise,
        "large": 1e12 * noise,
        "small": 1e-12 * noise,
        "steep": noise * 2.0 ** -torch.arange(c, dtype=torch.float32)[:, None, None],
        "one channel": noise * (torch.arange(c) == 0)[:, None, None],
    }


@pytest.mark.parametrize("kind", nasty_mates((2, 2, 4)))
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("point", [(8, 8, 64), (8, 4, 64), (8, 8, 24), (4, 4, 40)])
def test_no_map_spoils_the_vectors_and_gradients_of_others(point, rectified, k, kind):
    h, w, c = point
    features = torch.randn(5, c, h, w, generator=torch.Generator().manual_seed(1))
    features = features.relu() if rectified else features
    for count in (1, 4):
        mixed = features.clone()
        mixed[:count] = nasty_mates(point)[kind]
        mixed.requires_grad_()
        vectors = SVDFeature(k)(mixed)
        target = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(2))
        (gradient,) = torch.autograd.grad((vectors * target)[:, -1].sum(), mixed)
        assert vectors.isfinite().all()
        assert gradient.isfinite().all()
        truth = mixed.detach().double().requires_grad_()
        wanted = SVDFeature(k)(truth)
        (true,) = torch.autograd.grad((wanted * target)[:, -1].sum(), truth)
        good = isolated(mixed.detach(), k)
        good[:count] = False
        assert good.any() or count > 1
        off = 1 - (vectors * wanted).sum(dim=-1).abs()
        assert torch.where(good, off, 0).max() <= 1e-6
        error = (gradient - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)
        assert (error[good[:, -1]] <= 1e-3).all()


@pytest.mark.parametrize("largest", [2.5, 3.0])
@pytest.mark.parametrize("channels", [24, 64])
def test_maps_of_few_entries_stop_no_others(channels, largest):
    """Their filtered vectors are zero, and their values exactly so, while others need a filter."""
    one = torch.zeros(channels, channels + 4, channels)
    one[:, 0] = torch.eye(channels)
    two = one.clone()
    two[:, 1] = 0.5 * torch.eye(channels).roll(1, 1)
    values = [largest, *(1.012**-i for i in range(channels - 1))]
    slow = matrix_of(values, channels + 4, channels)[0].float().expand(2 * channels + 10, -1, -1)
    vectors = SVDFeature(2)(torch.cat([one, two, slow]))
    wanted = SVDFeature(2)(slow[:1].double()).expand(len(slow), -1, -1)
    torch.testing.assert_close(vectors[2 * channels :].double(), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("ratio", [100.0, 1000.0, 10000.0])
@pytest.mark.parametrize("decay", [1.1, 1.015])
@pytest.mark.parametrize("point", [(3, 4, 40), (4, 4, 40), (8, 8, 100), (8, 8, 12)])
def test_vectors_and_gradients_beside_a_dominating_value_are_exact(point, ratio, decay):
    h, w, c = point
    values = [ratio, *(decay**-i for i in range(min(h * w, c) - 1))]
    matrix = torch.cat([matrix_of(values, h * w, c, seed)[0] for seed in range(8)])
    check_against_float64(as_map(matrix, h, w).float(), 4)


def test_rows_of_a_batch_with_a_steep_map_are_orthonormal():
    maps = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    maps = maps * torch.linspace(0.5, 1, 64)
    maps[0] = torch.diag(2.0 ** -torch.arange(64, dtype=torch.float32))
    vectors = SVDFeature(4)(maps)
    torch.testing.assert_close(
        vectors @ vectors.mT, torch.eye(4).expand(3, 4, 4), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e15, 1e30])
def test_gradients_are_proportional_to_cotangents_of_any_size(size):
    features = relu_noise((8, 8, 24)).requires_grad_()
    vectors = SVDFeature(2)(features)
    target = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))
    (wanted,) = torch.autograd.grad(vectors, features, target, retain_graph=True)
    (gradient,) = torch.autograd.grad(vectors, features, size * target)
    torch.testing.assert_close(gradient / size, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("point", [(8, 8, 64), (4, 4, 8)])
def test_no_maps_have_no_vectors(point, dtype):
    h, w, c = point
    features = torch.zeros(0, c, h, w, dtype=dtype, requires_grad=True)
    vectors = SVDFeature(2)(features)
    assert vectors.shape == (0, 2, c)
    assert vectors.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    vectors.sum().backward()
    assert features.grad.shape == features.shape


@pytest.mark.parametrize("change", ["sequence first", "every second", "expanded", "plain"])
def test_a_compiled_graph_expects_the_layout_that_the_gradient_has(change):
    tokens = torch.randn(12, 3, 40, generator=torch.Generator().manual_seed(0))
    features = {
        "sequence first": tokens.transpose(0, 1),
        "every second": tokens.transpose(0, 1)[..., ::2],
        "expanded": tokens[:, :, :1].transpose(0, 1).expand(-1, -1, 24),
        "plain": tokens,
    }[change]
    found = top_of(features, 1)
    index = torch.zeros(len(features), 1, dtype=torch.long)
    saved = (index, found.all, found.values, found.basis, found.doubtful, found.all)
    real = _svd.GRADIENT[False](features, *saved, False)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) for t in (features, *saved)]
        fake = _svd.GRADIENT[False](*fakes, False)
    assert fake.stride() == real.stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 30, 20), (3, 20, 30)])
@forms
def test_a_compiled_graph_expects_the_shapes_that_there_are(shape, dtype, capturable):
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    find = _svd.FIND[capturable]
    real = find([maps], [2], ["map"], capturable)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = find([mode.from_tensor(maps)], [2], ["map"], capturable)
    for fake, tensor in zip(fakes, real, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (
            tensor.shape,
            tensor.dtype,
            tensor.stride(),
        )
    # Elsewhere the flags of the form that syncs are on the host.
    *_, doubtful = find([maps.to("meta")], [2], ["map"], capturable)
    assert doubtful.device.type == ("meta" if capturable else "cpu")


def test_a_value_hidden_in_a_vector_that_has_not_converged_is_looked_for():
    # By hand: only a map nearly orthogonal to the first vectors of the iteration gets there.
    values = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, *[0.1] * 19])
    vectors = torch.eye(24)[[0, 1, 2, 4, 5, 6, 7, 8]][None]
    for share in (0.0, 0.8):  # of the fourth eigenvector in the fifth row, which is no wanted one
        vectors[0, 4, [3, 23]] = torch.tensor([share, (1 - share**2) ** 0.5])
        vectors[0, 4, 5] = 0
        images = vectors * values
        ritz = _leading._Ritz((images * vectors).sum(dim=-1), vectors, images)
        angle = _leading._angle(ritz, torch.tensor([[3]]))
        assert bool(angle <= _leading.TOLERANCE) is (share == 0)
