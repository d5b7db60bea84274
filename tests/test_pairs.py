"""Teachers and students of many architectures: twenty steps of each pair train the student.

The first 13 pairs are those of the RepDistiller benchmark, with own heads for all, and as in the
paper where channels agree. Blocks, depths, strides and the relations between channels are theirs;
widths are a quarter of theirs or less, images have 16 × 16 pixels.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import nn

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss
from graph_kd.testing import assert_feature_hooks

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


class Network(nn.Sequential):
    """A chain of stem, stage1, stage2, … and head, and the channels of each stage."""

    def forward(self, x):
        for module in self:
            x = module(x)
            x = x[0] if isinstance(x, tuple) else x  # an LSTM returns its state besides
        return x


def stages(stem, incoming, block, widths, depths, strides, *, last=False):
    """Return a network; ``block(incoming, width, stride)`` makes one block of a stage.

    ``last`` says that channels are on the last axis, not on axis 1.
    """
    parts = OrderedDict(stem=stem)
    for s, (width, depth, stride) in enumerate(zip(widths, depths, strides, strict=True), start=1):
        blocks = [block(incoming, width, stride)]
        blocks += [block(width, width, 1) for _ in range(depth - 1)]
        parts[f"stage{s}"] = nn.Sequential(*blocks) if depth > 1 else blocks[0]
        incoming = width
    parts["pool"] = Pool(last)
    parts["classifier"] = nn.Linear(incoming, 5)
    network = Network(parts)
    network.widths = tuple(widths)
    return network


class Pool(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.last = last

    def forward(self, x):
        return x.flatten(1, -2).mean(1) if self.last else x.flatten(2).mean(2)


def conv(incoming, width, stride=1, *, size=3, groups=1, dims=2, relu=True):
    layer = CONVS[dims](incoming, width, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, NORMS[dims](width), *[nn.ReLU()] * relu)


pointwise = partial(conv, size=1)


def depthwise(width, stride, *, relu=False):
    return conv(width, width, stride, groups=width, relu=relu)


class Residual(nn.Module):
    def __init__(self, body, shortcut=None, *, before=None, after=None):
        super().__init__()
        self.before, self.body = before or nn.Identity(), body
        self.shortcut, self.after = shortcut or nn.Identity(), after or nn.Identity()

    def forward(self, x):
        x = self.before(x)
        return self.after(self.shortcut(x) + self.body(x))


def basic(incoming, width, stride, dims=2):
    body = nn.Sequential(
        conv(incoming, width, stride, dims=dims), conv(width, width, dims=dims, relu=False)
    )
    same = incoming == width and stride == 1
    shortcut = None if same else pointwise(incoming, width, stride, dims=dims, relu=False)
    return Residual(body, shortcut, after=nn.ReLU())


def bottleneck(incoming, width, stride):
    narrow = width // 4
    body = nn.Sequential(
        pointwise(incoming, narrow),
        conv(narrow, narrow, stride),
        pointwise(narrow, width, relu=False),
    )
    same = incoming == width and stride == 1
    shortcut = None if same else pointwise(incoming, width, stride, relu=False)
    return Residual(body, shortcut, after=nn.ReLU())


def wide(incoming, width, stride):
    """Pre-activation: where the channels change, the shortcut starts after the activation."""
    first = nn.Sequential(nn.BatchNorm2d(incoming), nn.ReLU())
    body = nn.Sequential(
        conv(incoming, width, stride), nn.Conv2d(width, width, 3, padding=1, bias=False)
    )
    if incoming == width and stride == 1:
        return Residual(nn.Sequential(first, body))
    return Residual(body, nn.Conv2d(incoming, width, 1, stride, bias=False), before=first)


def vgg_convs(incoming, width, stride, *, convs, dims=2):
    layers = [conv(incoming, width, dims=dims)]
    layers += [conv(width, width, dims=dims) for _ in range(convs - 1)]
    return nn.Sequential(*[POOLS[dims](2)] * (stride == 2), *layers)


def inverted_residual(incoming, width, stride):
    body = nn.Sequential(
        pointwise(incoming, 6 * incoming),
        depthwise(6 * incoming, stride, relu=True),
        pointwise(6 * incoming, width, relu=False),
    )
    return Residual(body) if incoming == width and stride == 1 else body


def shuffle(groups):
    return Rearrange("b (g c) h w -> b (c g) h w", g=groups)


class ShuffleV1(nn.Module):
    def __init__(self, incoming, width, stride):
        super().__init__()
        self.stride = stride
        outgoing, narrow = (width - incoming if stride == 2 else width), width // 4
        self.body = nn.Sequential(
            pointwise(incoming, narrow, groups=3),
            shuffle(3),
            depthwise(narrow, stride),
            pointwise(narrow, outgoing, groups=3, relu=False),
        )

    def forward(self, x):
        y = self.body(x)
        if self.stride == 1:
            return (x + y).relu()
        return torch.cat([y, nn.functional.avg_pool2d(x, 3, 2, 1)], 1).relu()


class ShuffleV2(nn.Module):
    def __init__(self, incoming, width, stride):
        super().__init__()
        half = width // 2
        inside = half if stride == 1 else incoming
        self.body = nn.Sequential(
            pointwise(inside, half), depthwise(half, stride), pointwise(half, half)
        )
        self.shortcut = nn.Identity()
        if stride == 2:
            self.shortcut = nn.Sequential(depthwise(incoming, 2), pointwise(incoming, half))
        self.split, self.shuffle = stride == 1, shuffle(2)

    def forward(self, x):
        left, right = x.chunk(2, 1) if self.split else (x, x)
        return self.shuffle(torch.cat([self.shortcut(left), self.body(right)], 1))


def attention(width):
    return nn.TransformerEncoderLayer(
        width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


class Swin(nn.Module):
    """Attention in windows of 2 × 2, then in shifted ones; patches are merged before, ``b h w c``.

    Positions and the mask of the windows that wrap around are left out.
    """

    def __init__(self, incoming, width, stride):
        super().__init__()
        self.merge = nn.Identity()
        if stride == 2:
            self.merge = nn.Sequential(
                Rearrange("b (h p) (w q) c -> b h w (p q c)", p=2, q=2),
                nn.LayerNorm(4 * incoming),
                nn.Linear(4 * incoming, width, bias=False),
            )
        self.windows = nn.ModuleList([attention(width), attention(width)])

    def forward(self, x):
        x = self.merge(x)
        for shift, layer in enumerate(self.windows):
            x = x.roll((-shift, -shift), (1, 2))
            rows = layer(rearrange(x, "b (h p) (w q) c -> (b h w) (p q) c", p=2, q=2))
            h, w = x.shape[1] // 2, x.shape[2] // 2
            x = rearrange(rows, "(b h w) (p q) c -> b (h p) (w q) c", h=h, w=w, p=2, q=2)
            x = x.roll((shift, shift), (1, 2))
        return x


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x):
        return self.gain * x


def convnext(incoming, width, stride):
    """ConvNeXt's block with its layer scale, on ``b h w c``; 7 × 7 is 3 × 3 here."""
    body = nn.Sequential(
        Rearrange("b h w c -> b c h w"),
        nn.Conv2d(width, width, 3, padding=1, groups=width),
        Rearrange("b c h w -> b h w c"),
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width),
        nn.GELU(),
        nn.Linear(4 * width, width),
        Scale(width),
    )
    patches = Rearrange("b (h p) (w q) c -> b h w (p q c)", p=stride, q=stride)
    size = incoming * stride**2
    down = nn.Sequential(nn.LayerNorm(incoming), patches, nn.Linear(size, width))
    return Residual(body, before=down if stride > 1 or incoming != width else None)


