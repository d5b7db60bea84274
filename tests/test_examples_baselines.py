"""The examples' baselines: values and gradients of the authors' program, laws, refusals."""

import pytest
import torch
from baselines import RECIPES, FactorTransfer, Outputs, kd_svd, kd_svdf
from einops import rearrange
from golden_case import load

from graph_kd import SVDFeature

CHANNELS = (6, 8, 16)
POINTS = 4  # of the golden case
PROGRAM = 1e-4

every = pytest.mark.parametrize("name", RECIPES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def outputs(seed=0, channels=CHANNELS, sizes=(8, 4, 4), batch=6, activation=torch.relu):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

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
    if RECIPES[name].takes == "last_map":
        return shown._replace(maps=[*shown.maps[:-1], *taken])
    several = RECIPES[name].takes == "maps"
    return shown._replace(**{RECIPES[name].takes: list(taken) if several else taken[0]})


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"ab", "ft"}))
def test_student_that_equals_the_teacher_is_at_the_minimum(name):
    student, teacher = outputs(0), outputs(0)
    taken = [tensor.requires_grad_() for tensor in tensors(name, student)]
    module = build(name)
    value = RECIPES[name].loss(module, student, teacher)
    assert abs(value.item()) < 1e-12
    for gradient in torch.autograd.grad(value, taken):
        assert gradient.abs().max() < 1e-7
    assert RECIPES[name].loss(module, outputs(1), teacher) > 1e-6


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
    assert all(p.grad is not None for n, p in module.named_parameters() if "paraphraser" not in n)


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
    half = [like(name, o, [t.to(dtype) for t in tensors(name, o)]) for o in map(outputs, (0, 1))]
    whole = [like(name, o, [t.float() for t in tensors(name, o)]) for o in half]
    module = build(name).float()
    wanted = RECIPES[name].loss(module, *whole)
    with torch.autocast("cpu", dtype=dtype):
        for shown in (half, whole):
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


def as_ours(case, key):
    """Return an array of the program in our layout; of FT on the mirror image.

    The program's strided convolutions pad at the other end. Its transposed convolutions have
    weights (h, w, out, in), ours (in, out, h, w).
    """
    array = case[key]
    if array.ndim < 4:
        return array
    kernel = ".w." in key or "grad_Para" in key
    array = rearrange(array, "h w i o -> o i h w" if kernel else "b h w c -> b c h w")
    return array.flip(2, 3) if key.startswith("ft.") else array


def assert_golden(case, loss, value, inputs, factor=1.0):
    """Compare a loss, and its gradients by the program's names of them."""
    assert value.item() == pytest.approx(case[loss].item(), rel=PROGRAM)
    gradients = torch.autograd.grad(value, list(inputs.values()))
    for name, gradient in zip(inputs, gradients, strict=True):
        wanted = as_ours(case, name)
        assert (factor * gradient - wanted).norm() < PROGRAM * wanted.norm(), name


def golden_maps(case, who):
    return [as_ours(case, f"in.{who}{p}").requires_grad_(who == "student") for p in range(POINTS)]


@dtypes
@pytest.mark.parametrize("name", ["soft-logits", "dml", "rkd", "fitnet", "at", "fsp", "ab"])
def test_loss_and_gradient_are_those_of_the_program(name, dtype):
    case = load("baselines_case", dtype)
    student, teacher = golden_maps(case, "student"), golden_maps(case, "teacher")
    channels = [maps.shape[1] for maps in student]
    module = build(name, channels, channels).to(dtype)
    for p, connector in enumerate(getattr(module, "connectors", ())):
        theirs = "ab.w.criterion_alternative_L2.Map.connector"
        names = [f"{p}.weights", f"_bn{p}.gamma", f"_bn{p}.beta"]
        weights = (as_ours(case, theirs + name) for name in names)
        connector.load_state_dict(dict(zip(connector.state_dict(), weights, strict=True)))
    if RECIPES[name].takes == "maps":
        value = RECIPES[name].weight * module(student, teacher)
    else:
        source = {"logits": "logits", "embedding": "feat"}[RECIPES[name].takes]
        student = [case[f"in.{source}_S"].requires_grad_()]
        value = module(student[0], case[f"in.{source}_T"])
    program = name.replace("-", "_")
    inputs = {f"{program}.grad_student{p}": tensor for p, tensor in enumerate(student)}
    assert_golden(case, f"{program}.loss", value, inputs)


def signed_as(case, method, maps):
    """Negate maps of the teacher where that turns the canonical vector into the program's."""
    signed = []
    for p, features in enumerate(maps):
        ours = SVDFeature()(features)[:, 0]
        sign = (ours * case[f"{method}.V_T{p}"][:, :, 0]).sum(dim=1).sign()
        signed.append(features * rearrange(sign, "b -> b 1 1 1"))
    return signed


@dtypes
@pytest.mark.parametrize(
    ("method", "gradients", "points", "factor"),
    [
        # The program's gradient is twice the true one where positions outnumber channels; at the
        # last point they do not, and it is another.
        ("kd_svd", "grad_student", 3, 2),
        ("kd_eid", "exact_grad_student", 4, 1),  # with other signs of the teacher's vectors
    ],
)
def test_kd_svd_and_kd_svdf_are_those_of_the_program(method, gradients, points, factor, dtype):
    case = load("baselines_case", dtype)
    student = golden_maps(case, "student")
    teacher = signed_as(case, method, golden_maps(case, "teacher"))
    value = kd_svd(student, teacher)
    inputs = {f"{method}.{gradients}{p}": student[p] for p in range(points)}
    assert_golden(case, f"{method}.loss", value, inputs, factor)
    # A map of one position is its own singular vector.
    vectors = [[case[f"{method}.V_{who}{p}"][..., None] for p in range(POINTS)] for who in "ST"]
    assert kd_svd(*vectors).item() == pytest.approx(value.item(), rel=PROGRAM)
    distance = sum((s - t).square().sum().item() for s, t in zip(*vectors, strict=True))
    assert kd_svdf(student, teacher).item() == pytest.approx(distance, rel=PROGRAM)


@dtypes
def test_ft_gives_the_programs_losses_and_gradients(dtype):
    case = load("baselines_case", dtype)
    loss = FactorTransfer([16], [16]).to(dtype)
    parameters = {
        f"Factor_Transfer.{theirs}{i}.{name}": parameter
        for theirs, part in [
            ("Factor_transfer.conv", loss.paraphraser["encoder"]),
            ("Factor_transfer.convt", loss.paraphraser["decoder"]),
            ("Translator.conv", loss.translator),
        ]
        for i, layer in enumerate(layer for layer in part if hasattr(layer, "weight"))
        for name, parameter in (("weights", layer.weight), ("biases", layer.bias))
    }
    for name, parameter in parameters.items():
        parameter.data = as_ours(case, f"ft.w.{name}")
    student, teacher = (as_ours(case, f"ft.in.{who}") for who in ("student", "teacher"))
    value = loss(student.requires_grad_(), teacher)
    assert_golden(case, "ft.loss", value, {"ft.grad_student0": student})
    names = [name for name in parameters if "Translator" not in name]
    of_paraphraser = {f"ft.grad_Para_loss.{name}": parameters[name] for name in names}
    assert_golden(case, "ft.Para_loss", loss.paraphraser_loss(teacher), of_paraphraser)
