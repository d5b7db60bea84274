"""assert_feature_hooks passes on right hooks without a trace, and names the layer of wrong ones."""

import copy
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from graph_kd.testing import assert_feature_hooks


class Apply(nn.Module):
    """A layer that applies a function, after a layer with parameters where one is given."""

    def __init__(self, function, before=None):
        super().__init__()
        self.function = function
        self.before = nn.Identity() if before is None else before

    def forward(self, x):
        return self.function(self.before(x))


def convolutions(width, *, stride=1):
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, stride), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, width, 3), nn.BatchNorm2d(width), nn.ReLU()),
        nn.Sequential(nn.Conv2d(width, 12, 1), nn.Dropout(0.5)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    )


def token_mixer(width):
    return nn.Sequential(
        nn.Linear(6, width),
        nn.TransformerEncoderLayer(width, 2, 16, dropout=0.2, batch_first=True),
        nn.Linear(width, 10),
    )


def video():
    return nn.Sequential(nn.Conv3d(2, 4, 2), nn.ReLU(), nn.Conv3d(4, 5, 2))


def perceptron(width):
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 4))


IMAGES, TOKENS, VECTORS = (4, 3, 12, 12), (4, 7, 6), (4, 6)
RIGHT = {
    "convolutions": (lambda: (convolutions(10), convolutions(16, stride=2)), ["0", "2"], IMAGES),
    "deep names": (lambda: (convolutions(16), convolutions(16)), ["0.0", "1.1", "3.0"], IMAGES),
    "tokens": (lambda: (token_mixer(8), token_mixer(8)), ["0", "1", "2"], TOKENS),
    "vectors": (lambda: (perceptron(8), perceptron(8)), ["1", "3"], VECTORS),
    "video": (lambda: (video(), video()), ["0", "2"], (4, 2, 4, 5, 5)),
}
rights = pytest.mark.parametrize("right", RIGHT.values(), ids=RIGHT.keys())
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def with_gradients(model):
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def snapshot(model):
    """Return everything that must be as before."""
    return {
        "state": copy.deepcopy(model.state_dict()),
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "hooks": hook_count(model),
        "random": torch.get_rng_state(),
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    for name, kept in before.items():
        if isinstance(kept, dict | torch.Tensor) or name == "gradients":
            torch.testing.assert_close(after[name], kept, rtol=0, atol=0)
        else:
            assert after[name] == kept, name


def models(right):
    make, layers, shape = right
    torch.manual_seed(0)
    student, teacher = make()
    return student, teacher.eval(), layers, torch.randn(shape)


# Right hooks pass, and nothing is left behind.


@rights
@training
def test_right_hooks_pass_and_leave_no_trace(right, training):
    student, teacher, layers, sample = models(right)
    student.train(training)
    with_gradients(student)
    kept_sample = sample.clone()
    before = snapshot(student), snapshot(teacher)
    assert_feature_hooks(student, teacher, layers, layers, sample)
    assert_unchanged(student, before[0])
    assert_unchanged(teacher, before[1])
    assert all(p.grad is None for p in teacher.parameters())
    assert torch.equal(sample, kept_sample)
    assert sample.grad is None


@training
def test_wrong_hooks_leave_no_trace_either(training):
    student, teacher, _, sample = models(RIGHT["convolutions"])
    student.train(training)
    before = snapshot(student), snapshot(teacher)
    with pytest.raises(AssertionError, match="channels"):
        assert_feature_hooks(student, teacher, ["0", "1"], ["0", "1"], sample)
    with pytest.raises(AssertionError, match="nowhere"):
        assert_feature_hooks(student, teacher, ["0"], ["nowhere"], sample)
    assert_unchanged(student, before[0])
    assert_unchanged(teacher, before[1])


def test_a_forward_that_fails_leaves_no_trace():
    student, teacher, layers, _ = models(RIGHT["convolutions"])
    sample = torch.randn(4, 5, 12, 12)
    before = snapshot(student)
    with pytest.raises(AssertionError, match=r"Student, layers \['0', '2'\]: .*channels"):
        assert_feature_hooks(student, teacher, layers, layers, sample)
    assert_unchanged(student, before)


def test_hooks_of_others_stay():
    student, teacher, layers, sample = models(RIGHT["vectors"])
    student[1].register_forward_hook(lambda *_: None)
    assert_feature_hooks(student, teacher, layers, layers, sample)
    assert hook_count(student) == 1


def test_layer_names_may_differ_between_the_models():
    student, teacher, _, sample = models(RIGHT["convolutions"])
    assert_feature_hooks(student, teacher, ("0.0", "2"), ("0.2", "2.0"), sample)


def test_passes_inside_no_grad():
    student, teacher, layers, sample = models(RIGHT["vectors"])
    with torch.no_grad():
        assert_feature_hooks(student, teacher, layers, layers, sample)
        assert not torch.is_grad_enabled()


def test_passes_with_a_frozen_teacher():
    student, teacher, layers, sample = models(RIGHT["convolutions"])
    assert_feature_hooks(student, teacher.requires_grad_(False), layers, layers, sample)


def test_buffers_made_during_the_first_forward_are_allowed():
    class Cache(nn.Module):
        def forward(self, x):
            if not hasattr(self, "positions"):
                self.register_buffer("positions", torch.arange(x.shape[1]))
            return x + self.positions

    student, teacher, layers, sample = models(RIGHT["vectors"])
    assert_feature_hooks(nn.Sequential(*student, Cache()), teacher, layers, layers, sample)


def test_wrapped_models_pass(tmp_path):
    student, teacher, layers, sample = models(RIGHT["vectors"])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = DistributedDataParallel(student)
        compiled = torch.compile(teacher, backend="eager")
        before = snapshot(student)
        for _ in range(2):
            assert_feature_hooks(wrapped, compiled, layers, layers, sample)
        assert_unchanged(student, before)
    finally:
        torch.distributed.destroy_process_group()
        torch._dynamo.reset()


# Wrong hooks. Each case: student, teacher, their layers, and what the message says.


def stages(*extra):
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), *extra, nn.Linear(8, 4))


