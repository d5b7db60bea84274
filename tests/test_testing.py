"""assert_feature_hooks passes on right hooks without a trace, and names the layer of wrong ones."""

import copy
import re
from collections import UserDict
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from graph_kd.testing import assert_feature_hooks

# torch announces the ends of torch.jit and of quantisation, and changes of nested tensors.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:torch.quantize_per_tensor:UserWarning",
    "ignore:The PyTorch API of nested tensors:UserWarning",
)
randn, chain = torch.randn, nn.Sequential


class Apply(nn.Module):
    """A function, of the output of a layer where one is given."""

    def __init__(self, function, before=None):
        super().__init__()
        self.function = function
        self.before = nn.Identity() if before is None else before

    def forward(self, x):
        return self.function(self.before(x))


class Asserts(nn.Module):
    def __init__(self, message):
        super().__init__()
        self.message = message

    def forward(self, _x):
        raise AssertionError(self.message)


class TakesTwo(nn.Module):
    """Has two inputs, one of which may come once for all samples, and a number."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, position, x=None, scale=1.0):
        return self.linear(x + position) * scale


class Counts(nn.Linear):
    """Replaces one buffer in every forward pass, and makes another in the first."""

    def __init__(self):
        super().__init__(6, 8)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        if not hasattr(self, "positions"):
            self.register_buffer("positions", torch.arange(x.shape[1]), persistent=False)
        return super().forward(x + self.positions)


class LayerNorm2d(nn.LayerNorm):
    """Derives from a layer of torch, and has its channels elsewhere."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OwnLinear(nn.Linear):
    pass


def stages(*extra, width=8):
    return chain(nn.Linear(6, width), nn.Tanh(), *extra, nn.Linear(width, 4))


def frozen():
    return chain(nn.Linear(6, 8).requires_grad_(False), nn.Tanh(), nn.Linear(8, 4))


def output_of(function):
    """Return a model whose layer "1" gives the function of eight features."""
    return chain(nn.Linear(6, 8), Apply(function))


