"""assert_feature_hooks passes on right hooks without a trace, and names the layer of wrong ones."""

import copy

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
    return student, teacher, layers, torch.randn(shape)


# Right hooks pass, and nothing is left behind.


@rights
@training
def test_right_hooks_pass_and_leave_no_trace(right, training):
    student, teacher, layers, sample = models(right)
    student.train(training)
    teacher.train(training)
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
    teacher.train(training)
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
    "tuple": (Recurrent, "cell", r"must give a floating-point tensor; it gave tuple"),
    "none": (lambda: output_of(lambda _x: None), "1", r"it gave NoneType"),
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
    "not run": (lambda: Skipping(0), "extra", r"Layer 'extra' did not run"),
    "run twice": (lambda: Skipping(2), "extra", r"Layer 'extra' ran 2 times"),
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


def test_a_sample_that_is_no_tensor_is_refused():
    with pytest.raises(AssertionError, match="sample must be a tensor; got list"):
        assert_feature_hooks(stages(), stages(), ["0"], ["0"], [torch.randn(4, 6)])


@pytest.mark.parametrize("error", [KeyError("x"), IndexError("x")])
def test_what_a_forward_fails_with_says_where(error):
    def fails(_x):
        raise error

    broken = nn.Sequential(nn.Linear(6, 8), Apply(fails))
    with pytest.raises(AssertionError, match=r"Student, layers \['0'\]: 'x'|layers \['0'\]: x"):
        assert_feature_hooks(broken, stages(), ["0"], ["0"], torch.randn(4, 6))