class Skipping(nn.Module):
    """Holds a layer that its forward does not use, or uses twice."""

    def __init__(self, uses):
        super().__init__()
        self.stem, self.extra, self.uses = nn.Linear(6, 8), nn.Tanh(), uses

    def forward(self, x):
        x = self.stem(x)
        for _ in range(self.uses):
            x = self.extra(x)
        return x


class Detached(nn.Module):
    """Lets no gradient through between its layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Tanh()

    def forward(self, x):
        return self.second(self.first(x).detach())


class Unrecorded(Detached):
    """Runs its first layer under no_grad."""

    def forward(self, x):
        with torch.no_grad():
            x = self.first(x)
        return self.second(x)


def output_of(function):
    """Return a model whose layer "1" gives the function of eight features."""
    return nn.Sequential(nn.Linear(6, 8), Apply(function))


class Recurrent(nn.Module):
    """Its layer gives a tuple."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(6, 8)

    def forward(self, x):
        return self.cell(x)[0]


WRONG_OUTPUTS = {
    "integer": (lambda: output_of(lambda x: x.argmax(1)), "1", r"float.*it gave torch\.int64"),
    "bool": (lambda: output_of(lambda x: x > 0), "1", r"it gave torch\.bool"),
    "complex": (lambda: output_of(lambda x: x + 1j), "1", r"it gave torch\.complex64"),
    "tuple": (Recurrent, "cell", r"layer 'cell' gave tuple .*t_select=0`|r_select=0`"),
    "none": (lambda: output_of(lambda _x: None), "1", r"layer '1' gave NoneType, which is no"),
    "scalar": (lambda: output_of(lambda x: x.sum()), "1", r"with b = 4, .* gave shape \(\)"),
    "one axis": (lambda: output_of(lambda x: x.sum(1)), "1", r"b c h w.* gave shape \(4,\)"),
    "no batch axis": (lambda: output_of(lambda x: x.mean(0)), "1", r"gave shape \(8,\)"),
    "batch of one": (lambda: output_of(lambda x: x[:1]), "1", r"b = 4, .* gave shape \(1, 8\)"),
    "batch last": (lambda: output_of(lambda x: x.mT), "1", r"b = 4, .* gave shape \(8, 4\)"),
    "six axes": (
        lambda: output_of(lambda x: x.reshape(4, 2, 2, 2, 1, 1)),
        "1",
        r"gave shape \(4, 2, 2, 2, 1, 1\)",
    ),
    "unknown": (stages, "2.0", r"it has no '2\.0'\. The nearest names are"),
    "not run": (lambda: Skipping(0), "extra", r"layer 'extra' did not run"),
    "run twice": (lambda: Skipping(2), "extra", r"layer 'extra' ran 2 times"),
}


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("wrong", WRONG_OUTPUTS.values(), ids=WRONG_OUTPUTS.keys())
def test_names_role_and_layer_of_an_output_that_does_not_fit(role, wrong):
    make, layer, message = wrong
    good, bad, sample = stages(), make(), torch.randn(VECTORS)
    pair = {"student": (bad, good, [layer], ["0"]), "teacher": (good, bad, ["0"], [layer])}
    with pytest.raises(AssertionError, match=message) as caught:
        assert_feature_hooks(*pair[role], sample)
    assert str(caught.value).startswith(role.capitalize())
    assert repr(layer) in str(caught.value)


