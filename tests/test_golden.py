"""The authors' program and the exact gradients, number by number."""

import pytest
import torch
from einops import rearrange
from golden_case import POINTS, as_ours, load, maps, names_of, transfer
from reference import frozen_logits

from graph_kd import SVDFeature, align_singular_vectors

# Program outputs are float32, so float32 rounding is all that can be asked of a float64 run too.
PROGRAM = 1e-4
EXACT = {torch.float32: 1e-4, torch.float64: 1e-6}

cases = pytest.mark.parametrize("case_name", ["a", "b"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("shape", ["tall", "wide", "square"])
def test_singular_vectors_and_their_true_gradient(shape, k, dtype):
    case = load(f"svd_case_{shape}", dtype)
    features = rearrange(case["in.x"], "b h w c -> b c h w").requires_grad_()
    vectors = SVDFeature(k)(features)
    theirs = rearrange(case[f"SVD.n{k}.V"], "b c k -> b k c")
    sign = (vectors * theirs).sum(dim=-1, keepdim=True).sign().detach()
    assert relative_error(vectors * sign, theirs) < 1e-5

    cotangent = rearrange(case[f"SVD.n{k}.R"], "b c k -> b k c")
    (gradient,) = torch.autograd.grad((vectors * sign * cotangent).sum(), features)
    sample, position, channel = case["fd_entries"].T
    at_entries = rearrange(gradient, "b c h w -> b (h w) c")[sample, position, channel]
    assert relative_error(at_entries, case[f"SVD.n{k}.grad_true_fd"]) < EXACT[dtype]


@cases
@dtypes
def test_compressed_and_aligned_vectors(case_name, dtype):
    case = load(f"mhgd_case_{case_name}", dtype)
    exact = load(f"mhgd_exact_{case_name}")
    for p, (student, teacher) in enumerate(
        zip(maps(case, "student"), maps(case, "teacher"), strict=True)
    ):
        target, candidates = SVDFeature(1)(teacher), SVDFeature(4)(student)
        assert relative_error(target[:, 0], case[f"V_T{p}"][:, :, 0]) < PROGRAM
        aligned = align_singular_vectors(candidates, target)
        assert relative_error(aligned[:, 0], case[f"V_S{p}"][:, :, 0]) < PROGRAM
        picked = (candidates @ target.mT).abs().argmax(dim=1).flatten()
        assert torch.equal(picked, exact[f"pick{p}"])


@cases
@dtypes
def test_transfer_logits(case_name, dtype):
    case = load(f"mhgd_case_{case_name}", dtype)
    loss = transfer(case).eval()
    for pair, estimator in enumerate(loss.estimators, start=1):
        for who in "TS":
            front, back = (case[f"V_{who}{p}"][:, :, 0] for p in (pair - 1, pair))
            logits = estimator.attention_logits(front, back)
            assert relative_error(logits, case[f"logits_{who}{pair}"]) < PROGRAM
            frozen = frozen_logits(estimator, front, back)
            assert relative_error(frozen, logits) < 10 * torch.finfo(dtype).eps


@cases
@dtypes
@pytest.mark.parametrize("form", ["authors", "poster"])
def test_transfer_loss_and_its_exact_gradient(case_name, dtype, form):
    case = load(f"mhgd_case_{case_name}", dtype)
    exact = load(f"mhgd_exact_{case_name}")
    loss = transfer(case, squash="tanh" if form == "authors" else None)
    student = [feature.requires_grad_() for feature in maps(case, "student")]
    value = loss(student, maps(case, "teacher"))
    assert value.item() == pytest.approx(exact[f"{form}_transfer_total"].item(), rel=EXACT[dtype])
    if form == "authors":
        assert value.item() == pytest.approx(case["transfer_total"].item(), rel=PROGRAM)

    gradients = torch.autograd.grad(value, student)
    for p, gradient in enumerate(gradients):
        wanted = rearrange(exact[f"{form}_exact_grad_student{p}"], "b h w c -> b c h w")
        assert relative_error(gradient.double(), wanted) < EXACT[dtype]


@cases
@pytest.mark.parametrize("squash", [None, "tanh", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_change_the_loss_by_less_than_one_per_cent(
    case_name, squash, dtype
):
    case = load(f"mhgd_case_{case_name}", torch.float32)
    loss, student, teacher = (
        transfer(case, squash=squash),
        maps(case, "student"),
        maps(case, "teacher"),
    )
    half = loss([f.to(dtype) for f in student], [f.to(dtype) for f in teacher])
    assert half.item() == pytest.approx(loss(student, teacher).item(), rel=0.01)


@cases
@dtypes
@pytest.mark.parametrize("form", ["authors", "poster"])
def test_gradient_at_the_aligned_vectors(case_name, dtype, form):
    case = load(f"mhgd_case_{case_name}", dtype)
    exact = load(f"mhgd_exact_{case_name}")
    loss = transfer(case, squash="tanh" if form == "authors" else None)
    # A vector (b, c) is its own singular vector up to scale: these are the rows of step 2.
    student = [case[f"V_S{p}"][:, :, 0].requires_grad_() for p in range(POINTS)]
    gradients = torch.autograd.grad(loss(student, maps(case, "teacher")), student)
    for p, (row, gradient) in enumerate(zip(student, gradients, strict=True)):
        wanted = exact[f"{form}_grad_V_S{p}"]
        unit = row.detach().double()  # what scaling the row does is not seen by a unit vector
        tangent = wanted - (wanted * unit).sum(dim=1, keepdim=True) * unit
        assert relative_error(gradient.double(), tangent) < PROGRAM
        if form == "authors":
            assert relative_error(case[f"grad_V_S{p}"][:, :, 0].double(), wanted) < PROGRAM


@cases
@dtypes
def test_estimator_loss_estimates_and_gradients(case_name, dtype):
    case = load(f"mhgd_case_{case_name}", dtype)
    loss = transfer(case)
    total = torch.zeros((), dtype=dtype)
    for pair, estimator in enumerate(loss.estimators, start=1):
        front, back = (case[f"V_T{p}"][:, :, 0] for p in (pair - 1, pair))
        kept = case[f"drop_mask{pair}"][:, :, 0]
        assert (
            relative_error(estimator.attention_logits(front, back), case[f"logits_mha_T{pair}"])
            < PROGRAM
        )
        estimate = estimator(front, back, kept_heads=kept)
        assert relative_error(estimate, case[f"V_T_est{pair}"]) < PROGRAM
        value = estimator.loss(front, back, kept_heads=kept)
        assert value.item() == pytest.approx(case[f"mha_loss{pair}"].item(), rel=PROGRAM)
        total = total + value
    assert total.item() == pytest.approx(case["mha_total"].item(), rel=PROGRAM)

    total.backward()
    for pair, estimator in enumerate(loss.estimators, start=1):
        theirs = names_of(pair)
        for name, parameter in estimator.named_parameters():
            wanted = as_ours(name, case[f"grad_mha.{theirs[name]}"])
            if name == "phi.1.bias":  # a shift of all columns of a softmax row changes nothing
                assert parameter.grad.abs().max() < 1e-6
            else:
                assert relative_error(parameter.grad, wanted) < PROGRAM, name


@cases
def test_drop_mask_is_the_programs_rule(case_name, monkeypatch):
    case = load(f"mhgd_case_{case_name}")
    for pair, estimator in enumerate(transfer(case).estimators, start=1):
        noise = case[f"noise{pair}"][:, :, 0]
        monkeypatch.setattr(torch, "randn", lambda *_, noise=noise, **__: noise)
        kept = estimator.draw_kept_heads(case[f"V_T{pair}"][:, :, 0])
        assert torch.equal(kept, case[f"drop_mask{pair}"][:, :, 0])


@cases
@dtypes
def test_moving_statistics_after_one_estimator_step(case_name, dtype):
    case = load(f"mhgd_case_{case_name}", dtype)
    loss = transfer(case)
    loss.estimator_loss(maps(case, "teacher"))
    for pair, estimator in enumerate(loss.estimators, start=1):
        theirs = names_of(pair)
        for name, buffer in estimator.named_buffers():
            if "running" in name:
                wanted = as_ours(name, case[f"after_update.{theirs[name]}"])
                assert relative_error(buffer, wanted) < PROGRAM, name