def convolutions(width=16, *, stride=1):
    return chain(
        chain(nn.Conv2d(3, 8, 3, stride), nn.BatchNorm2d(8), nn.ReLU()),
        chain(nn.Conv2d(8, width, 3), nn.BatchNorm2d(width), nn.ReLU()),
        chain(nn.Conv2d(width, 12, 1), nn.Dropout(0.5)),
        chain(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    )


def tokens():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    return chain(nn.Linear(6, 8), encoder, nn.Linear(8, 10))


def channels_last():
    return chain(nn.Linear(3, 8), nn.ReLU(), chain(nn.Linear(8, 8), nn.GELU()))


def channels_first():
    """Return a model that takes the same maps, and gives them with the channels first."""
    return chain(Apply(lambda x: x.permute(0, 3, 1, 2)), nn.Conv2d(3, 8, 1))


def quantised(x):
    return torch.quantize_per_tensor(x.detach(), 0.1, 0, torch.quint8)


def snapshot(model):
    """Return everything that must be as before."""
    modules, parameters = list(model.modules()), list(model.parameters())
    return {
        "state": copy.deepcopy(model.state_dict()),
        "gradients": [None if p.grad is None else p.grad.clone() for p in parameters],
        "flags": [m.training for m in modules] + [p.requires_grad for p in parameters],
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        "random": torch.get_rng_state(),
    }


@contextmanager
def no_trace(*models):
    """Assert that state, gradients, flags, hooks, buffers and the random state stay."""
    models = [model for model in models if isinstance(model, nn.Module)]
    before, buffers = [snapshot(m) for m in models], [list(m.buffers()) for m in models]
    yield
    for model, kept, own in zip(models, before, buffers, strict=True):
        torch.testing.assert_close(snapshot(model), kept, rtol=0, atol=0)
        if not any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
            assert all(any(b is buffer for b in model.buffers()) for buffer in own)


VECTORS, TOKENS, LONG, SERIES = (4, 6), (4, 4, 6), (4, 7, 6), (4, 1, 9)
IMAGES, LAST, SQUARE_LAST = (4, 3, 12, 12), (4, 9, 9, 3), (4, 8, 8, 3)


def pair(student, teacher=None, layers="0", teacher_layers=None, sample=VECTORS, **settings):
    """Return the arguments of a check; a shape stands for a sample."""
    teacher = stages() if teacher is None else teacher
    teacher_layers = layers if teacher_layers is None else teacher_layers
    shape = isinstance(sample, tuple) and all(isinstance(size, int) for size in sample)
    return {
        "student": student,
        "teacher": teacher,
        "student_layers": layers.split() if isinstance(layers, str) else layers,
        "teacher_layers": teacher_layers.split() if isinstance(layers, str) else teacher_layers,
        "sample": randn(sample) if shape else sample,
        **settings,
    }


def twins(make, layers="0", sample=VECTORS, **settings):
    return lambda: pair(make(), make().eval(), layers, sample=sample, **settings)


# Right hooks pass.

position, x, scale = randn(1, 5, 6), randn(4, 5, 6), torch.tensor(2.0)
RIGHT = {
    "images": twins(convolutions, "0.0 1.1 3.0", IMAGES),
    "of other sizes and names": lambda: pair(
        convolutions(10), convolutions(stride=2).eval(), ("0.0", "2"), ("0", "2.0"), IMAGES
    ),
    "tokens": twins(tokens, "0 1 2", LONG),
    "vectors": twins(lambda: chain(nn.Linear(6, 8), nn.BatchNorm1d(8)), "0 1"),
    "video": twins(lambda: chain(nn.Conv3d(2, 4, 2), nn.ReLU()), "0 1", (4, 2, 4, 5, 5)),
    "one sample": twins(stages, "0", (1, 6)),
    "one batch size alone": twins(lambda: output_of(lambda x: x.reshape(4, 8)), "1"),
    "keywords": twins(TakesTwo, "linear", {"position": position, "scale": scale, "x": x}),
    "user dict": twins(TakesTwo, "linear", UserDict(x=x, position=x)),
    "a scalar first": twins(TakesTwo, "linear", {"scale": scale, "position": position, "x": x}),
    "a number": twins(TakesTwo, "linear", {"scale": 2.0, "x": x, "position": x}),
    "tuple": twins(TakesTwo, "linear", (position, x)),
    "list": twins(TakesTwo, "linear", [x, x, 2.0]),
    "dropout of the teacher": lambda: pair(tokens(), tokens(), "1", sample=TOKENS),
    "a frozen teacher": lambda: pair(stages(), stages().requires_grad_(False)),
    "a detached teacher": lambda: pair(stages(), output_of(lambda x: x.detach()), "1"),
    "trained behind frozen layers": twins(frozen, "2"),
    "buffers replaced and made": twins(lambda: chain(Counts())),
    "compiled": lambda: pair(stages(), torch.compile(stages(), backend="eager"), "0 1"),
    "scripted parts": twins(
        lambda: stages(torch.jit.script(chain(nn.Linear(8, 8), nn.BatchNorm1d(8)))), "0 3"
    ),
    "in place": twins(lambda: chain(nn.Linear(6, 8), nn.ReLU(inplace=True)), "1"),
    "channels last": twins(channels_last, "0 1 2", LAST, channel_dim=3),
    "as high as channels": twins(channels_last, "0 1 2", SQUARE_LAST, channel_dim=-1),
    "channels last in one": lambda: pair(
        channels_last(), channels_first(), "0", "1", LAST, channel_dim=(None, -1)
    ),
    "quantised": lambda: pair(
        stages(), output_of(quantised), "1", teacher_select=lambda output: output.dequantize()
    ),
    "channels of the student": lambda: pair(stages(), stages(width=5), student_channels=(8,)),
    "selects": twins(
        lambda: chain(nn.Embedding(20, 10), nn.LSTM(10, 12, batch_first=True)),
        "1",
        torch.randint(20, (4, 10)),
        student_select=0,
        teacher_select=[0],
    ),
    # Shapes that happen to agree raise no alarm.
    "rms norm": twins(lambda: chain(nn.Linear(8, 8), nn.RMSNorm(8)), "1", (4, 5, 8)),
    "glu": twins(lambda: chain(nn.Linear(8, 32), nn.GLU()), "1", (4, 32, 8)),
    "shuffle": twins(lambda: chain(nn.Conv2d(3, 32, 1), nn.PixelShuffle(2)), "1", (4, 3, 16, 20)),
    "pool": twins(lambda: chain(nn.Linear(6, 10), nn.AdaptiveAvgPool1d(7)), "1", (4, 10, 6)),
    "instance norm": twins(lambda: chain(nn.Conv2d(3, 3, 1), nn.InstanceNorm2d(3)), "1", IMAGES),
    "joined maps": twins(
        lambda: chain(Apply(lambda x: torch.cat([x, -x], 1), nn.Conv2d(3, 9, 1))), "0", (4, 3, 9, 9)
    ),
    "norm of a whole map": twins(
        lambda: chain(nn.Conv2d(3, 5, 1), nn.LayerNorm([5, 12, 12]), nn.ReLU()), "2", IMAGES
    ),
    "block of linear layers": twins(
        lambda: chain(Apply(lambda x: x.permute(0, 3, 1, 2), channels_last())), "0", SQUARE_LAST
    ),
    "own norm": twins(lambda: chain(nn.Conv2d(3, 9, 1), LayerNorm2d(9)), "1", (4, 3, 9, 9)),
    "own norm, other size": twins(lambda: chain(nn.Conv2d(3, 9, 1), LayerNorm2d(9)), "1", IMAGES),
}


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
@pytest.mark.parametrize("name", RIGHT)
def test_right_hooks_pass_and_leave_no_trace(name, mode):
    given = RIGHT[name]()
    student, sample = given["student"].train(mode == "train"), copy.deepcopy(given["sample"])
    student.register_forward_hook(lambda *_: None)
    for p in student.parameters():
        p.grad = torch.randn_like(p)
    modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    with modes.get(mode, torch.enable_grad)(), no_trace(student, given["teacher"]):
        assert_feature_hooks(**given)
        assert torch.is_grad_enabled() == (mode not in modes)
        assert torch.is_inference_mode_enabled() == (mode == "inference")
    torch.testing.assert_close(given["sample"], sample, rtol=0, atol=0)


# One of the models is wrong.


def fails(_x):
    raise KeyError("x")


def to_last(x):
    return x.permute(0, 2, 3, 1)


def sequences(layer):
    """Return a model that gives sequences first, for samples b n c."""
    return chain(nn.Linear(6, 8), Apply(lambda x: x.transpose(0, 1)), layer)


def sequences_of_two():
    """Return a model that gives sequences first, for positions and samples."""
    model = TakesTwo()
    model.linear = sequences(nn.Linear(8, 8))
    return model


def normed_tokens():
    return chain(Apply(lambda x: x.mT, chain(nn.Linear(6, 8), nn.LayerNorm((7, 8)))))


def gives(function):
    return lambda: output_of(function), "1", VECTORS


AXES = r"must give axes b c h w, b c t h w, b n c or b c with b = 4, as the sample; it gave shape "
BATCH = r"must have the batch on axis 0; with 4 samples and with 5 it gave 4 entries there\. "
FIRST = r"If the sequence comes first, build the layer with `batch_first=True`, or pass `role_sele"
AXIS = r"gave shape .*: axis 1, where the loss looks for the channels, has \d entries, but "
ON_3 = AXIS + r"\w+ gives 8 channels, on axis 3\. Pass `channel_dim=-1`, or for the role al"
RANK_3 = r"axis 2, .* on axis 1\. Maps of rank 3 are read as tokens b n c: pass `\w+_select="
# A message; the model, its layer and the shape of a sample.
WRONG = {
    "integer": (r"must be a floating.*; got torch\.int64\.", *gives(lambda x: x.argmax(1))),
    "none": ("gave NoneType, which is no tensor", *gives(lambda _: None)),
    "scalar": (AXES + r"\(\)\.$", *gives(lambda x: x.sum())),
    "one axis": (AXES + r"\(4,\)\.$", *gives(lambda x: x.sum(1))),
    "no batch axis": (AXES + r"\(8,\)\.$", *gives(lambda x: x.mean(0))),
    "batch of one": (AXES + r"\(1, 8\)\.$", *gives(lambda x: x[:1])),
    "batch last": (AXES + r"\(8, 4\)\.$", *gives(lambda x: x.mT)),
    "nested": (
        r"`output` must be a dense tensor; got a nested one\. .*`role_sele",
        *gives(lambda x: torch.nested.as_nested_tensor(list(x))),
    ),
    "sparse": (r"got a sparse one\. .*`role_sele", *gives(lambda x: x.to_sparse())),
    "six axes": (AXES + r"\(4, 2, 2, 2, 1, 1\)", *gives(lambda x: x.reshape(4, 2, 2, 2, 1, 1))),
    "failing": (r"raised KeyError: 'x'\. Does the sample have a batch axis", *gives(fails)),
    "in place": ("changed in place", lambda: stages(nn.ReLU(inplace=True)), "1", VECTORS),
    "tuple": ("gave tuple .*Pass `role_select=0`", lambda: chain(nn.GRU(6, 8)), "0", VECTORS),
    "unknown": (r"no 'm\.0\.1'\. The nearest names are '0\.1'\.$", convolutions, "m.0.1", IMAGES),
    "no module": ("`model` must be a torch.nn.Module; got NoneT", lambda: None, "0", VECTORS),
    # The batch is not on axis 0, even where the sequence is as long.
    "long": (rf"{AXES}\(7, 4, 8\)\. {FIRST}", lambda: sequences(nn.Linear(8, 8)), "2", LONG),
    "short": (BATCH + FIRST, lambda: sequences(nn.Linear(8, 8)), "2", TOKENS),
    # The channels are not where the loss looks for them.
    "linear": (ON_3, channels_last, "0", LAST),
    "as high as channels": (ON_3, channels_last, "0", SQUARE_LAST),
    "after linear": (ON_3, channels_last, "1", LAST),
    "block": (ON_3, channels_last, "2", LAST),
    "own linear": (ON_3, lambda: chain(OwnLinear(3, 8)), "0", LAST),
    "video": (ON_3.replace("3", "4"), channels_last, "0", (4, 5, 9, 9, 3)),
    "norm": (ON_3, lambda: chain(nn.Linear(3, 8), nn.LayerNorm(8)), "1", LAST),
    "permuted": (ON_3, lambda: chain(Apply(to_last, nn.Conv2d(3, 8, 1))), "0", (4, 3, 9, 9)),
    "as many samples": (ON_3, lambda: chain(Apply(to_last, nn.Conv2d(3, 8, 1))), "0", (8, 3, 9, 9)),
    "norm of two axes": (RANK_3, normed_tokens, "0", LONG),
    "conv": (RANK_3, lambda: chain(nn.Conv1d(1, 8, 3)), "0", (4, 1, 50)),
    "square": (RANK_3, lambda: chain(nn.Conv1d(1, 8, 1)), "0", (4, 1, 8)),
    "instance norm": (RANK_3, lambda: chain(nn.Conv1d(1, 8, 1), nn.InstanceNorm1d(8)), "1", SERIES),
    "group norm": (RANK_3, lambda: chain(nn.Conv1d(1, 8, 3), nn.GroupNorm(2, 8)), "1", SERIES),
}


def settings_in(message):
    """Return the settings that a message says to pass, each by itself."""
    found = re.findall(r"`((?:channel_dim|student_select|teacher_select)=[^`]*[^.`])`", message)
    found += [f"channel_dim={pair}" for pair in re.findall(r"alone `(.*?)`", message)]
    return [eval(f"dict({setting})") for setting in found]


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("name", WRONG)
def test_role_and_layer_of_a_wrong_model_are_named_and_the_advice_helps(name, role):
    message, make, layer, shape = WRONG[name]
    right = chain(Apply(lambda x: x.flatten(1)[:, :1]), nn.Linear(1, 8))  # takes any sample
    given = pair(right, right, "1", sample=shape) | {role: make(), f"{role}_layers": [layer]}
    with no_trace(given["student"], given["teacher"]), pytest.raises(AssertionError) as caught:
        assert_feature_hooks(**given)
    text = str(caught.value)
    assert re.match(rf"{role.capitalize()}( layer '{layer}':?|, layers \['{layer}'\]:) ", text)
    assert re.search(message.replace("role", role), text)
    advice = settings_in(text.partition(" If axis")[0])  # then how to skip the check
    assert bool(advice) == bool(re.search("_sele|role al", message))
    for settings in advice:
        assert_feature_hooks(**given, **settings)


# Two models that do not fit each other, and other arguments.


def widened(x):
    """Put seven channels last, where no layer of torch tells of them."""
    return x[..., :1].expand(*x.shape[:-1], 7)


def in_training(norm):
    student = chain(nn.Conv2d(3, 4, 1), chain(norm))
    return pair(student, copy.deepcopy(student), "1", sample=IMAGES)


def with_axis(channel_dim):
    return pair(channels_last(), channels_last(), sample=LAST, channel_dim=channel_dim)


OTHER = (
    r"^Student layer '{}' has {} channels \(shape \({}\)\), teacher layer '{}' has {} \(shape "
    r"\({}\)\); a sensing point needs the same number, or `student_channels` here and in GraphTr"
)
AXIS_3 = "If the {}'s channels are on axis 3: Pass `channel_dim=-1`"
NO_GRADIENT = r"^Student layer '{}' carries no gradient to the student's parameters\. .*frozen"
SHARED = "^Student layer '0' carries gradient to the teacher's parameters: the two models share t"
NORM = r"^Teacher: its norm '1\.0' is in training .*`teacher\.eval\(\)`"
NO_SAMPLE = "sample must be a tensor with a batch axis that is not empty, or a mapping, tuple or"
SELECT = r"^{0} layer '0' gave tuple .*`{1}_select=5` failed"
ONE_EACH = "^{0}, layers .*`{1}_select` must have one entry per layer"
model, cell = stages(), chain(nn.GRU(6, 8))
REFUSED = [
    # What comes once for the whole batch stays as it is when the batch grows.
    (
        "^Student layer 'linear' " + BATCH,
        pair(sequences_of_two(), sequences_of_two(), "linear", sample=[position[:, :4], x[:, :4]]),
    ),
    (r"pair up; got 2 \(\['0', '1'\]\) and 1 \(\['0'\]\)", pair(stages(), None, "0 1", "0")),
    (r"pair up; got 0 \(\[\]\) and 1 \(\['0'\]\)", pair(stages(), None, "", "0")),
    ("^Student.*`layers` must name at least one layer", pair(stages(), None, "")),
    (
        "student_layers must be a list, one entry per layer; got '0'",
        pair(stages()) | {"student_layers": "0", "teacher_layers": "0"},
    ),
    *[
        (
            rf"^{role}, layers .*: list the layers front to back, as they run: \['0', '2'\]",
            pair(stages(), None, *layers),
        )
        for role, layers in (("Student", ("2 0", "0 2")), ("Teacher", ("0 2", "2 0")))
    ],
    (
        "The 2 entries of `sample` are its arguments; of a batch .* pass the images alone",
        pair(stages(), sample=(x, x[:, 0])),
    ),
    (
        r"missing 1 required positional argument: 'input2'\. Does the sample",
        pair(nn.Bilinear(6, 6, 8), None, [""]),
    ),
    ("^Student layer '2' must give axes", pair(stages(Apply(lambda x: x[:2])), None, "0 1 2")),
    *[
        (NO_SAMPLE, pair(stages()) | {"sample": sample})
        for sample in (3, "x", None, [], {}, [[x]], {"x": 1}, torch.ones(()), (torch.tensor(1),))
    ],
    (NO_SAMPLE, pair(stages(), sample=torch.ones(0, 6))),
    (
        r"^Teacher, layers \['0'\]: .* AssertionError: no such size\. Does",
        pair(stages(), stages(Asserts("no such size"))),
    ),
    (r"^Teacher, layers \['0'\]: .* AssertionError\. Does", pair(stages(), stages(Asserts("")))),
    (
        r"^Arguments: `student_channels\[0\]` must be an int; got None",
        pair(stages()) | {"student_channels": [None]},
    ),
    # Channels that do not agree.
    (
        OTHER.format(1, 10, "4, 10, 8, 8", 1, 16, "4, 16, 3, 3"),
        pair(convolutions(10), convolutions(stride=2), "1", sample=IMAGES),
    ),
    (OTHER.format(0, 8, "4, 7, 8", 2, 10, "4, 7, 10"), pair(tokens(), tokens(), "0", "2", LONG)),
    # As many channels as samples: no hint of axis 0.
    (
        OTHER.format(0, 8, "4, 8", 2, 4, "4, 4") + r"ansferLoss\.$",
        pair(stages(), None, "0", "2"),
    ),
    (AXIS_3.format("student"), pair(Apply(widened), nn.Conv2d(9, 7, 1), [""], sample=(4, 9, 9, 3))),
    (AXIS_3.format("teacher"), pair(nn.Conv2d(9, 7, 1), Apply(widened), [""], sample=(4, 9, 9, 3))),
    ("'0' has 8 channels .*student_channels says 5", pair(stages(), student_channels=[5])),
    ("one count per layer; got 2 for 1 layers", pair(stages(), student_channels=[8, 8])),
    ("student_channels must be a list, .*; got 8", pair(stages(), student_channels=8)),
    ("^Student layer '0': `channel_dim` must name an axis", with_axis(4)),
    *[
        ("^Arguments: `channel_dim` must", with_axis(channel_dim))
        for channel_dim in (0, 5, "1", 1.0, (1, 1, 1), (None, "1"))
    ],
    (
        r"^Teacher layer '1' .* on axis 1\. Pass `channel_dim=1`, or for .* alone `\(1, None\)`",
        pair(channels_last(), channels_first(), "0", "1", LAST, channel_dim=-1),
    ),
    (RANK_3, pair(*[chain(nn.Conv1d(1, 8, 3))] * 2, sample=SERIES, channel_dim=1)),
    # Gradient that does not reach the student, or reaches the teacher.
    (NO_GRADIENT.format(1), pair(output_of(lambda x: x.detach()), None, "0 1")),
    (NO_GRADIENT.format(0), pair(stages().requires_grad_(False))),
    (NO_GRADIENT.format(1), pair(frozen(), None, "1")),
    (NO_GRADIENT.format(0), pair(frozen(), sample=randn(4, 6, requires_grad=True))),
    (SHARED, pair(model, chain(model[0]))),
    (SHARED, pair(model, model)),
    (NORM, in_training(nn.BatchNorm2d(4))),
    (NORM, in_training(nn.InstanceNorm2d(4, track_running_stats=True))),
    # Selects; the arguments have the names of the roles.
    (SELECT.format("Student", "student"), pair(cell, student_select=5)),
    (SELECT.format("Teacher", "teacher"), pair(stages(), cell, teacher_select=5)),
    (ONE_EACH.format("Student", "student"), pair(cell, student_select=[0, 0])),
    (ONE_EACH.format("Teacher", "teacher"), pair(stages(), cell, teacher_select=[0, 0])),
    (
        r"^Teacher layer '1': .* must be a floating.*; got torch\.quint8\. .*`\.dequantize\(\)`",
        pair(stages(), output_of(quantised), "1"),
    ),
]


@pytest.mark.parametrize(("message", "given"), REFUSED)
def test_models_that_do_not_fit_are_refused_and_left_without_a_trace(message, given):
    refused = pytest.raises(AssertionError, match=message)
    with no_trace(given["student"], given["teacher"]), refused:
        assert_feature_hooks(**given)


@pytest.mark.parametrize("lazy", [nn.LazyLinear(8), nn.LazyBatchNorm1d()])
def test_lazy_layers_are_refused_before_they_take_a_shape(lazy):
    with pytest.raises(AssertionError, match=r"^Student, layers .* has lazy layers .* Run it on"):
        assert_feature_hooks(**pair(chain(lazy)))
    assert lazy.has_uninitialized_params()


def test_a_layer_that_mixes_tokens_is_refused_until_the_select_of_the_message_is_passed():
    mixer = chain(Apply(lambda x: x.mT, chain(Apply(lambda x: x.mT), nn.Linear(5, 5))))
    given = pair(mixer, mixer, sample=(4, 5, 8))
    same = r"If axis 2 does hold .* pass `student_select=lambda output: output`\.$"
    with pytest.raises(AssertionError, match=same):
        assert_feature_hooks(**given)
    functions = dict.fromkeys(("student_select", "teacher_select"), lambda output: output)
    given["teacher"] = copy.deepcopy(mixer).requires_grad_(False)
    assert_feature_hooks(**given | functions)


@pytest.mark.parametrize("removed", [slice(1), slice(1, None)], ids=["hook", "pre-hook"])
def test_a_hook_that_stays_behind_is_noticed(monkeypatch, removed):
    def remove(self):
        for handle in self._handles[removed]:
            handle.remove()

    monkeypatch.setattr("graph_kd._hooks.FeatureHooks.remove", remove)
    with pytest.raises(AssertionError, match=r"Student, layers \['0'\]: a hook stayed attached"):
        assert_feature_hooks(**pair(stages()))