def test_names_the_layer_that_is_wrong_among_right_ones():
    student = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Apply(lambda x: x[:2]))
    with pytest.raises(AssertionError, match=r"Student layer '2' must give axes"):
        assert_feature_hooks(student, stages(), ["0", "1", "2"], ["0", "1", "2"], torch.randn(4, 6))


@pytest.mark.parametrize(
    ("student_layers", "teacher_layers"), [(["0", "1"], ["0"]), (["0"], ["0", "1"]), ([], ["0"])]
)
def test_different_counts_are_listed(student_layers, teacher_layers):
    message = rf"pair up; got {len(student_layers)} \(.*\) and {len(teacher_layers)} \(\['0'"
    with pytest.raises(AssertionError, match=message):
        assert_feature_hooks(stages(), stages(), student_layers, teacher_layers, torch.randn(4, 6))


def test_no_layers_at_all_are_refused():
    with pytest.raises(AssertionError, match=r"`layers` must name at least one layer"):
        assert_feature_hooks(stages(), stages(), [], [], torch.randn(4, 6))


def test_strings_in_place_of_lists_are_refused():
    with pytest.raises(AssertionError, match=r"must be a list of module names; got the string '0'"):
        assert_feature_hooks(stages(), stages(), "0", "0", torch.randn(4, 6))


@pytest.mark.parametrize(
    ("right", "layers", "ours", "theirs"),
    [
        ("convolutions", ("1", "1"), r"10 .*\(4, 10, 8, 8\)\)", r"16 .*\(4, 16, 3, 3\)\)"),
        ("convolutions", ("0", "2"), r"8 .*\(4, 8, 10, 10\)\)", r"12 .*\(4, 12, 3, 3\)\)"),
        ("tokens", ("0", "2"), r"8 .*\(4, 7, 8\)\)", r"10 .*\(4, 7, 10\)\)"),
        ("vectors", ("0", "3"), r"8 .*\(4, 8\)\)", r"4 .*\(4, 4\)\)"),
    ],
)
def test_channels_that_differ_are_named_with_both_layers(right, layers, ours, theirs):
    student, teacher, _, sample = models(RIGHT[right])
    message = (
        rf"Student layer '{layers[0]}' has {ours}, teacher layer '{layers[1]}' has {theirs}; a "
        "sensing point needs the same number"
    )
    with pytest.raises(AssertionError, match=message):
        assert_feature_hooks(student, teacher, [layers[0]], [layers[1]], sample)


@pytest.mark.parametrize("student", [Detached, Unrecorded])
def test_a_detached_student_layer_is_named(student):
    layers = ["second"] if student is Detached else ["first"]
    with pytest.raises(AssertionError, match=rf"Student layer '{layers[0]}' carries no gradient"):
        assert_feature_hooks(student(), stages(), layers, ["0"], torch.randn(4, 6))


def test_a_layer_after_the_detached_one_is_named_when_the_first_is_right():
    layers = ["first", "second"]
    with pytest.raises(AssertionError, match=r"Student layer 'second' carries no gradient"):
        assert_feature_hooks(Detached(), stages(), layers, ["0", "1"], torch.randn(4, 6))


def test_a_detached_teacher_is_no_fault():
    assert_feature_hooks(stages(), Detached(), ["0", "1"], ["first", "second"], torch.randn(4, 6))


def test_a_student_of_frozen_parameters_is_refused():
    student = stages().requires_grad_(False)
    with pytest.raises(AssertionError, match=r"Student layer '0' carries no gradient.*frozen"):
        assert_feature_hooks(student, stages(), ["0"], ["0"], torch.randn(4, 6))


