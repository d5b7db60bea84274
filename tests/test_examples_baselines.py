"""The examples' baselines: values and gradients of the authors' program, laws, refusals."""

import pytest
import torch
from baselines import RECIPES, FactorTransfer, Outputs, kd_svd, kd_svdf
from einops import rearrange
from golden_case import load
from hypothesis import given
from strategies import seeds
from torch import nn

from graph_kd import SVDFeature

CHANNELS = (6, 8, 16)
SIZES = (8, 4, 4)
POINTS = 4  # of the golden case
PROGRAM = 1e-4

every = pytest.mark.parametrize("name", RECIPES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def outputs(
    seed=0, channels=CHANNELS, sizes=SIZES, batch=6, dtype=torch.float64, activation=torch.relu
):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    maps = [activation(draw(batch, c, n, n)) for c, n in zip(channels, sizes, strict=True)]
    return Outputs(maps, embedding=draw(batch, 2 * channels[-1]), logits=draw(batch, 5))


def build(name, student=CHANNELS, teacher=CHANNELS):
    torch.manual_seed(0)
    return RECIPES[name].build(student, teacher).double()


def tensors(name, shown):
    """Return what the method of this name takes, as a list."""
    taken = getattr(shown, RECIPES[name].takes)
    return taken if isinstance(taken, list) else [taken]


def like(name, shown, taken):
    """Return the outputs with these tensors in place of what the method takes."""
    kept = {"maps": shown.maps, "embedding": shown.embedding, "logits": shown.logits}
    if RECIPES[name].takes == "last_map":
        return Outputs(**kept | {"maps": [*shown.maps[:-1], taken[0]]})
    if RECIPES[name].takes == "maps":
        return Outputs(**kept | {"maps": list(taken)})
    return Outputs(**kept | {RECIPES[name].takes: taken[0]})


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"ab", "ft"}))
@given(seed=seeds)
def test_student_that_equals_the_teacher_is_at_the_minimum(name, seed):
    student, teacher = outputs(seed), outputs(seed)
    taken = [tensor.requires_grad_() for tensor in tensors(name, student)]
    module = build(name)
    value = RECIPES[name].loss(module, student, teacher)
    assert abs(value.item()) < 1e-12
    for gradient in torch.autograd.grad(value, taken):
        assert gradient.abs().max() < 1e-7
    assert RECIPES[name].loss(module, outputs(seed + 1), teacher) > 1e-6


@every
def test_gradient_reaches_the_student_and_the_teacher_only_where_both_learn(name):
    student, teacher = outputs(0), outputs(1)
    for tensor in tensors(name, student) + tensors(name, teacher):
        tensor.requires_grad_()
    module = build(name)
    RECIPES[name].loss(module, student, teacher).backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in tensors(name, student))
    reached = [tensor.grad is not None for tensor in tensors(name, teacher)]
    assert reached == [RECIPES[name].schedule == "mutual"] * len(reached)
    learning = [p.grad is not None for n, p in module.named_parameters() if "paraphraser" not in n]
    assert all(learning)


@every
def test_gradient_is_that_of_finite_differences(name):
    # tanh: zeros of a ReLU would tie in FSP's max pooling, where there is no derivative.
    student, teacher = outputs(0, batch=3, activation=torch.tanh), outputs(1, batch=3)
    module, recipe = build(name), RECIPES[name]
    taken = [tensor.clone().requires_grad_() for tensor in tensors(name, student)]

    def value(*tensors):
        return recipe.loss(module, like(name, student, tensors), teacher) / recipe.weight

    assert torch.autograd.gradcheck(value, taken, fast_mode=True)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision_features_leave_the_loss_in_float32(name, dtype):
    student, teacher = outputs(0, dtype=dtype), outputs(1, dtype=dtype)
    whole = [like(name, o, [t.float() for t in tensors(name, o)]) for o in (student, teacher)]
    module = build(name).float()
    wanted = RECIPES[name].loss(module, *whole)
    with torch.autocast("cpu", dtype=dtype):
        for shown in ((student, teacher), whole):
            value = RECIPES[name].loss(module, *shown)
            assert value.dtype == torch.float32
            assert torch.equal(value, wanted)