def wrn(depth, factor):
    widths = [4 * factor, 8 * factor, 16 * factor]
    stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    return stages(stem, 4, wide, widths, [(depth - 4) // 6] * 3, [1, 2, 2])


def resnet(depth, factor=1):
    widths = [4 * factor, 8 * factor, 16 * factor]
    return stages(conv(3, 4 * factor), widths[0], basic, widths, [(depth - 2) // 6] * 3, [1, 2, 2])


def resnet50():
    return stages(conv(3, 4), 4, bottleneck, [16, 32, 64, 128], [3, 4, 6, 3], [1, 2, 2, 2])


def vgg(convs):
    block = partial(vgg_convs, convs=convs)
    return stages(nn.Identity(), 3, block, [8, 16, 32, 64, 64], [1] * 5, [1, 2, 2, 2, 1])


def mobilenet():
    widths, depths = [4, 6, 8, 16, 24, 40, 80], [1, 2, 3, 4, 3, 3, 1]
    return stages(conv(3, 4), 4, inverted_residual, widths, depths, [1, 2, 2, 2, 1, 2, 1])


def shufflenet1():
    return stages(pointwise(3, 6), 6, ShuffleV1, [24, 48, 96], [4, 8, 4], [2, 2, 2])


def shufflenet2():
    return stages(pointwise(3, 6), 6, ShuffleV2, [12, 24, 48], [4, 8, 4], [2, 2, 2])


def vit(width, depth):
    patches = nn.Sequential(nn.Conv2d(3, width, 4, 4), Rearrange("b c h w -> b (h w) c"))
    widths, ones = [width] * depth, [1] * depth
    return stages(patches, width, lambda *_: attention(width), widths, ones, ones, last=True)


def channels_last(block, width, depth):
    stem = nn.Sequential(nn.Conv2d(3, width, 2, 2), Rearrange("b c h w -> b h w c"))
    widths = [width, 2 * width, 4 * width]
    return stages(stem, width, block, widths, [depth] * 3, [1, 2, 2], last=True)


def cnn(width, convs, dims):
    block, widths = partial(vgg_convs, convs=convs, dims=dims), [width, 2 * width, 4 * width]
    return stages(nn.Identity(), 3, block, widths, [1] * 3, [1, 2, 2])


def lstm(width, layers):
    def block(incoming, width, _):
        return nn.LSTM(incoming, width, layers, batch_first=True)

    return stages(nn.Identity(), 3, block, [width] * 3, [1] * 3, [1] * 3, last=True)


class Pair(NamedTuple):
    """``layers``: the stages that are sensing points, "teacher's student's" if they differ."""

    name: str
    teacher: Callable[[], Network]
    student: Callable[[], Network]
    layers: str
    shape: tuple[int, ...] = (10, 3, 16, 16)
    channel_dim: int | tuple[int | None, int | None] | None = None
    select: object = None


EQUAL = [
    Pair("WRN-40-2, WRN-16-2", lambda: wrn(40, 2), lambda: wrn(16, 2), "123"),
    Pair("resnet56, resnet20", lambda: resnet(56), lambda: resnet(20), "123"),
    Pair("resnet110, resnet20", lambda: resnet(110), lambda: resnet(20), "123"),
    Pair("resnet110, resnet32", lambda: resnet(110), lambda: resnet(32), "123"),
    Pair("resnet32x4, resnet8x4", lambda: resnet(32, 4), lambda: resnet(8, 4), "123"),
    Pair("vgg13, vgg8", lambda: vgg(2), lambda: vgg(1), "12345"),
]
OTHER = [
    Pair("WRN-40-2, WRN-40-1", lambda: wrn(40, 2), lambda: wrn(40, 1), "123"),
    Pair("vgg13, MobileNetV2", lambda: vgg(2), mobilenet, "1234 2357"),
    Pair("ResNet50, MobileNetV2", resnet50, mobilenet, "1234 2357"),
    Pair("ResNet50, vgg8", resnet50, lambda: vgg(1), "1234 1235"),
    Pair("resnet32x4, ShuffleNetV1", lambda: resnet(32, 4), shufflenet1, "123"),
    Pair("resnet32x4, ShuffleNetV2", lambda: resnet(32, 4), shufflenet2, "123"),
    Pair("WRN-40-2, ShuffleNetV1", lambda: wrn(40, 2), shufflenet1, "123"),
    Pair("ViT, ViT", lambda: vit(32, 6), lambda: vit(16, 3), "246 123"),
    Pair("ViT, CNN", lambda: vit(32, 6), lambda: vgg(1), "246 135"),
    Pair("CNN, ViT", lambda: vgg(2), lambda: vit(16, 3), "135 123"),
    Pair("Swin, Swin", lambda: swin(16, 2), lambda: swin(8, 1), "123", channel_dim=-1),
    Pair("Swin, CNN", lambda: swin(16, 2), lambda: vgg(1), "123", channel_dim=(-1, None)),
    Pair("ConvNeXt", lambda: convnexts(16, 3), lambda: convnexts(8, 1), "123", channel_dim=-1),
    Pair("3-D", lambda: cnn(8, 2, 3), lambda: cnn(4, 1, 3), "123", (8, 3, 4, 8, 8)),
    Pair("1-D", lambda: cnn(8, 2, 1), lambda: cnn(4, 1, 1), "123", (10, 3, 32), select=lambda x: x.mT),
    Pair("LSTM", lambda: lstm(16, 2), lambda: lstm(8, 1), "123", (10, 12, 3), select=0),
]
swin, convnexts = partial(channels_last, Swin), partial(channels_last, convnext)
CASES = [pytest.param(pair, True, id=f"{pair.name}") for pair in EQUAL + OTHER]
CASES += [pytest.param(pair, False, id=f"{pair.name}, as in the paper") for pair in EQUAL]


@pytest.mark.parametrize(("pair", "own_heads"), CASES)
def test_twenty_steps_train_the_student(pair, own_heads):
    torch.manual_seed(0)
    teacher, student = pair.teacher().eval().requires_grad_(False), pair.student()
    of_both = [[int(s) for s in numbers] for numbers in pair.layers.split()]
    numbers = {"teacher": of_both[0], "student": of_both[-1]}
    layers = {role: [f"stage{s}" for s in stages] for role, stages in numbers.items()}
    channels = [teacher.widths[s - 1] for s in numbers["teacher"]]
    settings = {
        "student_channels": [student.widths[s - 1] for s in numbers["student"]] if own_heads else None,
        "channel_dim": pair.channel_dim,
    }
    sample, labels = torch.randn(pair.shape), torch.randint(5, pair.shape[:1])
    sample += torch.randn(*pair.shape[:2], *[1] * len(pair.shape[2:]))
    assert_feature_hooks(
        student,
        teacher,
        layers["student"],
        layers["teacher"],
        sample,
        student_select=pair.select,
        teacher_select=pair.select,
        **settings,
    )
    of_student = FeatureHooks(student, layers["student"], select=pair.select)
    of_teacher = FeatureHooks(teacher, layers["teacher"], select=pair.select)
    transfer = GraphTransferLoss(channels, 4, squash="scaled", **settings)
    for module in transfer.estimators.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 0.5  # the running statistics settle in ten steps
    heads = torch.optim.Adam(transfer.estimators.parameters(), 1e-2)
    for _ in range(10):
        teacher(sample)
        loss = transfer.estimator_loss(of_teacher.features)
        assert loss.isfinite()
        heads.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in transfer.estimators.parameters())
        heads.step()

    trained = [*student.parameters(), *transfer.student_heads.parameters()]
    optimizer = GatedGradClip(torch.optim.Adam(trained, 3e-3), bound=10.0)
    losses = []
    for step in range(20):
        task = nn.functional.cross_entropy(student(sample), labels)
        teacher(sample)
        loss = transfer(of_student.features, of_teacher.features)
        if step == 0:
            check_gradients(loss, student, layers["student"][-1], transfer)
        losses.append(loss.item())
        assert task.isfinite()
        assert loss.isfinite()
        optimizer.zero_grad()
        optimizer.backward(task, loss)
        assert all(p.grad.isfinite().all() for p in trained)
        optimizer.step()
    assert optimizer.skipped == 0  # no transfer gradient was infinite or NaN
    print(f"RATIO {pair.name} {own_heads} {losses[0]:.3f} {losses[-1] / losses[0]:.3f}")
    assert losses[-1] < 0.9 * losses[0]


def check_gradients(loss, student, last, transfer):
    """Assert that the loss reaches the student up to its last sensing point, and its heads."""
    parts = [name for name, _ in student.named_children()]
    reached = {f"{p}." for p in parts[: parts.index(last) + 1]}
    named = {f"student.{name}": p for name, p in student.named_parameters()}
    wanted = {name for name in named if name.split(".", 1)[1].startswith(tuple(reached))}
    of_heads = {f"heads.{name}": p for name, p in transfer.student_heads.named_parameters()}
    wanted |= set(of_heads)
    named |= of_heads
    gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    for name, gradient in zip(named, gradients, strict=True):
        assert (gradient is not None) == (name in wanted), name
        if gradient is not None:
            assert gradient.isfinite().all(), name
            # A bias of phi adds the same to all logits of a row, which the softmax cancels.
            assert gradient.any() or name.endswith("phi.1.bias"), name