def test_a_layer_behind_frozen_parameters_alone_is_named():
    student = stages()
    student[0].requires_grad_(False)
    with pytest.raises(AssertionError, match=r"Student layer '1' carries no gradient"):
        assert_feature_hooks(student, stages(), ["1"], ["1"], torch.randn(4, 6))
    assert_feature_hooks(student, stages(), ["2"], ["2"], torch.randn(4, 6))


def test_a_sample_that_needs_gradient_does_not_pass_for_trained_parameters():
    student = stages().requires_grad_(False)
    sample = torch.randn(4, 6, requires_grad=True)
    with pytest.raises(AssertionError, match=r"Student layer '0' carries no gradient"):
        assert_feature_hooks(student, stages(), ["0"], ["0"], sample)


def test_parameters_shared_with_the_teacher_are_refused():
    student, teacher = stages(), stages()
    student[0] = teacher[0]
    with pytest.raises(AssertionError, match=r"Student layer '0' carries gradient to the teacher"):
        assert_feature_hooks(student, teacher, ["0"], ["0"], torch.randn(4, 6))


def test_a_model_that_teaches_itself_is_refused():
    model = stages()
    with pytest.raises(AssertionError, match=r"the two models share them"):
        assert_feature_hooks(model, model, ["0"], ["1"], torch.randn(4, 6))


def test_a_feature_changed_in_place_past_saving_is_named():
    student = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Apply(lambda x: x.add_(1)))
    with pytest.raises(AssertionError, match=r"'1'"):
        assert_feature_hooks(student, stages(), ["1"], ["1"], torch.randn(4, 6))


def test_what_is_no_module_is_refused():
    with pytest.raises(
        AssertionError, match=r"Student, layers \['0'\]: `model` must be .*NoneType"
    ):
        assert_feature_hooks(None, stages(), ["0"], ["0"], torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_data_parallel_is_refused_with_the_reason(role):
    pair = {"student": stages(), "teacher": stages()}
    pair[role] = DataParallel(pair[role])
    message = rf"{role.capitalize()}, layers \['0'\]: .*must not be a DataParallel: its replicas"
    with pytest.raises(AssertionError, match=message):
        assert_feature_hooks(
            **pair, student_layers=["0"], teacher_layers=["0"], sample=torch.randn(4, 6)
        )


def test_a_hook_that_stays_behind_is_noticed(monkeypatch):
    monkeypatch.setattr("graph_kd._hooks.FeatureHooks.remove", lambda _self: None)
    with pytest.raises(AssertionError, match=r"Student, layers \['0'\]: a hook stayed attached"):
        assert_feature_hooks(stages(), stages(), ["0"], ["0"], torch.randn(4, 6))


@pytest.mark.parametrize(
    "sample",
    [None, 3, "x", [], {}, [[torch.ones(2)]], {"x": 1}, torch.ones(()), (torch.tensor(1),)],
)
def test_a_sample_without_a_batch_is_refused(sample):
    with pytest.raises(AssertionError, match="sample must be a tensor with a batch axis, or a map"):
        assert_feature_hooks(stages(), stages(), ["0"], ["0"], sample)


@pytest.mark.parametrize("error", [KeyError("x"), IndexError("x")])
def test_what_a_forward_fails_with_says_where(error):
    def fails(_x):
        raise error

    broken = nn.Sequential(nn.Linear(6, 8), Apply(fails))
    with pytest.raises(AssertionError, match=r"Student, layers \['0'\]: 'x'|layers \['0'\]: x"):
        assert_feature_hooks(broken, stages(), ["0"], ["0"], torch.randn(4, 6))


# Samples of several tensors.


class TakesTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(10, 6), nn.Linear(6, 8)

    def forward(self, ids, mask=None, scale=1.0):
        return self.linear(self.embedding(ids) * mask[..., None] * scale)


ids, mask = torch.arange(12).reshape(4, 3) % 10, torch.ones(4, 3)
SAMPLES = {
    "dict": {"ids": ids, "mask": mask},
    "user dict": UserDict(ids=ids, mask=mask),
    "other entries": {"scale": 2.0, "ids": ids, "mask": mask},
    "tuple": (ids, mask),
    "list": [ids, mask, 2.0],
}


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())
def test_samples_may_be_keyword_or_positional_arguments(sample):
    assert_feature_hooks(TakesTwo(), TakesTwo(), ["linear"], ["linear"], sample)
    student = chain(TakesTwo(), Apply(lambda x: x[:2]))
    student.forward = lambda *args, **kwargs: student[1](student[0](*args, **kwargs))
    with pytest.raises(AssertionError, match=r"Student layer '1' must give axes .* b = 4"):
        assert_feature_hooks(student, TakesTwo(), ["1"], ["linear"], sample)


