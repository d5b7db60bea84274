"""The recipes for timm and torchvision run, read what they say, and train what they should."""

import pytest
import torch

timm = pytest.importorskip("timm", reason="needs the extra `integrations`")
pytest.importorskip("torchvision", reason="needs the extra `integrations`")

import timm_models
import torchvision_models
from torchvision.models import mobilenet_v3_small, resnet18, resnet34

from graph_kd import GraphTransferLoss


def batches():
    torch.manual_seed(0)
    return [(torch.randn(8, 3, 32, 32), torch.randint(4, (8,))) for _ in range(2)]


@pytest.fixture
def seen(monkeypatch):
    """Run the training of the recipe and keep what it was called with."""
    calls = []
    train = timm_models.train

    def spy(student, of_student, of_teacher, transfer, data):
        before = {n: p.clone() for n, p in transfer.named_parameters()}
        weights = [p.clone() for p in student.parameters()]
        train(student, of_student, of_teacher, transfer, data)
        moved = {n.split(".")[0] for n, p in transfer.named_parameters() if not p.equal(before[n])}
        learnt = [not p.equal(w) for p, w in zip(student.parameters(), weights, strict=True)]
        images = data[0][0]
        shapes = [[tuple(f.shape) for f in read(images)[1]] for read in (of_student, of_teacher)]
        calls.append((moved, learnt, *shapes))

    monkeypatch.setattr(timm_models, "train", spy)
    return calls


@pytest.mark.parametrize(
    ("pair", "of_student", "of_teacher"),
    [
        (
            timm_models.convnext_to_resnet,
            [(8, 8, 4, 4), (8, 8, 2, 2), (8, 8, 1, 1)],
            [(8, 12, 4, 4), (8, 16, 2, 2), (8, 24, 1, 1)],
        ),
        (
            timm_models.swin_to_swin,  # b h w c
            [(8, 16, 16, 8), (8, 8, 8, 16), (8, 4, 4, 32)],
            [(8, 16, 16, 12), (8, 8, 8, 24), (8, 4, 4, 48)],
        ),
        (timm_models.vit_to_vit, [(8, 17, 8)] * 3, [(8, 17, 12)] * 3),
    ],
)
def test_timm_pair_trains_student_and_both_heads(pair, of_student, of_teacher, seen):
    pair(batches())
    ((moved, learnt, *shapes),) = seen
    assert moved == {"estimators", "student_heads"}
    assert all(learnt)
    assert shapes == [of_student, of_teacher]


def test_timm_intermediates_are_what_hooks_read():
    model = timm.create_model("resnet10t", channels=(8, 8, 8, 8), num_classes=4).eval()
    images, _ = batches()[0]
    logits, features = timm_models.intermediates(model, [2, 3, 4])(images)
    expected, hooked = timm_models.hooked(model, ["layer2", "layer3", "layer4"])(images)
    torch.testing.assert_close([logits, *features], [expected, *hooked])


@pytest.mark.parametrize(
    ("make", "nodes", "student_channels"),
    [
        (resnet18, torchvision_models.RESNET, None),
        (mobilenet_v3_small, torchvision_models.MOBILENET, [16, 40, 96]),
    ],
)
def test_torchvision_pair_trains_student_and_heads(make, nodes, student_channels):
    student, teacher = make(num_classes=4), resnet34(num_classes=4)
    transfer = GraphTransferLoss([64, 128, 512], student_channels=student_channels)
    before = {n: p.clone() for n, p in transfer.named_parameters()}
    weights = [p.clone() for p in student.parameters()]
    torchvision_models.train(student, nodes, teacher, transfer, batches())
    moved = {n.split(".")[0] for n, p in transfer.named_parameters() if not p.equal(before[n])}
    assert moved == ({"estimators", "student_heads"} if student_channels else {"estimators"})
    assert any(not p.equal(w) for p, w in zip(student.parameters(), weights, strict=True))
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("recipe", [timm_models, torchvision_models])
def test_script_runs(recipe, capsys):
    recipe.main()
    assert "nan" not in capsys.readouterr().out
