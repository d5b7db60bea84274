"""Laws of the nine networks: shapes, sensing points, costs, and the table of the examples' page."""

import sys
from functools import partial
from pathlib import Path

import networks
import pytest
import torch
import torch.nn.functional as F
from parts.models import NETWORKS, TEACHERS, VGG, build
from parts.multiply_adds import count_multiply_adds, count_parameters
from parts.three_stages import BasicBlock, ThreeStages, WideBlock
from torch import nn

from graph_kd import FeatureHooks, GraphTransferLoss
from graph_kd.testing import assert_feature_hooks

README = Path(__file__).parents[1] / "examples" / "README.md"
WIDTH = 0.125
HEIGHTS = {  # heights at the sensing points
    ("VGG", 32): (16, 8, 4, 4, 2),
    ("VGG", 64): (32, 16, 8, 4, 2),
    ("ThreeStages", 32): (32, 16, 8),
    ("ThreeStages", 64): (32, 16, 8),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def small(name, image_size=32):
    torch.manual_seed(0)
    return build(name, 10, WIDTH, image_size)


def test_there_are_nine_networks_and_each_is_a_teacher_or_has_one():
    assert len(NETWORKS) == 9
    assert set(TEACHERS) | set(TEACHERS.values()) == set(NETWORKS)
    assert not set(TEACHERS) & set(TEACHERS.values())


@pytest.mark.parametrize("image_size", [32, 64])
@every_network
def test_points_logits_and_embedding_have_the_shapes_of_the_slides(name, image_size):
    model = small(name, image_size)
    with FeatureHooks(model, [*model.sensing_points, model.embedding]) as hooks:
        logits = model(torch.randn(2, 3, image_size, image_size))
    *points, embedding = hooks.features
    heights = HEIGHTS[type(model).__name__, image_size]
    expected = [(2, c, s, s) for c, s in zip(model.channels, heights, strict=True)]
    assert [tuple(point.shape) for point in points] == expected
    assert logits.shape == (2, 10)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    assert torch.equal(F.linear(embedding, last.weight, last.bias), logits)


@pytest.mark.parametrize("width", [0.1, 1.0, 1.5])
@every_network
def test_width_scales_every_channel_count(name, width):
    channels = (64, 128, 256, 512, 512) if name in ("VGG16", "VGG7") else (64, 128, 256)
    with torch.device("meta"):
        model, full = build(name, 10, width), build(name, 10)
    assert model.channels == tuple(round(c * width) for c in channels)
    outputs = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    full_outputs = [m.out_channels for m in full.modules() if isinstance(m, nn.Conv2d)]
    assert outputs == [round(c * width) for c in full_outputs]


@pytest.mark.parametrize(("student", "teacher"), TEACHERS.items())
def test_student_can_learn_the_graphs_of_its_teacher(student, teacher):
    student, teacher = small(student), small(teacher).eval()
    assert student.channels == teacher.channels
    images = torch.randn(4, 3, 32, 32)
    points = student.sensing_points, teacher.sensing_points
    assert_feature_hooks(student, teacher, *points, images)
    transfer = GraphTransferLoss(student.channels, num_heads=2)
    with FeatureHooks(student, points[0]) as ours, FeatureHooks(teacher, points[1]) as theirs:
        student(images), teacher(images)
    assert torch.isfinite(transfer(ours.features, theirs.features))


@every_network
def test_nothing_changes_a_sensing_point_afterwards(name):
    model, kept = small(name), []
    for point in model.sensing_points:
        model.get_submodule(point).register_forward_hook(
            lambda _module, _inputs, output: kept.append((output, output.clone()))
        )
    model(torch.randn(2, 3, 32, 32))
    assert all(torch.equal(output, copy) for output, copy in kept)
    assert all(output._version == 0 for output, _ in kept)


@every_network
def test_gradient_reaches_every_parameter(name):
    model = small(name)
    F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@every_network
def test_evaluation_is_deterministic_and_survives_a_state_dict(name):
    model, images = small(name), torch.randn(4, 3, 32, 32)
    model(images)  # moves the running statistics
    model.eval()
    logits = model(images)
    assert torch.equal(model(images), logits)
    torch.testing.assert_close(model(images[:2]), logits[:2])  # no sample sees another
    other = build(name, 10, WIDTH).eval()
    assert not torch.equal(other(images), logits)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), logits)