# Where the channels are.


def chain(*modules):
    return nn.Sequential(*modules)


def last(width):
    """Maps with the channels last."""
    return chain(nn.Linear(3, width), nn.ReLU(), chain(nn.Linear(width, width), nn.GELU()))


CHANNELS_LAST = {
    "linear": (lambda: last(4), "0", (4, 9, 9, 3)),
    "after linear": (lambda: last(4), "1", (4, 9, 9, 3)),
    "block": (lambda: last(4), "2", (4, 9, 9, 3)),
    "height equals channels": (lambda: last(9), "0", (4, 9, 9, 3)),
    "video": (lambda: last(4), "0", (4, 5, 9, 9, 3)),
    "norm": (lambda: chain(nn.Linear(3, 4), nn.LayerNorm(4)), "1", (4, 9, 9, 3)),
    "permuted": (
        lambda: chain(nn.Conv2d(3, 4, 1), Apply(lambda x: x.permute(0, 2, 3, 1))),
        "1",
        (4, 3, 9, 9),
    ),
    "own layer": (lambda: chain(OwnLinear(3, 4)), "0", (4, 9, 9, 3)),
}


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize("role", ["Student", "Teacher"])
@pytest.mark.parametrize("case", CHANNELS_LAST.values(), ids=CHANNELS_LAST.keys())
def test_maps_with_channels_last_need_channel_dim(case, role):
    make, layer, shape = case
    right, sample = make(), torch.randn(shape)
    rank = len(shape)
    message = (
        rf"layer '{layer}' gave shape .*: axis 1, where the loss looks for the channels, has \d "
        rf"entries, but \w+ gives \d channels, on axis {rank - 1}\. Pass `channel_dim=-1`"
    )
    for channel_dim in (None, (None, None)):
        with pytest.raises(AssertionError, match="Student " + message):
            assert_feature_hooks(make(), right, [layer], [layer], sample, channel_dim=channel_dim)
    one_sided = {"Student": (-1, None), "Teacher": (None, -1)}[role]
    with pytest.raises(AssertionError, match=f"{role} {message}"):
        assert_feature_hooks(make(), right, [layer], [layer], sample, channel_dim=one_sided)
    for channel_dim in (-1, (-1, -1), rank - 1):
        assert_feature_hooks(make(), right, [layer], [layer], sample, channel_dim=channel_dim)


def test_each_model_may_have_its_own_channel_axis():
    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.inner(x.permute(0, 3, 1, 2))

    sample = torch.randn(4, 9, 9, 3)
    assert_feature_hooks(last(4), Convolution(), ["0"], ["inner"], sample, channel_dim=(None, -1))
    assert_feature_hooks(Convolution(), last(4), ["inner"], ["0"], sample, channel_dim=(-1, None))
    with pytest.raises(
        AssertionError, match=r"Teacher layer 'inner' .* on axis 1\. .*`\(1, None\)`"
    ):
        assert_feature_hooks(last(4), Convolution(), ["0"], ["inner"], sample, channel_dim=-1)


def test_a_height_like_the_teachers_channels_does_not_pass_for_channels():
    teacher, sample = chain(nn.Conv2d(3, 8, 1)), torch.randn(4, 3, 8, 3)
    student = chain(Apply(lambda x: x.transpose(1, 2), None), nn.Linear(3, 4))
    with pytest.raises(AssertionError, match=r"Student layer '1' .*axis 1.*has 8 .*on axis 3"):
        assert_feature_hooks(student, teacher, ["1"], ["0"], sample)


@pytest.mark.parametrize("length", [50, 6])
@pytest.mark.parametrize("layer", [nn.Conv1d(1, 4, 3), nn.BatchNorm1d(1), nn.GroupNorm(1, 1)])
def test_maps_b_c_l_are_to_be_transposed(layer, length):
    sample = torch.randn(4, 1, length)
    message = r"Student layer '0' .*axis 2.* on axis 1\. Maps of rank 3 are read as tokens b n c: "
    models = [chain(copy.deepcopy(layer)), chain(copy.deepcopy(layer)).eval(), ["0"], ["0"], sample]
    advice = r"`student_select=lambda output: output\.transpose\(1, 2\)`"
    for channel_dim in (None, 1):
        with pytest.raises(AssertionError, match=message + "pass " + advice):
            assert_feature_hooks(*models, channel_dim=channel_dim)

    def transposed(output):
        return output.transpose(1, 2)

    assert_feature_hooks(*models, student_select=transposed, teacher_select=[transposed])


