"""Teachers and students of many architectures: twenty steps of each pair train the student.

The first 13 pairs are those of the RepDistiller benchmark, with own heads for all, and as in the
paper where channels agree. Blocks, depths and strides of the stages are theirs, and so is how
channels grow from stage to stage. Widths are a quarter of theirs or less, images are 16 × 16, and
the stem does not halve them.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from einops import rearrange
from einops.layers.torch import Rearrange, Reduce
from torch import nn

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss
from graph_kd.testing import assert_feature_hooks

SAME = nn.Identity()
LAST = "b ... c -> b c"  # channels on the last axis


class Network(nn.Sequential):
    """A chain of stem, stage1, stage2, … and head, and the channels of each stage."""

    def forward(self, x):
        for module in self:
            x = module(x)
            x = x[0] if isinstance(x, tuple) else x  # an LSTM returns its state besides
        return x


def stages(stem, incoming, block, widths, depths, strides, *, pool="b c ... -> b c"):
    """Return a network; ``block(incoming, width, stride)`` makes one block of a stage."""
    parts = OrderedDict(stem=stem(3, incoming))
    for s, (width, depth, stride) in enumerate(zip(widths, depths, strides, strict=True), start=1):
        blocks = [block(incoming, width, stride)]
        blocks += [block(width, width, 1) for _ in range(depth - 1)]
        parts[f"stage{s}"] = nn.Sequential(*blocks) if depth > 1 else blocks[0]
        incoming = width
    parts["classifier"] = nn.Sequential(Reduce(pool, "mean"), nn.Linear(incoming, 5))
    network = Network(parts)
    network.widths = dict(zip(list(parts)[1:-1], widths, strict=True))
    return network


def conv(incoming, width, stride=1, *, size=3, groups=1, dims=2, relu=True):
    kind, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
    layer = kind(incoming, width, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, norm(width), *[nn.ReLU()] * relu)


pointwise = partial(conv, size=1)


def depthwise(width, stride, *, relu=False):
    return conv(width, width, stride, groups=width, relu=relu)


class Residual(nn.Module):
    def __init__(self, body, shortcut=SAME, *, before=SAME, after=SAME):
        super().__init__()
        self.before, self.body, self.shortcut, self.after = before, body, shortcut, after

    def forward(self, x):
        x = self.before(x)
        return self.after(self.shortcut(x) + self.body(x))


def post_activation(incoming, width, stride, *convs):
    same = incoming == width and stride == 1
    shortcut = SAME if same else pointwise(incoming, width, stride, relu=False)
    return Residual(nn.Sequential(*convs), shortcut, after=nn.ReLU())


def basic(incoming, width, stride):
    convs = conv(incoming, width, stride), conv(width, width, relu=False)
    return post_activation(incoming, width, stride, *convs)


def bottleneck(incoming, width, stride):
    narrow = width // 4
    convs = pointwise(incoming, narrow), conv(narrow, narrow, stride)
    return post_activation(incoming, width, stride, *convs, pointwise(narrow, width, relu=False))


def wide(incoming, width, stride):
    """Pre-activation: where the channels change, the shortcut starts after the activation."""
    first = nn.Sequential(nn.BatchNorm2d(incoming), nn.ReLU())
    second = nn.Conv2d(width, width, 3, padding=1, bias=False)
    body = nn.Sequential(conv(incoming, width, stride), second)
    if incoming == width and stride == 1:
        return Residual(nn.Sequential(first, body))
    return Residual(body, nn.Conv2d(incoming, width, 1, stride, bias=False), before=first)


def vgg_convs(incoming, width, stride, *, convs, dims=2):
    layers = [conv(incoming, width, dims=dims)]
    layers += [conv(width, width, dims=dims) for _ in range(convs - 1)]
    return nn.Sequential(*[getattr(nn, f"MaxPool{dims}d")(2)] * (stride == 2), *layers)


def inverted_residual(incoming, width, stride):
    inner = 6 * incoming
    convs = pointwise(incoming, inner), depthwise(inner, stride, relu=True)
    body = nn.Sequential(*convs, pointwise(inner, width, relu=False))
    return Residual(body) if incoming == width and stride == 1 else body


def shuffle(groups):
    return Rearrange("b (g c) h w -> b (c g) h w", g=groups)


class ShuffleV1(nn.Module):
    def __init__(self, incoming, width, stride):
        super().__init__()
        self.stride = stride
        outgoing, narrow = (width - incoming if stride == 2 else width), width // 4
        first = pointwise(incoming, narrow, groups=3), shuffle(3), depthwise(narrow, stride)
        self.body = nn.Sequential(*first, pointwise(narrow, outgoing, groups=3, relu=False))

    def forward(self, x):
        y = self.body(x)
        if self.stride == 1:
            return (x + y).relu()
        return torch.cat([y, nn.functional.avg_pool2d(x, 3, 2, 1)], 1).relu()


class ShuffleV2(nn.Module):
    def __init__(self, incoming, width, stride):
        super().__init__()
        self.split, half = stride == 1, width // 2
        inside = half if self.split else incoming
        convs = pointwise(inside, half), depthwise(half, stride), pointwise(half, half)
        down = [] if self.split else [depthwise(inside, 2), pointwise(inside, half)]
        self.left, self.right = nn.Sequential(*down), nn.Sequential(*convs)
        self.shuffle = shuffle(2)

    def forward(self, x):
        left, right = x.chunk(2, 1) if self.split else (x, x)
        return self.shuffle(torch.cat([self.left(left), self.right(right)], 1))


def attention(width):
    return nn.TransformerEncoderLayer(
        width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


class Swin(nn.Module):
    """Patches are merged, then attention in windows of 2 × 2 and in shifted ones, ``b h w c``.

    Positions and the mask of the windows that wrap around are left out.
    """

    def __init__(self, incoming, width, stride):
        super().__init__()
        merge = Rearrange("b (h p) (w q) c -> b h w (p q c)", p=stride, q=stride)
        size = stride**2 * incoming
        self.merge = nn.Sequential(merge, nn.LayerNorm(size), nn.Linear(size, width, bias=False))
        self.windows = nn.ModuleList([attention(width), attention(width)])

    def forward(self, x):
        x = self.merge(x)
        for shift, layer in enumerate(self.windows):
            x = x.roll((-shift, -shift), (1, 2))
            rows = layer(rearrange(x, "b (h p) (w q) c -> (b h w) (p q) c", p=2, q=2))
            sizes = {"h": x.shape[1] // 2, "w": x.shape[2] // 2, "p": 2}
            x = rearrange(rows, "(b h w) (p q) c -> b (h p) (w q) c", **sizes)
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
    return Residual(body, before=down if stride == 2 else SAME)


def doubling(width):
    return [width, 2 * width, 4 * width]


def wrn(depth, factor):
    stem, depths = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False), [(depth - 4) // 6] * 3
    return stages(stem, 4, wide, doubling(4 * factor), depths, [1, 2, 2])


def resnet(depth, factor=1):
    width, depths = 4 * factor, [(depth - 2) // 6] * 3
    return stages(conv, width, basic, doubling(width), depths, [1, 2, 2])


def vgg(convs):
    block, strides = partial(vgg_convs, convs=convs), [1, 2, 2, 2, 1]
    return stages(nn.Identity, 3, block, [8, 16, 32, 64, 64], [1] * 5, strides)


resnet50 = partial(stages, conv, 4, bottleneck, [16, 32, 64, 128], [3, 4, 6, 3], [1, 2, 2, 2])
shufflenet1 = partial(stages, pointwise, 6, ShuffleV1, [24, 48, 96], [4, 8, 4], [2, 2, 2])
shufflenet2 = partial(stages, pointwise, 6, ShuffleV2, [12, 24, 48], [4, 8, 4], [2, 2, 2])
MOBILENET = [4, 6, 8, 16, 24, 40, 80], [1, 2, 3, 4, 3, 3, 1], [1, 1, 2, 2, 1, 2, 1]
mobilenet = partial(stages, conv, 4, inverted_residual, *MOBILENET)


def patches(incoming, width, *, size, axes):
    cut = nn.Conv2d(incoming, width, size, size)
    return nn.Sequential(cut, Rearrange(f"b c h w -> {axes}"))


def vit(width, depth):
    stem, ones = partial(patches, size=4, axes="b (h w) c"), [1] * depth
    return stages(stem, width, lambda *_: attention(width), [width] * depth, ones, ones, pool=LAST)


def channels_last(block, width, depth):
    stem = partial(patches, size=2, axes="b h w c")
    return stages(stem, width, block, doubling(width), [depth] * 3, [1, 2, 2], pool=LAST)


swin, convnexts = partial(channels_last, Swin), partial(channels_last, convnext)


def cnn(width, convs, dims):
    block = partial(vgg_convs, convs=convs, dims=dims)
    return stages(nn.Identity, 3, block, doubling(width), [1] * 3, [1, 2, 2])


def lstm(width, layers):
    def block(incoming, width, _):
        return nn.LSTM(incoming, width, layers, batch_first=True)

    return stages(nn.Identity, 3, block, [width] * 3, [1] * 3, [1] * 3, pool=LAST)


def transposed(x):
    return x.mT


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
    Pair("1-D", lambda: cnn(8, 2, 1), lambda: cnn(4, 1, 1), "123", (10, 3, 32), select=transposed),
    Pair("LSTM", lambda: lstm(16, 2), lambda: lstm(8, 1), "123", (10, 12, 3), select=0),
]
CASES = [pytest.param(pair, True, id=pair.name) for pair in EQUAL + OTHER]
CASES += [pytest.param(pair, False, id=f"{pair.name}, as in the paper") for pair in EQUAL]


@pytest.mark.parametrize(("pair", "own_heads"), CASES)
def test_twenty_steps_train_the_student(pair, own_heads):
    torch.manual_seed(0)
    teacher, student = pair.teacher().eval().requires_grad_(False), pair.student()
    theirs, *_, ours = [[f"stage{s}" for s in digits] for digits in pair.layers.split() * 2]
    widths = [student.widths[layer] for layer in ours] if own_heads else None
    settings = {"channel_dim": pair.channel_dim, "student_channels": widths}
    labels, sample = torch.randint(5, pair.shape[:1]), torch.randn(pair.shape)
    sample += torch.randn(*pair.shape[:2], *[1] * len(pair.shape[2:]))  # samples that differ
    selects = {"student_select": pair.select, "teacher_select": pair.select}
    assert_feature_hooks(student, teacher, ours, theirs, sample, **selects, **settings)

    of_student = FeatureHooks(student, ours, select=pair.select)
    of_teacher = FeatureHooks(teacher, theirs, select=pair.select)
    channels = [teacher.widths[layer] for layer in theirs]
    transfer = GraphTransferLoss(channels, 4, squash="scaled", **settings)
    train_estimators(transfer, teacher, of_teacher, sample)
    trained = [*student.parameters(), *transfer.student_heads.parameters()]
    optimizer = GatedGradClip(torch.optim.Adam(trained, 3e-3), bound=100.0)
    losses = []
    for step in range(20):
        task = nn.functional.cross_entropy(student(sample), labels)
        teacher(sample)
        loss = transfer(of_student.features, of_teacher.features)
        if step == 0:
            check_gradients(loss, student, ours[-1], transfer.student_heads)
        optimizer.zero_grad()
        optimizer.backward(task, loss)
        assert all(p.grad.isfinite().all() for p in trained)
        optimizer.step()
        losses.append(loss.item())
        assert task.isfinite()
        assert loss.isfinite()
    assert optimizer.skipped == 0  # else a transfer gradient was not finite
    assert losses[-1] < (0.5 if own_heads else 0.9) * losses[0]  # own heads learn fast


def train_estimators(transfer, teacher, of_teacher, sample):
    for module in transfer.estimators.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 0.5  # running statistics settle within ten steps
    optimizer = torch.optim.Adam(transfer.estimators.parameters(), 1e-2)
    for _ in range(10):
        teacher(sample)
        loss = transfer.estimator_loss(of_teacher.features)
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in transfer.estimators.parameters())
        optimizer.step()


def check_gradients(loss, student, last, heads):
    """Assert that the loss reaches the student up to its last sensing point, and its heads."""
    trunk = student[: 1 + [name for name, _ in student.named_children()].index(last)]
    named = dict([*trunk.named_parameters(), *heads.named_parameters()])
    gradients = torch.autograd.grad(loss, named.values(), retain_graph=True, allow_unused=True)
    for name, gradient in zip(named, gradients, strict=True):
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        # The bias of phi's batch norm adds the same to each row's logits; the softmax cancels it.
        assert gradient.any() or name.endswith("phi.1.bias"), name