def test_wide_blocks_drop_only_where_a_rate_is_given():
    images = torch.randn(2, 3, 32, 32)
    model = small("WRN-10-4")
    assert torch.equal(model(images), model(images))
    block = partial(WideBlock, dropout=0.5)
    dropping = ThreeStages(block, (1, 1, 1), 10, WIDTH, pre_activation=True)
    assert not torch.equal(dropping(images), dropping(images))


def test_blocks_without_residual_give_their_input_before_and_after_activation():
    feature = torch.randn(2, 8, 4, 4)
    for block, expected in (
        (WideBlock(8, 8, 1), feature),
        (BasicBlock(8, 8, 1), torch.relu(feature)),
    ):
        for parameter in block.parameters():
            nn.init.zeros_(parameter)
        assert torch.equal(block(feature), expected)


def test_wide_network_is_preactivated_and_ends_in_batch_norm_and_relu():
    model = small("WRN-10-4")
    with FeatureHooks(model, ["stem", "stages.2", "last"]) as hooks:
        model(torch.randn(4, 3, 32, 32))
    stem, point, last = hooks.features
    assert stem.min() < 0
    assert point.min() < 0
    assert last.min() == 0


def test_vgg_keeps_the_names_of_its_checkpoints():
    keys = {f"stages.{n}.0.weight" for n in range(5)}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys |= {f"stages.{n}.1.{key}" for n in range(5) for key in norm}
    keys |= {f"classifier.{n}.{key}" for n in (1, 3, 5) for key in ("weight", "bias")}
    assert set(VGG((1, 1, 1, 1, 1), 10, WIDTH).state_dict()) == keys
    assert set(small("VGG7").state_dict()) == keys - {"classifier.5.weight", "classifier.5.bias"}


def spread(conv):
    fan_in, filters = conv.weight[0].numel(), conv.out_channels // conv.groups
    return conv.weight.std().item(), fan_in, filters * conv.weight[0, 0].numel()


def test_vgg_begins_as_the_layers_of_torch():
    torch.manual_seed(0)
    for conv in build("VGG7", 10, 0.5).stages.modules():
        if isinstance(conv, nn.Conv2d):
            std, fan_in, _ = spread(conv)
            assert std == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)


@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in ("VGG16", "VGG7")])
def test_the_others_begin_with_variance_two_over_fan_out(name):
    torch.manual_seed(0)
    convs = [m for m in build(name, 10).modules() if isinstance(m, nn.Conv2d)]
    for conv in convs:
        std, _, fan_out = spread(conv)
        assert std == pytest.approx((2 / fan_out) ** 0.5, rel=0.25)  # 144 weights at least


def conv(size, channels, incoming, kernel=3):
    """Multiply-adds of a convolution that gives ``size`` × ``size`` pixels."""
    return size * size * channels * incoming * kernel * kernel


def residuals(stem):
    """Multiply-adds of one residual block a stage, shortcuts included."""
    stages = (32, stem, 64), (16, 64, 128), (8, 128, 256)
    return sum(
        conv(size, after, before) + conv(size, after, after) + conv(size, after, before, kernel=1)
        for size, before, after in stages
    )