def test_a_block_that_joins_maps_is_no_mistake():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.grow = nn.Conv2d(3, 9, 1)

        def forward(self, x):
            return torch.cat([x, self.grow(x)], 1)

    sample = torch.randn(4, 3, 9, 9)
    assert_feature_hooks(chain(Dense()), chain(Dense()), ["0"], ["0"], sample)


def test_a_layer_derived_from_one_of_torch_may_have_its_channels_elsewhere():
    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def net():
        return chain(nn.Conv2d(3, 9, 1), LayerNorm2d(9))

    assert_feature_hooks(net(), net(), ["1"], ["1"], torch.randn(4, 3, 9, 9))
    assert_feature_hooks(net(), net(), ["1"], ["1"], torch.randn(4, 3, 5, 5))


@pytest.mark.parametrize("channel_dim", [0, 5, "1", 1.0, (1, 1, 1), (None, "1")])
def test_a_wrong_channel_dim_is_refused(channel_dim):
    with pytest.raises(AssertionError, match="`channel_dim` must"):
        assert_feature_hooks(
            last(4), last(4), ["0"], ["0"], torch.randn(4, 9, 9, 3), channel_dim=channel_dim
        )


def test_a_channel_dim_that_the_map_does_not_have_is_refused():
    sample = torch.randn(4, 9, 9, 3)
    with pytest.raises(AssertionError, match=r"Student layer '0': `channel_dim` must name an axis"):
        assert_feature_hooks(last(4), last(4), ["0"], ["0"], sample, channel_dim=4)


def test_another_axis_that_fits_is_offered():
    class Swapped(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))

        def forward(self, x):
            return x[..., :1] * self.weight

    student, teacher = chain(Swapped(7)), chain(nn.Conv2d(9, 7, 1))
    sample = torch.randn(4, 9, 9, 3)
    with pytest.raises(AssertionError, match=r"If the student's channels are on axis 3: Pass"):
        assert_feature_hooks(student, teacher, ["0"], ["0"], sample)
    with pytest.raises(AssertionError, match=r"If the teacher's channels are on axis 3: Pass"):
        assert_feature_hooks(chain(nn.Conv2d(9, 7, 1)), student, ["0"], ["0"], sample)


# Students with other channels.


def test_student_channels_allow_other_counts_than_the_teachers():
    student, teacher, sample = perceptron(8), perceptron(5).eval(), torch.randn(VECTORS)
    layers = ["0", "2"]
    with pytest.raises(AssertionError, match=r"needs the same number, or `student_channels` here"):
        assert_feature_hooks(student, teacher, layers, layers, sample)
    assert_feature_hooks(student, teacher, layers, layers, sample, student_channels=[8, 8])
    assert_feature_hooks(
        student, perceptron(8).eval(), layers, layers, sample, student_channels=(8, 8)
    )
    with pytest.raises(AssertionError, match=r"'2' has 8 channels .*student_channels says 5"):
        assert_feature_hooks(student, teacher, layers, layers, sample, student_channels=[8, 5])
    with pytest.raises(AssertionError, match=r"one count per layer; got 1 for 2 layers"):
        assert_feature_hooks(student, teacher, layers, layers, sample, student_channels=[8])


# Where the batch is.


class Sequences(nn.Module):
    """Gives sequences first, for samples b n c."""

    def __init__(self, layer):
        super().__init__()
        self.embed, self.layer = nn.Linear(6, 8), layer

    def forward(self, x):
        output = self.layer(self.embed(x).transpose(0, 1))
        return output[0] if isinstance(output, tuple) else output


SEQUENCES = {
    "lstm": (lambda: nn.LSTM(8, 8), 0),
    "gru": (lambda: nn.GRU(8, 8), 0),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16), None),
    "linear": (lambda: nn.Linear(8, 8), None),
}