def test_schedules_and_weights_are_the_authors():
    of = {s: {n for n, r in RECIPES.items() if r.schedule == s} for s in ("initialise", "prepare")}
    assert of == {"initialise": {"fitnet", "fsp", "ab"}, "prepare": {"ft"}}
    assert {n for n, r in RECIPES.items() if r.gated} == {"kd-svd", "kd-svdf"}
    weights = {n: (r.weight, r.task_weight) for n, r in RECIPES.items()}
    assert weights.pop("soft-logits") == (0.3, 0.7)
    assert all(task == 1 for _, task in weights.values())
    loss = {n: weight for n, (weight, _) in weights.items() if weight != 1}
    assert loss == {"at": 500, "ft": 500, "fsp": 1e-3, "ab": 3e-3}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("at", {"sizes": (8, 6, 4)}, r"AT needs equal `h` .* sensing point 1; got .* Choose"),
        ("fsp", {"channels": (6, 9, 16)}, r"FSP needs equal `c` .* sensing point 1; got"),
        ("kd-svd", {"batch": 5}, r"KD-SVD needs equal `b` .* sensing point 0; got \(5, 6"),
        ("ft", {"sizes": (8, 4, 2)}, r"FT needs equal `h` .*; got \(6, 16, 2, 2\) and"),
    ],
)
def test_a_student_that_does_not_fit_is_named(name, changes, message):
    with pytest.raises(ValueError, match=message):
        RECIPES[name].loss(build(name), outputs(0, **changes), outputs(1))