FIRST = conv(32, 16, 3)  # of the networks with three stages
FURTHER = 2 * (conv(32, 64, 64) + conv(16, 128, 128) + conv(8, 256, 256))  # a block a stage
LAST = 256 * 100
SIZES = {
    "VGG7": conv(32, 64, 3) + conv(16, 128, 64) + conv(8, 256, 128) + conv(4, 512, 256)
    + conv(4, 512, 512) + 2048 * 1024 + 1024 * 100,
    "VGG16": conv(32, 64, 3) + conv(32, 64, 64)
    + conv(16, 128, 64) + conv(16, 128, 128)
    + conv(8, 256, 128) + 2 * conv(8, 256, 256)
    + conv(4, 512, 256) + 2 * conv(4, 512, 512)
    + 3 * conv(4, 512, 512)
    + 2048 * 1024 + 1024 * 1024 + 1024 * 100,
    "WRN-10-4": FIRST + residuals(16) + LAST,
    "WRN-22-4": FIRST + residuals(16) + 2 * FURTHER + LAST,
    "ResNet-small": FIRST + residuals(16) + LAST,
    "MobileNet": FIRST + LAST
    + conv(32, 16, 1) + conv(32, 64, 16, kernel=1)
    + conv(16, 64, 1) + conv(16, 128, 64, kernel=1)
    + conv(16, 128, 1) + conv(16, 128, 128, kernel=1)
    + conv(8, 128, 1) + conv(8, 256, 128, kernel=1)
    + conv(8, 256, 1) + conv(8, 256, 256, kernel=1),
    "VGG-modified": FIRST + LAST
    + conv(32, 64, 16) + conv(32, 64, 64)
    + conv(16, 128, 64) + conv(16, 128, 128)
    + conv(8, 256, 128) + conv(8, 256, 256),
    "ResNet8": conv(32, 32, 3) + residuals(32) + LAST,
    "ResNet32": conv(32, 32, 3) + residuals(32) + 4 * FURTHER + LAST,
}  # fmt: skip


@every_network
def test_multiply_adds_are_those_counted_by_hand(name):
    with torch.device("meta"):
        model = build(name, 100)
    assert count_multiply_adds(model, 32) == SIZES[name]


def test_parameters_are_those_counted_by_hand():
    norms = 2 * (16 + 64 + 64 + 128 + 128 + 256 + 256)
    weights = 9 * (3 * 16 + 16 * 64 + 64 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 256 * 256)
    with torch.device("meta"):
        model = build("VGG-modified", 100)
    assert count_parameters(model) == weights + norms + 256 * 100 + 100


def test_counting_leaves_the_model_as_it_is():
    model = small("WRN-10-4")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    count_multiply_adds(model, 32)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("image_size", [32, 64])
@pytest.mark.parametrize("name", ["VGG7", "WRN-10-4"])
def test_rejects_images_of_another_size(name, image_size):
    model = small(name, image_size)
    needed = rf"`images` must have shape \(b, 3, {image_size}, {image_size}\); got "
    square = (image_size, image_size)
    for shape in [(2, 3, 48, 48), (2, 3, image_size, 48), (2, 1, *square), (3, *square)]:
        with pytest.raises(ValueError, match=needed + r"\(" + ", ".join(map(str, shape))):
            model(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "VGG8"}, r"`name` must be one of VGG16, .*ResNet8; got 'VGG8'"),
        ({"num_classes": 0}, r"`num_classes` must be an int ≥ 1; got 0"),
        ({"width": 0.0}, r"`width` must be above 0 and at most 4; got 0"),
        ({"width": float("nan")}, r"`width` must be above 0 and at most 4; got nan"),
        ({"image_size": 28}, r"`image_size` must be 32 or 64; got 28"),
    ],
)
@pytest.mark.parametrize("name", ["VGG7", "WRN-10-4"])
def test_rejects_unknown_names_and_sizes(name, change, message):
    with pytest.raises(ValueError, match=message):
        build(**({"name": name, "num_classes": 10} | change))


def test_rejects_a_vgg_without_hidden_layers():
    with pytest.raises(ValueError, match="`hidden_layers` must be an int ≥ 1; got 0"):
        VGG((1, 1, 1, 1, 1), 10, hidden_layers=0)


def test_page_shows_the_table_that_the_command_prints(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["networks.py"])
    networks.main()
    printed = capsys.readouterr().out
    assert all(f"\n| {name} |" in printed for name in NETWORKS)
    assert f"\n\n{printed}\n" in README.read_text(encoding="utf-8")


def test_command_refuses_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["networks.py", "--width", "9"])
    with pytest.raises(SystemExit, match=r"^networks\.py: `width` must be above 0 .*; got 9"):
        networks.main()