@pytest.mark.parametrize("role", ["Student", "Teacher"])
@pytest.mark.parametrize("length", [7, 4])
@pytest.mark.parametrize("case", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_sequences_first_are_noticed_even_if_they_are_as_long_as_the_batch(case, length, role):
    make, select = case
    sample, good, bad = torch.randn(4, length, 6), chain(nn.Linear(6, 8)), Sequences(make())
    pair = (bad, good, ["layer"], ["0"]) if role == "Student" else (good, bad, ["0"], ["layer"])
    name = f"{role.lower()}_select"
    advice = rf"`batch_first=True`, or pass `{name}=lambda output: output\.transpose\(0, 1\)`"
    with pytest.raises(AssertionError, match=rf"{role} layer 'layer' must .*{advice}"):
        assert_feature_hooks(*pair, sample, **{name: select})

    def batch_first(output):
        return (output if select is None else output[select]).transpose(0, 1)

    assert_feature_hooks(*pair, sample, **{name: batch_first})


def test_a_model_for_one_batch_size_alone_passes():
    def fixed(x):
        return x.reshape(4, 8)

    student = chain(nn.Linear(6, 8), Apply(fixed))
    assert_feature_hooks(student, stages(), ["1"], ["0"], torch.randn(4, 6))


def test_a_sample_of_one_passes():
    assert_feature_hooks(stages(), stages(), ["0"], ["0"], torch.randn(1, 6))


# What the hooks themselves refuse.


@pytest.mark.parametrize("role", ["Student", "Teacher"])
def test_an_output_changed_in_place_is_named_with_its_role(role):
    bad, good = chain(nn.Linear(6, 8), nn.Tanh(), nn.ReLU(inplace=True)), stages()
    pair = (bad, good, ["0", "1"], ["0", "0"]) if role == "Student" else (good, bad, ["0"], ["1"])
    if role == "Student":
        pair = (bad, stages(nn.Tanh()), ["0", "1"], ["0", "1"])
    with pytest.raises(
        AssertionError, match=rf"^{role} layer '1' gave a tensor that was changed in"
    ):
        assert_feature_hooks(*pair, torch.randn(4, 6))


@pytest.mark.parametrize("role", ["Student", "Teacher"])
def test_select_reaches_the_hooks_of_each_model(role):
    pair = (Recurrent(), stages(), ["cell"], ["0"])
    pair = pair if role == "Student" else (stages(), Recurrent(), ["0"], ["cell"])
    name, sample = f"{role.lower()}_select", torch.randn(4, 6)
    for select in (0, [0], lambda output: output[0]):
        assert_feature_hooks(*pair, sample, **{name: select})
    with pytest.raises(
        AssertionError, match=rf"{role} layer 'cell' gave tuple .*`{name}=5` failed"
    ):
        assert_feature_hooks(*pair, sample, **{name: 5})
    with pytest.raises(AssertionError, match=rf"{role}, layers .*`select` must have one entry per"):
        assert_feature_hooks(*pair, sample, **{name: [0, 0]})


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_features_are_to_be_dequantised():
    def quantised(x):
        return torch.quantize_per_tensor(x.detach(), 0.1, 0, torch.quint8)

    pair = (stages(), output_of(quantised), ["0"], ["1"], torch.randn(4, 6))
    advice = r"it gave torch\.quint8\. Pass `teacher_select=lambda output: output\.dequantize\(\)`"
    with pytest.raises(AssertionError, match=advice):
        assert_feature_hooks(*pair)
    assert_feature_hooks(*pair, teacher_select=lambda output: output.dequantize())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("role", ["Student", "Teacher"])
@pytest.mark.parametrize("kind", ["script", "trace"])
def test_script_modules_are_refused_with_the_reason(kind, role):
    sample = torch.randn(4, 6)
    scripted = torch.jit.script(stages()) if kind == "script" else torch.jit.trace(stages(), sample)
    pair = (scripted, stages()) if role == "Student" else (stages(), scripted)
    with pytest.raises(AssertionError, match=rf"{role}, layers .*must not be a ScriptModule"):
        assert_feature_hooks(*pair, ["0"], ["0"], sample)


# The teacher's mode.


def test_a_batch_norm_of_the_teacher_in_training_mode_is_named():
    student, teacher, layers, sample = models(RIGHT["convolutions"])
    teacher[1].train()
    before = snapshot(teacher)
    with pytest.raises(
        AssertionError, match=r"Teacher: .*'1\.1' is in training.*`teacher\.eval\(\)`"
    ):
        assert_feature_hooks(student, teacher, layers, layers, sample)
    assert_unchanged(teacher, before)


def test_dropout_of_the_teacher_in_training_mode_is_allowed():
    student, teacher, layers, sample = models(RIGHT["tokens"])
    assert_feature_hooks(student, teacher.train(), layers, layers, sample)


# Leaving no trace: what a model may do to its own buffers.


def test_a_buffer_that_the_forward_replaces_is_put_back():
    class Counts(nn.Linear):
        def __init__(self):
            super().__init__(6, 8)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count = self.count + 1
            return super().forward(x)

    student, teacher = chain(Counts()), chain(Counts())
    kept = [net[0].count for net in (student, teacher)]
    assert_feature_hooks(student, teacher, ["0"], ["0"], torch.randn(4, 6))
    assert [net[0].count for net in (student, teacher)] == kept
    assert student[0].count is kept[0]
    assert teacher[0].count is kept[1]
    assert kept == [0, 0]


def test_a_hook_that_marks_the_beginning_is_noticed_when_it_stays(monkeypatch):
    def remove(self):
        for handle in self._handles[1:]:
            handle.remove()

    monkeypatch.setattr("graph_kd._hooks.FeatureHooks.remove", remove)
    with pytest.raises(AssertionError, match=r"Student, layers \['0'\]: a hook stayed attached"):
        assert_feature_hooks(stages(), stages(), ["0"], ["0"], torch.randn(4, 6))


def token_pair(*layers):
    return [nn.Sequential(*(make() for make in layers)) for _ in range(2)]


NO_ALARM = {
    "rms norm": (
        lambda: token_pair(lambda: nn.RMSNorm(8), lambda: nn.Linear(8, 8)),
        "0",
        (4, 5, 8),
    ),
    "glu": (lambda: token_pair(lambda: nn.Linear(8, 32), nn.GLU), "1", (4, 32, 8)),
    "pixel shuffle": (
        lambda: token_pair(lambda: nn.Conv2d(3, 32, 1), lambda: nn.PixelShuffle(2)),
        "1",
        (4, 3, 16, 20),
    ),
    "pooled": (
        lambda: token_pair(lambda: nn.Linear(6, 10), lambda: nn.AdaptiveAvgPool1d(7)),
        "1",
        (4, 10, 6),
    ),
    "instance norm": (lambda: token_pair(lambda: nn.InstanceNorm2d(3)), "0", (4, 3, 8, 8)),
}


@pytest.mark.parametrize("case", NO_ALARM.values(), ids=NO_ALARM.keys())
def test_shapes_that_happen_to_agree_raise_no_alarm(case):
    make, layer, shape = case
    student, teacher = make()
    head = nn.Linear(shape[-1], shape[-1])
    student, teacher = (nn.Sequential(head_of(head), *m) for m in (student, teacher))
    layer = str(int(layer) + 1)
    assert_feature_hooks(student, teacher, [layer], [layer], torch.randn(shape))


def head_of(linear):
    """Return a layer with parameters of its own, so that every layer carries gradient."""
    return copy.deepcopy(linear)


def test_an_embedding_before_a_recurrent_layer_raises_no_alarm():
    def net():
        return nn.Sequential(nn.Embedding(20, 10), nn.LSTM(10, 12, batch_first=True))

    sample = torch.randint(20, (4, 10))
    assert_feature_hooks(net(), net(), ["1"], ["1"], sample, student_select=0, teacher_select=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_models_with_scripted_parts_can_be_checked():
    def net():
        scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
        return nn.Sequential(nn.Linear(6, 8), scripted, nn.Linear(8, 4))

    student, teacher = net(), net().eval()
    before = student[1].state_dict()["1.running_mean"].clone()
    assert_feature_hooks(student, teacher, ["0", "2"], ["0", "2"], torch.randn(4, 6))
    assert torch.equal(student[1].state_dict()["1.running_mean"], before)


def test_instance_norms_of_the_teacher_in_training_mode_are_named():
    def net():
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, track_running_stats=True))

    with pytest.raises(AssertionError, match=r"Teacher: its norm '1' is in training mode"):
        assert_feature_hooks(net(), net(), ["1"], ["1"], torch.randn(4, 3, 8, 8))
    assert_feature_hooks(net(), net().eval(), ["1"], ["1"], torch.randn(4, 3, 8, 8))


def test_an_entry_that_comes_once_for_all_samples_is_not_the_batch_size():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, position, x):
            return self.layer(x + position)

    sample = {"position": torch.randn(1, 5, 6), "x": torch.randn(4, 5, 6)}
    assert_feature_hooks(Net(), Net(), ["layer"], ["layer"], sample)