def relative_error(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


def golden_maps(case, who):
    return [rearrange(case[f"in.{who}{p}"], "b h w c -> b c h w") for p in range(POINTS)]


def signed_as(case, method, maps):
    """Negate maps of the teacher where that turns the canonical vector into the program's."""
    signed = []
    for p, features in enumerate(maps):
        ours = SVDFeature()(features)[:, 0]
        sign = (ours * case[f"{method}.V_T{p}"][:, :, 0]).sum(dim=1).sign()
        signed.append(features * rearrange(sign, "b -> b 1 1 1"))
    return signed


def vectors_as_maps(case, name):
    """Return singular vectors as maps of one position, of which they are the singular vectors."""
    return [rearrange(case[f"{name}{p}"], "b c 1 -> b c 1 1") for p in range(POINTS)]


def assert_golden(case, method, value, student, *, factor=1.0, gradients="grad_student"):
    assert value.item() == pytest.approx(case[f"{method}.loss"].item(), rel=PROGRAM)
    for p, gradient in enumerate(torch.autograd.grad(value, student)):
        wanted = case.get(f"{method}.{gradients}{p}")
        if wanted is not None:
            if wanted.ndim == 4:
                wanted = rearrange(wanted, "b h w c -> b c h w")
            assert relative_error(factor * gradient, wanted) < PROGRAM, p


def golden_loss(case, name, dtype):
    """Return the loss of a method with the program's weights, and the student's inputs."""
    source = {"soft-logits": "logits", "dml": "logits", "rkd": "feat"}.get(name)
    if source:
        student = [case[f"in.{source}_S"].requires_grad_()]
        return build(name)(student[0], case[f"in.{source}_T"]), student
    student = [maps.requires_grad_() for maps in golden_maps(case, "student")]
    channels = [maps.shape[1] for maps in student]
    module = build(name, channels, channels).to(dtype)
    if name == "ab":
        for p, (convolution, norm) in enumerate(module.connectors):
            theirs = "ab.w.criterion_alternative_L2.Map.connector"
            weights = rearrange(case[f"{theirs}{p}.weights"], "h w i o -> o i h w")
            convolution.load_state_dict({"weight": weights})
            gamma, beta = (case[f"{theirs}_bn{p}.{part}"] for part in ("gamma", "beta"))
            norm.load_state_dict({"weight": gamma, "bias": beta})
    return RECIPES[name].weight * module(student, golden_maps(case, "teacher")), student


@dtypes
@pytest.mark.parametrize("name", ["soft-logits", "dml", "rkd", "fitnet", "at", "fsp", "ab"])
def test_loss_and_gradient_are_those_of_the_program(name, dtype):
    case = load("baselines_case", dtype)
    value, student = golden_loss(case, name, dtype)
    assert_golden(case, name.replace("-", "_"), value, student)


@dtypes
def test_kd_svd_gives_the_programs_loss_and_the_exact_gradient(dtype):
    case = load("baselines_case", dtype)
    for method in ("kd_svd", "kd_eid"):  # the same loss with other signs of the teacher's vectors
        student = [maps.requires_grad_() for maps in golden_maps(case, "student")]
        value = kd_svd(student, signed_as(case, method, golden_maps(case, "teacher")))
        if method == "kd_eid":
            assert_golden(case, method, value, student, gradients="exact_grad_student")
        else:
            # The program's gradient is twice the true one where positions outnumber channels; at
            # the last point they do not, and it is another.
            del case["kd_svd.grad_student3"]
            assert_golden(case, method, value, student, factor=2)


@dtypes
@pytest.mark.parametrize("method", ["kd_svd", "kd_eid"])
def test_kd_svd_gives_the_programs_gradient_at_the_aligned_vectors(method, dtype):
    case = load("baselines_case", dtype)
    student = [maps.requires_grad_() for maps in vectors_as_maps(case, f"{method}.V_S")]
    value = kd_svd(student, vectors_as_maps(case, f"{method}.V_T"))
    assert value.item() == pytest.approx(case[f"{method}.loss"].item(), rel=PROGRAM)
    gradients = torch.autograd.grad(value, student)
    wanted = vectors_as_maps(case, f"{method}.grad_V_S")
    for vector, gradient, of_program in zip(student, gradients, wanted, strict=True):
        unit = vector.detach()  # what lengthens a vector is not seen by its direction
        tangent = of_program - (of_program * unit).sum(dim=1, keepdim=True) * unit
        assert relative_error(gradient, tangent) < PROGRAM


@dtypes
def test_kd_svdf_is_the_squared_distance_of_the_programs_vectors(dtype):
    case = load("baselines_case", dtype)
    teacher = signed_as(case, "kd_svd", golden_maps(case, "teacher"))
    vectors = [vectors_as_maps(case, f"kd_svd.V_{who}") for who in "ST"]
    distance = sum((s - t).square().sum() for s, t in zip(*vectors, strict=True))
    value = kd_svdf(golden_maps(case, "student"), teacher)
    assert value.item() == pytest.approx(distance.item(), rel=PROGRAM)


def mirrored(case, key):
    """Return a map or a kernel as ours, on the mirror image: the program pads at the other end."""
    array = case[key]
    if array.ndim == 1:
        return array
    if ".w." in key or "grad_Para" in key:
        # A transposed convolution's weights are (h, w, out, in), ours (in, out, h, w).
        return rearrange(array, "h w i o -> o i h w").flip(2, 3)
    return rearrange(array, "b h w c -> b c h w").flip(2, 3)


def factor_layers(loss):
    """Map the program's names of layers to ours."""
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    found = {}
    for theirs, ours in (
        ("Factor_Transfer.Factor_transfer.conv", loss.paraphraser["encoder"]),
        ("Factor_Transfer.Factor_transfer.convt", loss.paraphraser["decoder"]),
        ("Factor_Transfer.Translator.conv", loss.translator),
    ):
        convolutions = [layer for layer in ours if isinstance(layer, kinds)]
        found |= {f"{theirs}{i}": layer for i, layer in enumerate(convolutions)}
    return found


@dtypes
def test_ft_gives_the_programs_losses_and_gradients(dtype):
    case = load("baselines_case", dtype)
    loss = FactorTransfer([16], [16]).to(dtype)
    layers = factor_layers(loss)
    for theirs, layer in layers.items():
        weight, bias = (mirrored(case, f"ft.w.{theirs}.{part}") for part in ("weights", "biases"))
        layer.load_state_dict({"weight": weight, "bias": bias})
    student = mirrored(case, "ft.in.student").requires_grad_()
    teacher = mirrored(case, "ft.in.teacher")
    value = loss(student, teacher)
    assert value.item() == pytest.approx(case["ft.loss"].item(), rel=PROGRAM)
    (gradient,) = torch.autograd.grad(value, student)
    assert relative_error(gradient, mirrored(case, "ft.grad_student0")) < PROGRAM

    value = loss.paraphraser_loss(teacher)
    assert value.item() == pytest.approx(case["ft.Para_loss"].item(), rel=PROGRAM)
    value.backward()
    for theirs, layer in layers.items():
        for part, parameter in (("weights", layer.weight), ("biases", layer.bias)):
            if "Translator" in theirs:
                assert parameter.grad is None
            else:
                wanted = mirrored(case, f"ft.grad_Para_loss.{theirs}.{part}")
                assert relative_error(parameter.grad, wanted) < PROGRAM, theirs
