"""FeatureHooks: what it collects, from which models, and what it refuses."""

import copy
import dataclasses
import gc
import pickle
import weakref
from collections import OrderedDict
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from graph_kd import FeatureHooks
from graph_kd._forward_pass import check_estimator_fresh, check_fresh, training_norms
from graph_kd._hooks import unwrap


class Net(nn.Module):
    """Stages whose names have dots, one layer that may be left out, one that may run twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.stages = nn.Sequential(
            nn.Sequential(nn.Linear(5, 6), nn.Tanh()), nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        )
        self.spare = nn.Identity()
        self.head = nn.Linear(6, 2)

    def forward(self, x, spare_uses=0):
        x = self.stages(self.stem(x).tanh())
        for _ in range(spare_uses):
            x = self.spare(x)
        return self.head(x)


LAYERS = ["stem", "stages.0.1", "stages.1"]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def batch(seed=1):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))


def by_hand(net, x):
    """Return the features at LAYERS without calling a module, which would run its hooks."""

    def apply(linear, x):
        return nn.functional.linear(x, linear.weight, linear.bias)

    stem = apply(net.stem, x)
    first = apply(net.stages[0][0], stem.tanh()).tanh()
    return [stem, first, apply(net.stages[1][0], first).tanh()]


def hook_count(net):
    return sum(
        len(hooks)
        for module in net.modules()
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


def assert_features(hooks, wanted):
    for got, expected in zip(hooks.features, wanted, strict=True):
        torch.testing.assert_close(got, expected)


# What is collected.


def test_features_are_the_outputs_of_the_named_layers(net):
    hooks = FeatureHooks(net, LAYERS)
    output = net(batch())
    assert_features(hooks, by_hand(net, batch()))
    torch.testing.assert_close(output, net.head(hooks.features[-1]))


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2, 0], [0, 1, 2]])
def test_features_come_in_the_order_of_the_names_not_of_execution(net, order):
    hooks = FeatureHooks(net, [LAYERS[n] for n in order])
    net(batch())
    features = by_hand(net, batch())
    assert_features(hooks, [features[n] for n in order])


def test_features_are_the_very_tensors_and_carry_gradient(net):
    seen = []
    net.stem.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    hooks = FeatureHooks(net, ["stem"])
    output = net(batch())
    assert hooks.features[0] is seen[0]
    (at_feature,) = torch.autograd.grad(output.sum(), hooks.features, retain_graph=True)
    assert at_feature.abs().sum() > 0
    hooks.features[0].sum().backward()
    assert net.stem.weight.grad is not None


def test_a_second_forward_replaces_the_first(net):
    hooks = FeatureHooks(net, LAYERS)
    net(batch(1))
    first = hooks.features
    net(batch(2))
    assert_features(hooks, by_hand(net, batch(2)))
    assert all(a is not b for a, b in zip(first, hooks.features, strict=True))
    torch.testing.assert_close(first[0], by_hand(net, batch(1))[0])  # a list of one's own


def test_reading_twice_gives_the_same_features(net):
    hooks = FeatureHooks(net, LAYERS)
    net(batch())
    assert all(a is b for a, b in zip(hooks.features, hooks.features, strict=True))


def test_iterates_over_the_features_and_has_their_count(net):
    hooks = FeatureHooks(net, LAYERS)
    assert len(hooks) == 3
    net(batch())
    assert all(a is b for a, b in zip(hooks, hooks.features, strict=True))
    stem, _, last = hooks
    assert stem is hooks.features[0]
    assert last is hooks.features[2]


def test_layers_may_be_any_sequence_and_are_shown(net):
    hooks = FeatureHooks(net, iter(LAYERS))
    assert hooks.layers == tuple(LAYERS)
    assert repr(hooks) == f"FeatureHooks(layers={LAYERS})"


def test_two_sets_of_hooks_do_not_meddle_with_each_other(net):
    one, other = FeatureHooks(net, ["stem"]), FeatureHooks(net, ["stem", "head"])
    net(batch())
    assert one.features[0] is other.features[0]
    one.remove()
    net(batch(2))
    torch.testing.assert_close(other.features[0], by_hand(net, batch(2))[0])
    torch.testing.assert_close(one.features[0], by_hand(net, batch(1))[0])


def test_the_model_itself_has_the_empty_name(net):
    hooks = FeatureHooks(net, ["stem", ""])
    output = net(batch())
    assert hooks.features[1] is output


def test_a_module_of_two_names_answers_to_both(net):
    net.alias = net.stages[1]
    with FeatureHooks(net, ["stages.1", "alias"]) as hooks:
        net(batch())
        first, second = hooks.features
    assert first is second


# torch.compile looks at `.grad` of what comes into a compiled submodule, and warns itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("dynamo")
def test_names_inside_a_compiled_submodule_are_those_of_the_plain_one(net):
    x = batch()
    wanted = by_hand(net, x)
    net.stages = torch.compile(net.stages, backend="eager")
    with FeatureHooks(net, LAYERS) as hooks:
        net(x)
        assert_features(hooks, wanted)


def test_a_copy_of_the_model_leaves_the_hooks_of_the_original_alone(net):
    with FeatureHooks(net, LAYERS) as hooks:
        net(batch())
        twin = copy.deepcopy(net)
        averaged = torch.optim.swa_utils.AveragedModel(net)
        before = hooks.features
        twin(batch(2))
        averaged(batch(3))
        assert all(a is b for a, b in zip(hooks.features, before, strict=True))
        with FeatureHooks(twin, LAYERS) as hooks_of_twin:
            twin(batch(2))
            assert_features(hooks_of_twin, by_hand(twin, batch(2)))


def test_a_pickle_of_the_model_has_idle_hooks_and_no_features(net):
    with FeatureHooks(net, LAYERS) as hooks:
        empty = len(pickle.dumps(net))
        net(batch())
        before = hooks.features
        assert len(pickle.dumps(net)) == empty
        twin = pickle.loads(pickle.dumps(net))
        twin(batch(2))
        assert all(a is b for a, b in zip(hooks.features, before, strict=True))
    assert len(pickle.dumps(twin)) == len(pickle.dumps(pickle.loads(pickle.dumps(twin))))


def test_hooks_do_not_change_the_output(net):
    wanted = net(batch())
    with FeatureHooks(net, LAYERS):
        assert torch.equal(net(batch()), wanted)


# Leaving.


def test_remove_leaves_no_hooks_and_the_features_readable(net):
    hooks = FeatureHooks(net, LAYERS)
    assert hook_count(net) == 4
    net(batch(1))
    hooks.remove()
    hooks.remove()
    assert hook_count(net) == 0
    net(batch(2))
    assert_features(hooks, by_hand(net, batch(1)))


def test_with_leaves_no_hooks(net):
    with FeatureHooks(net, LAYERS) as hooks:
        assert isinstance(hooks, FeatureHooks)
        net(batch())
    assert hook_count(net) == 0
    assert_features(hooks, by_hand(net, batch()))


def test_with_leaves_no_hooks_when_the_body_fails(net):
    with pytest.raises(RuntimeError, match="shapes cannot"), FeatureHooks(net, LAYERS):
        net(torch.randn(3, 5))
    assert hook_count(net) == 0


def test_hooks_of_others_stay(net):
    net.stem.register_forward_hook(lambda *_: None)
    net.register_forward_pre_hook(lambda *_: None)
    FeatureHooks(net, LAYERS).remove()
    assert hook_count(net) == 2


@pytest.mark.parametrize("layers", [[], ["stem", "nowhere"], ["stem", "stem"]])
def test_a_refusal_leaves_no_hooks(net, layers):
    with pytest.raises(ValueError, match="`layers` must"):
        FeatureHooks(net, layers)
    assert hook_count(net) == 0


# Layers that did not run, or ran twice.


def test_reading_before_any_forward_names_the_first_layer(net):
    hooks = FeatureHooks(net, LAYERS)
    with pytest.raises(RuntimeError, match=r"Layer 'stem' did not run in the last forward pass"):
        _ = hooks.features
    with pytest.raises(RuntimeError, match=r"Layer 'stem' did not run"):
        list(hooks)


def test_a_layer_that_did_not_run_is_named(net):
    hooks = FeatureHooks(net, ["stem", "spare", "head"])
    net(batch(), spare_uses=1)
    assert len(hooks.features) == 3
    net(batch())
    with pytest.raises(RuntimeError, match=r"Layer 'spare' did not run in the last forward pass"):
        _ = hooks.features
    net(batch(), spare_uses=1)
    assert len(hooks.features) == 3


@pytest.mark.parametrize("uses", [2, 3])
def test_a_layer_that_ran_more_than_once_is_named(net, uses):
    hooks = FeatureHooks(net, ["stem", "spare"])
    net(batch(), spare_uses=uses)
    with pytest.raises(RuntimeError, match=rf"Layer 'spare' ran {uses} times.*must run once"):
        _ = hooks.features
    net(batch(), spare_uses=1)
    assert len(hooks.features) == 2


def test_calling_a_part_besides_the_model_counts_as_running_twice(net):
    hooks = FeatureHooks(net, ["stem"])
    net(batch())
    net.stem(batch())
    with pytest.raises(RuntimeError, match=r"Layer 'stem' ran 2 times.*call the model itself"):
        _ = hooks.features


def test_a_forward_that_fails_leaves_nothing_of_the_one_before(net):
    hooks = FeatureHooks(net, LAYERS)
    net(batch())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        net(torch.randn(3, 5))
    with pytest.raises(RuntimeError, match=r"Layer 'stem' did not run"):
        _ = hooks.features


# Names and models that are refused.


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("stages.1.2", "stages.1"), ("stage.0", "stages.0"), ("Stem", "stem"), ("heads", "head")],
)
def test_an_unknown_name_offers_the_nearest(net, name, nearest):
    with pytest.raises(
        ValueError, match=rf"it has no '{name}'\. The nearest names are .*'{nearest}'"
    ):
        FeatureHooks(net, ["stem", name])


def test_at_most_three_names_are_offered(net):
    with pytest.raises(ValueError, match=r"nearest names are ('[^']*'(, )?){3}\.$"):
        FeatureHooks(net, ["stages.0.0.0"])


@pytest.mark.parametrize("name", ["qqqqqq", 3])
def test_a_name_like_no_other_points_to_named_modules(net, name):
    with pytest.raises(ValueError, match=rf"it has no {name!r}\. See `model\.named_modules\(\)`"):
        FeatureHooks(net, [name])


def test_refuses_no_layers(net):
    with pytest.raises(ValueError, match=r"`layers` must name at least one layer; got none"):
        FeatureHooks(net, [])


def test_refuses_a_single_string(net):
    with pytest.raises(TypeError, match=r"`layers` must be a list of module names; .*'stem'"):
        FeatureHooks(net, "stem")


def test_refuses_a_name_given_twice(net):
    with pytest.raises(ValueError, match=r"`layers` must name each layer once; got 'head' twice"):
        FeatureHooks(net, ["stem", "head", "head"])


@pytest.mark.parametrize("thing", [None, "stem", Net, torch.ones(2), lambda x: x])
def test_refuses_what_is_no_module(thing):
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module; got \w+\."):
        FeatureHooks(thing, ["stem"])


def test_refuses_data_parallel_and_says_why(net):
    reason = r"must not be a DataParallel: its replicas .* Use DistributedDataParallel, or .*module"
    with pytest.raises(TypeError, match=reason):
        FeatureHooks(DataParallel(net), ["stem"])
    with pytest.raises(TypeError, match=reason):
        FeatureHooks(torch.compile(DataParallel(net), backend="eager"), ["stem"])


# Wrapped models.


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_is_seen_through(net):
    plain = copy.deepcopy(net)
    model = DistributedDataParallel(net)
    assert unwrap(model) is net
    with FeatureHooks(model, LAYERS) as hooks:
        for seed in (1, 2):
            output = model(batch(seed))
            assert_features(hooks, by_hand(plain, batch(seed)))
            loss = output.square().sum() + sum(f.sum() for f in hooks.features)
            net.zero_grad()
            loss.backward()
            wanted = plain(batch(seed)).square().sum()
            wanted = wanted + sum(f.sum() for f in by_hand(plain, batch(seed)))
            plain.zero_grad()
            wanted.backward()
            for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad)
    assert hook_count(net) == 0
    with pytest.raises(ValueError, match=r"it has no 'module\.stem'.*'stem'"):
        FeatureHooks(model, ["module.stem"])


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "model.compile"])
def test_hooks_placed_before_the_first_call_are_compiled_in(net, backend, in_place):
    plain = copy.deepcopy(net)
    if in_place:
        net.compile(backend=backend, fullgraph=True)
        model = net
    else:
        model = torch.compile(net, backend=backend, fullgraph=True)
    assert unwrap(model) is net
    hooks = FeatureHooks(model, LAYERS)
    for seed in (1, 2, 3):
        output = model(batch(seed))
        torch.testing.assert_close(output, plain(batch(seed)))
        assert_features(hooks, by_hand(plain, batch(seed)))
        net.zero_grad()
        (output.square().sum() + sum(f.sum() for f in hooks)).backward()
        plain.zero_grad()
        wanted = plain(batch(seed)).square().sum()
        (wanted + sum(f.sum() for f in by_hand(plain, batch(seed)))).backward()
        for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.usefixtures("dynamo")
def test_a_compiled_layer_that_did_not_run_or_ran_twice_is_named(net):
    model = torch.compile(net, backend="eager", fullgraph=True)
    hooks = FeatureHooks(model, ["stem", "spare"])
    model(batch(), spare_uses=1)
    assert len(hooks.features) == 2
    for uses, message in ((0, "'spare' did not run"), (2, "'spare' ran 2 times")):
        model(batch(), spare_uses=uses)
        with pytest.raises(RuntimeError, match=message):
            _ = hooks.features


@pytest.mark.usefixtures("dynamo")
def test_removing_hooks_from_a_compiled_model_stops_the_collecting(net):
    model = torch.compile(net, backend="eager", fullgraph=True)
    with FeatureHooks(model, LAYERS) as hooks:
        model(batch(1))
    model(batch(2))
    assert_features(hooks, by_hand(net, batch(1)))
    assert hook_count(net) == 0


@pytest.mark.usefixtures("dynamo", "process_group")
@pytest.mark.parametrize("outermost", ["compile", "ddp"])
def test_wrappers_inside_wrappers_are_seen_through(net, outermost):
    if outermost == "compile":
        model = torch.compile(DistributedDataParallel(net), backend="eager")
    else:
        model = DistributedDataParallel(torch.compile(net, backend="eager"))
    assert unwrap(model) is net
    hooks = FeatureHooks(model, LAYERS)
    for seed in (1, 2):
        model(batch(seed))
        assert_features(hooks, by_hand(net, batch(seed)))


# Stale features: a stand-in for the loss checks them as the loss does.


def maps(features):
    return list(features.values() if isinstance(features, dict) else features)


def use(student, teacher):
    check_fresh(maps(student), maps(teacher))


def train_heads(teacher):
    check_estimator_fresh(maps(teacher))


def hooked(width=6):
    net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width))
    return net, FeatureHooks(net, ["1", "2"])


def rounded_copy(net):
    return copy.deepcopy(net).half().float()


COPIES = {
    "deepcopy": copy.deepcopy,
    "average": torch.optim.swa_utils.AveragedModel,
    "half": rounded_copy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "trace": lambda net: torch.jit.trace(net, batch()),
    "frozen trace": lambda net: torch.jit.freeze(torch.jit.trace(net.eval(), batch())),
}
copies = pytest.mark.parametrize("make", COPIES.values(), ids=COPIES.keys())
READS = {"features": lambda hooks: hooks.features, "hooks": lambda hooks: hooks}
reads = pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
# torch.jit announces its end, from inside torch.
traced = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@traced
@copies
@reads
def test_a_second_step_on_a_teacher_whose_copy_runs_is_refused(make, read):
    (student, of_student), (teacher, of_teacher) = hooked(), hooked()
    teacher(batch(0))
    twin = make(teacher)
    student(batch(0))
    twin(batch(0))
    use(read(of_student), read(of_teacher))
    student(batch(1))
    twin(batch(1))
    message = (
        r"features \(layers \['1', '2'\]\) are those of an earlier step: .*did not run.*copy of it"
    )
    with pytest.raises(RuntimeError, match=message):
        use(read(of_student), read(of_teacher))
    teacher(batch(1))
    use(read(of_student), read(of_teacher))


@traced
@copies
@reads
def test_a_second_step_on_a_student_whose_copy_runs_is_refused(make, read):
    (student, of_student), (teacher, of_teacher) = hooked(), hooked()
    student(batch(0))
    twin = make(student)
    for seed in (0, 1):
        twin(batch(seed))
        teacher(batch(seed))
        if seed == 0:
            use(read(of_student), read(of_teacher))
    with pytest.raises(RuntimeError, match=r"features .*place the hooks on that copy"):
        use(read(of_student), read(of_teacher))
    student(batch(1))
    use(read(of_student), read(of_teacher))


@reads
@pytest.mark.parametrize("kind", [list, tuple, lambda features: dict(enumerate(features))])
def test_a_stale_teacher_is_refused_beside_a_student_without_hooks(read, kind):
    teacher, of_teacher = hooked()
    teacher(batch())
    first, second = ([torch.randn(3, 6)] * 2 for _ in range(2))
    use(kind(first), read(of_teacher))
    use(kind(first), read(of_teacher))
    with pytest.raises(RuntimeError, match=r"teacher's features"):
        use(kind(second), read(of_teacher))


def test_a_student_that_is_freed_counts_as_another():
    teacher, of_teacher = hooked()
    teacher(batch())
    use([torch.randn(3, 6)], of_teacher)
    with pytest.raises(RuntimeError, match=r"teacher's features"):
        use([torch.randn(3, 6)], of_teacher)


@reads
def test_one_pass_serves_several_losses_of_a_step(read):
    (student, of_student), (teacher, of_teacher) = hooked(), hooked()
    for seed in range(3):
        student(batch(seed))
        teacher(batch(seed))
        for _ in range(3):
            use(read(of_student), read(of_teacher))
            train_heads(read(of_teacher))


@reads
def test_two_students_share_a_teacher_and_two_teachers_a_student(read):
    pairs = [hooked() for _ in range(4)]
    for seed in range(3):
        for net, _ in pairs:
            net(batch(seed))
        for _, of_student in pairs[:2]:
            for _, of_teacher in pairs[2:]:
                use(read(of_student), read(of_teacher))


@reads
def test_two_sets_of_layers_of_one_model_do_not_count_as_steps(read):
    (student, of_student), (teacher, of_teacher) = hooked(), hooked()
    more_of_student, more_of_teacher = FeatureHooks(student, ["0"]), FeatureHooks(teacher, ["0"])
    for seed in range(3):
        student(batch(seed))
        teacher(batch(seed))
        for ours in (of_student, more_of_student):
            for theirs in (of_teacher, more_of_teacher):
                use(read(ours), read(theirs))


def test_hooks_placed_anew_for_each_step_are_the_same_source():
    student, (teacher, of_teacher) = Net(), hooked()
    teacher(batch())
    for seed in (0, 1):
        with FeatureHooks(student, LAYERS) as of_student:
            student(batch(seed))
            if seed == 0:
                use(of_student.features, of_teacher.features)
    with pytest.raises(RuntimeError, match=r"teacher's features"):
        use(of_student.features, of_teacher.features)


def test_a_list_that_is_kept_may_serve_every_step():
    (student, of_student), (teacher, of_teacher) = hooked(), hooked()
    teacher(batch())
    kept = of_teacher.features
    for seed in range(3):
        student(batch(seed))
        use(of_student.features, kept)
    student(batch())
    with pytest.raises(RuntimeError, match=r"read `features` once and pass that list each time"):
        use(of_student.features, of_teacher.features)
    student(batch())
    kept = of_student.features
    for seed in range(3):
        teacher(batch(seed))
        use(kept, of_teacher.features)


def test_features_without_hooks_are_not_checked():
    student, teacher = [torch.randn(3, 6)], [torch.randn(3, 6)]
    net, hooks = hooked()
    net(batch())
    for _ in range(2):
        use([torch.randn(3, 6)], teacher)
        use(hooks.features, [torch.randn(3, 6)])
        check_estimator_fresh(student)


@pytest.mark.parametrize("name", ["deepcopy", "average", "half"])
@reads
def test_heads_train_on_one_pass_again_but_not_while_a_copy_runs(name, read):
    teacher, hooks = hooked()
    teacher(batch())
    twin = COPIES[name](teacher)
    kept = hooks.features
    check_estimator_fresh(kept)
    for _ in range(2):
        train_heads(read(hooks))  # one batch, again and again
    twin(batch(1))
    with pytest.raises(RuntimeError, match=r"teacher's features .*earlier step: .*a copy of it"):
        train_heads(read(hooks))
    teacher(batch(1))
    for _ in range(2):  # no copy ran since
        train_heads(read(hooks))


def test_checks_keep_no_features_alive_and_make_no_cycles():
    (student, of_student), (teacher, of_teacher) = hooked(), hooked()
    student(batch(0))
    teacher(batch(0))
    use(of_student.features, of_teacher.features)
    check_estimator_fresh(of_teacher.features)
    watched = [weakref.ref(f) for hooks in (of_student, of_teacher) for f in hooks.features]
    gc.disable()
    try:
        student(batch(1))
        assert [ref() is None for ref in watched] == [True, True, False, False]
        teacher(batch(1))
        assert all(ref() is None for ref in watched)
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("dynamo")
def test_compiled_code_takes_features_and_is_not_checked():
    (student, of_student), (teacher, of_teacher) = hooked(), hooked()

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(student, teacher):
        check_fresh(student, teacher)
        check_estimator_fresh(teacher)
        return sum(s.sum() * t.sum() for s, t in zip(student, teacher, strict=True))

    teacher(batch())
    for seed in (0, 1):
        student(batch(seed))
        got = compiled(of_student.features, of_teacher.features)
        pairs = zip(of_student, of_teacher, strict=True)
        torch.testing.assert_close(got, sum(s.sum() * t.sum() for s, t in pairs))


# Batch norms in training mode.


def test_batch_norms_in_training_mode_are_named():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.InstanceNorm2d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.Dropout(),
        nn.Flatten(),
        nn.LazyBatchNorm1d(),
    ).eval()
    net(torch.randn(2, 3, 2, 2))
    hooks = FeatureHooks(net, ["0"])
    net(torch.randn(2, 3, 2, 2))
    features = hooks.features
    assert training_norms(features) == []
    net[1].train()
    assert training_norms(features) == ["1.0"]
    net.train()
    assert training_norms(features) == training_norms(tuple(features)) == ["1.0", "4", "5", "8"]
    assert training_norms([torch.ones(2)]) == []
    net.eval()
    assert training_norms(features) == []


# Outputs that are no tensors.


class Pair(NamedTuple):
    hidden: torch.Tensor
    cache: object = None


@dataclasses.dataclass
class Record:
    cache: object
    hidden: torch.Tensor


class ModelOutput(OrderedDict):
    """Like that of transformers: a mapping that takes an index and has attributes."""

    def __getitem__(self, key):
        return tuple(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


class Gives(nn.Module):
    """A layer whose output is made from a tensor."""

    def __init__(self, make):
        super().__init__()
        self.linear, self.make = nn.Linear(4, 5), make

    def forward(self, x):
        return self.make(self.linear(x))


OUTPUTS = {
    "tuple": (lambda x: (x, None), 0, r"tuple \(Tensor \(3, 5\), NoneType\)", "`select=0`"),
    "list": (lambda x: [None, x], -1, r"list \(NoneType, Tensor \(3, 5\)\)", "`select=1`"),
    "dict": (lambda x: {"out": x}, "out", r"dict \('out': Tensor \(3, 5\)\)", "`select='out'`"),
    "number keys": (lambda x: {7: x}, 7, r"dict \(Tensor \(3, 5\)\)", "`select=7`"),
    "namedtuple": (Pair, "hidden", r"Pair \('hidden': Tensor.*'cache': No", "`select='hidden'`"),
    "namedtuple's index": (Pair, 0, r"Pair \('hidden'", "`select='hidden'`"),
    "dataclass": (
        lambda x: Record(None, x),
        "hidden",
        r"Record \('cache': NoneType, 'hidden': Tensor \(3, 5\)\)",
        "`select='hidden'`",
    ),
    "model output": (
        lambda x: ModelOutput(last_hidden_state=x, pooler=None),
        "last_hidden_state",
        r"ModelOutput \('last_hidden_state': Tensor",
        "`select='last_hidden_state'`",
    ),
    "model output's index": (
        lambda x: ModelOutput(last_hidden_state=x),
        0,
        r"ModelOutput",
        "`select='last_hidden_state'`",
    ),
    "nested": (
        lambda x: (None, {"maps": [Pair(x)]}),
        lambda output: output[1]["maps"][0].hidden,
        r"tuple \(NoneType, dict \('maps': list \(Pair\)\)\)",
        "`select=lambda output: ...`",
    ),
    "two deep": (
        lambda x: {"a": (None, x)},
        lambda output: output["a"][1],
        r"dict \('a': tuple \(NoneType, Tensor \(3, 5\)\)\)",
        "`select=lambda output: output['a'][1]`",
    ),
    "object": (
        lambda x: SimpleNamespace(hidden=x),
        "hidden",
        r"SimpleNamespace",
        "`select=lambda output: ...`",
    ),
    "many": (lambda x: (x,) * 20, 19, r"(Tensor \(3, 5\), ){8}\.\.\.\)", "`select=0`"),
    "nothing": (lambda _x: (), lambda _: torch.ones(3, 5), r"tuple, which", "lambda output"),
}
outputs = pytest.mark.parametrize("case", OUTPUTS.values(), ids=OUTPUTS.keys())


@outputs
@pytest.mark.parametrize("form", ["one for all", "list", "tuple"])
def test_select_takes_the_tensor_out_of_an_output(case, form):
    make, select, _, _ = case
    net, seen = nn.Sequential(nn.Identity(), Gives(make)), []
    net[1].linear.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    one = {"one for all": select, "list": [None, select], "tuple": (None, select)}[form]
    hooks = FeatureHooks(net, ["0", "1"], select=one if not callable(one) else [None, one])
    net(batch())
    assert torch.equal(hooks.features[0], batch())  # a tensor stays as it is
    assert hooks.features[1] is hooks.features[1]
    assert hooks.features[1].shape == (3, 5)
    if make(torch.ones(1)):
        assert hooks.features[1] is seen[0]


@outputs
def test_an_output_without_select_is_described_and_what_to_pass_is_said(case):
    make, _, described, advice = case
    net = nn.Sequential(Gives(make))
    hooks = FeatureHooks(net, ["0"])
    net(batch())
    with pytest.raises(TypeError, match=rf"^Layer '0' gave .*{described}.* is no tensor") as caught:
        _ = hooks.features
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("make", "select", "message"),
    [
        (lambda x: (x, None), 2, r"tuple \(.*; `select=2` failed with IndexError: tuple index"),
        (lambda x: {"out": x}, "aux", r"`select='aux'` failed with KeyError.*`select='out'`"),
        (lambda x: {"out": x}, "items", r"`select='items'` failed with KeyError"),
        (Pair, "state", r"Pair .*failed with AttributeError: .*`select='hidden'`"),
        (lambda x: (x, None), 1, r"`select=1` took NoneType, no tensor\. Pass `select=0`"),
        (lambda x: (x, (x, x)), 1, r"`select=1` took tuple \(Tensor \(3, 5\), Tensor.*no tensor"),
        (Pair, "count", r"`select='count'` took builtin_function"),
        (
            lambda x: x,
            lambda x: x[9, 9],
            r"Tensor \(3, 5\); .*lambda.* failed with IndexError",
        ),
        (lambda x: x, lambda _: 1 / 0, r"failed with ZeroDivisionError"),
    ],
)
def test_a_select_that_takes_no_tensor_raises_where_features_are_read(make, select, message):
    net = nn.Sequential(nn.Identity(), Gives(make))
    hooks = FeatureHooks(net, ["0", "1"], select=[None, select])
    net(batch())
    with pytest.raises(TypeError, match=r"Layer '1' gave .*" + message):
        _ = hooks.features


@pytest.mark.parametrize(
    "select", [1.0, True, b"out", {"0": 0}, [None, False], [None, torch.ones(1)]]
)
def test_refuses_a_select_of_another_kind(net, select):
    with pytest.raises(TypeError, match=r"`select` must be an index, a key, a callable or None"):
        FeatureHooks(net, ["stem", "head"], select=select)
    assert hook_count(net) == 0


@pytest.mark.parametrize("count", [0, 1, 3])
def test_refuses_a_list_of_selects_of_another_length(net, count):
    with pytest.raises(ValueError, match=rf"one entry per layer; got {count} for 2 layers"):
        FeatureHooks(net, ["stem", "head"], select=[0] * count)
    assert hook_count(net) == 0


def test_a_callable_is_applied_once_a_pass_to_tensors_too():
    calls = []

    def transposed(x):
        calls.append(x)
        return x.transpose(1, 2)

    net = nn.Sequential(nn.Conv1d(4, 5, 1))
    hooks = FeatureHooks(net, ["0"], select=transposed)
    output = net(torch.randn(2, 4, 7))
    for _ in range(2):
        assert torch.equal(hooks.features[0], output.mT)
    assert len(calls) == 1
    assert output is calls[0]


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_work_with_select(cell):
    net = nn.Sequential(cell(4, 5, batch_first=True))
    hooks = FeatureHooks(net, ["0"], select=0)
    output, _ = net(torch.randn(2, 7, 4))
    assert hooks.features[0] is output


def test_what_select_leaves_out_is_not_kept():
    rest = []

    def make(x):
        rest.append(weakref.ref(extra := torch.ones(2)))
        return x, extra

    net = nn.Sequential(Gives(make))
    hooks = FeatureHooks(net, ["0"], select=0)
    net(batch())
    assert rest[0]() is None
    assert hooks.features[0].shape == (3, 5)


def test_a_copy_or_pickle_of_a_model_does_not_mind_select():
    net = nn.Sequential(nn.LSTM(4, 5))
    with FeatureHooks(net, ["0"], select=lambda output: output[0]) as hooks:
        net(batch())
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            twin(batch(2))
        assert hooks.features[0].shape == (3, 5)


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("name", ["tuple", "dict", "namedtuple", "nested"])
def test_select_works_in_compiled_code(name):
    make, select, _, _ = OUTPUTS[name]
    net = nn.Sequential(Gives(make))
    hooks, plain = FeatureHooks(net, ["0"], select=select), copy.deepcopy(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for seed in (1, 2):
        compiled(batch(seed))
        torch.testing.assert_close(hooks.features[0], plain[0].linear(batch(seed)))


@pytest.mark.usefixtures("dynamo")
def test_compiled_code_refuses_an_output_that_is_no_tensor():
    net = nn.Sequential(Gives(lambda x: (x, None)))
    hooks = FeatureHooks(net, ["0"])
    torch.compile(net, backend="eager", fullgraph=True)(batch())
    with pytest.raises(TypeError, match=r"Layer '0' gave tuple \(Tensor \(3, 5\), NoneType\)"):
        _ = hooks.features


# In-place operations after a layer.


class Then(nn.Module):
    """A linear layer, and an operation on its output."""

    def __init__(self, operation):
        super().__init__()
        self.linear, self.operation = nn.Linear(4, 5), operation

    def forward(self, x):
        x = self.linear(x)
        y = self.operation(x)
        return x if y is None else y


def add_residual(x):
    x += torch.ones(5)
    return x


IN_PLACE = {
    "relu": nn.ReLU(inplace=True),
    "leaky relu": nn.LeakyReLU(inplace=True),
    "dropout": lambda x: nn.functional.dropout(x, 0.5, training=True, inplace=True),
    "residual": add_residual,
    "mul_": lambda x: x.mul_(2),
    "slice": lambda x: x[:, :2].zero_(),
    "view": lambda x: x.view(-1).sigmoid_(),
    "index": lambda x: x.__setitem__((0, 0), 1.0),
    "detached": lambda x: x.detach().add_(1),
}
in_place = pytest.mark.parametrize("operation", IN_PLACE.values(), ids=IN_PLACE.keys())


@in_place
@pytest.mark.parametrize("grad", [True, False])
def test_an_output_changed_in_place_afterwards_is_refused(operation, grad):
    net = Then(operation)
    hooks = FeatureHooks(net, ["linear"])
    message = r"Layer 'linear' gave a tensor that was changed in place.*Hook the layer that changes"
    with torch.set_grad_enabled(grad):
        net(batch())
    with pytest.raises(RuntimeError, match=message):
        _ = hooks.features


@in_place
def test_inference_mode_keeps_the_output_as_it_was(operation):
    net = Then(operation)
    hooks = FeatureHooks(net, ["linear"])
    with torch.inference_mode():
        net(batch())
        torch.testing.assert_close(hooks.features[0], net.linear(batch()))


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["relu", "residual", "mul_", "slice"])
def test_compiled_code_keeps_the_output_as_it_was(backend, name):
    net = Then(IN_PLACE[name])
    wanted = nn.functional.linear(batch(), net.linear.weight, net.linear.bias)
    hooks = FeatureHooks(net, ["linear"])
    torch.compile(net, backend=backend, fullgraph=True)(batch())
    torch.testing.assert_close(hooks.features[0], wanted)
    got = torch.autograd.grad(hooks.features[0].sin().sum(), net.linear.weight)
    torch.testing.assert_close(got, torch.autograd.grad(wanted.sin().sum(), net.linear.weight))


def test_the_layer_that_works_in_place_may_be_hooked():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 5))
    hooks = FeatureHooks(net, ["1", "2"])
    net(batch())
    assert torch.equal(hooks.features[0], net[0](batch()).relu())


# Scripts and traces.


@traced
@pytest.mark.parametrize("make", [torch.jit.script, lambda net: torch.jit.trace(net, batch())])
def test_a_script_module_is_refused(make):
    plain = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
    scripted = make(plain)
    with pytest.raises(
        TypeError, match=r"must not be a ScriptModule: its layers run in C\+\+.*plain"
    ):
        FeatureHooks(scripted, ["0"])
    net = nn.Sequential(nn.Identity(), nn.Sequential(scripted))
    with pytest.raises(TypeError, match=r"'1\.0\.1': it is inside a ScriptModule"):
        FeatureHooks(net, ["0", "1.0.1"])
    assert hook_count(plain) == 0
    with FeatureHooks(net, ["0", "1"]) as hooks:
        output = net(batch())
        assert hooks.features[1] is output


@traced
def test_of_scripts_inside_a_model_traced_ones_take_hooks():
    plain = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
    with pytest.raises(TypeError, match=r"must not name '0': it is a ScriptModule"):
        FeatureHooks(nn.Sequential(torch.jit.script(plain)), ["0"])
    net = nn.Sequential(torch.jit.trace(plain, batch()))
    hooks = FeatureHooks(net, ["0"])
    output = net(batch())
    assert hooks.features[0] is output


@traced
def test_scripting_a_hooked_model_names_remove():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
    hooks = FeatureHooks(net, ["1"])
    with pytest.raises(AttributeError, match=r"torch\.jit\.script.*`FeatureHooks\.remove\(\)`"):
        torch.jit.script(net)
    hooks.remove()
    torch.jit.script(net)


class Block(nn.Module):
    def __init__(self, make=lambda x: x):
        super().__init__()
        self.linear, self.make = nn.Linear(4, 4), make

    def forward(self, x):
        return self.make(self.linear(x).tanh())


def exported(net, *, strict):
    return torch.export.export(net, (batch(),), strict=strict)


def with_fake_tensors(net):
    from torch.fx.experimental.proxy_tensor import make_fx

    def call(parameters, x):
        return torch.func.functional_call(net, parameters, (x,))

    make_fx(call, tracing_mode="fake")(dict(net.named_parameters()), batch())


TRACES = {
    "fx": torch.fx.symbolic_trace,
    "export": lambda net: exported(net, strict=False),
    "strict export": lambda net: exported(net, strict=True),
    "make_fx": with_fake_tensors,
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("select", [None, 0, lambda output: output[0]])
@pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES.keys())
def test_a_trace_leaves_no_features(trace, select):
    make = (lambda x: x) if select is None else (lambda x: (x, x))
    net = nn.Sequential(nn.Linear(4, 4), Block(make))
    hooks = FeatureHooks(net, ["1"], select=select)
    trace(net)
    message = r"Layer '1' gave no values: the last forward pass was a trace.*Run the model itself"
    if trace is TRACES["strict export"]:  # it may undo what hooks did
        message += r"|Layer '1' did not run"
    with pytest.raises(RuntimeError, match=message):
        _ = hooks.features
    net(batch())
    assert hooks.features[0].shape == (3, 4)


# Wrappers of frameworks.


class Shell(nn.Module):
    """What Fabric returns from `setup`, as small as it goes."""

    def __init__(self, forward_module, original_module):
        super().__init__()
        self._forward_module, self._original_module = forward_module, original_module

    def forward(self, x):
        return self._forward_module(x)


@pytest.mark.usefixtures("dynamo", "process_group")
@pytest.mark.parametrize("inside", ["plain", "ddp", "compiled", "both"])
def test_the_shell_of_fabric_is_seen_through(net, inside):
    wrapped = torch.compile(net, backend="eager") if inside in ("compiled", "both") else net
    wrapped = DistributedDataParallel(wrapped) if inside in ("ddp", "both") else wrapped
    model = Shell(wrapped, net)
    assert unwrap(model) is net
    with FeatureHooks(model, LAYERS) as hooks:
        model(batch())
        assert_features(hooks, by_hand(net, batch()))
    with pytest.raises(ValueError, match=r"it has no '_forward_module\.stem'.*'stem'"):
        FeatureHooks(model, ["_forward_module.stem"])


def test_a_model_with_an_attribute_like_that_of_fabric_is_a_plain_model(net):
    net._forward_module = nn.Linear(1, 1)
    assert unwrap(net) is net
    assert unwrap(Shell(net, None)) is not net
    net._original_module = None
    assert unwrap(net) is net


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric_is_seen_through(net, precision):
    try:
        from lightning.fabric import Fabric
    except (ImportError, RuntimeError) as error:  # no dependency; RuntimeError from its torchvision
        pytest.skip(f"Lightning can not be imported: {error}")
    model = Fabric(accelerator="cpu", devices=1, precision=precision).setup(net)
    assert unwrap(model) is net
    with FeatureHooks(model, LAYERS) as hooks:
        model(batch())
        torch.testing.assert_close(
            [f.float() for f in hooks.features], by_hand(net, batch()), rtol=0.05, atol=0.05
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_models_prepared_by_accelerate_work(net, precision):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is no dependency")
    model = accelerate.Accelerator(cpu=True, mixed_precision=precision).prepare(net)
    try:
        assert unwrap(model) is net
        with FeatureHooks(model, LAYERS) as hooks:
            model(batch())
            torch.testing.assert_close(
                [f.float() for f in hooks.features], by_hand(net, batch()), rtol=0.05, atol=0.05
            )
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_names_inside_a_checkpointed_submodule_are_those_of_the_plain_one(net):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    net.stages = checkpoint_wrapper(net.stages)
    with FeatureHooks(net, LAYERS) as hooks:
        net(batch())
        torch.testing.assert_close(hooks.features[0], net.stem(batch()))


@pytest.mark.usefixtures("process_group")
def test_layers_sharded_in_place_take_hooks(net):
    fsdp = pytest.importorskip("torch.distributed._composable.fsdp", reason="not in this torch")
    plain = copy.deepcopy(net)
    fsdp.fully_shard(net.stages)
    fsdp.fully_shard(net)
    with FeatureHooks(net, LAYERS) as hooks:
        net(batch())
        assert_features(hooks, by_hand(plain, batch()))
        sum(f.sum() for f in hooks.features).backward()
    sum(f.sum() for f in by_hand(plain, batch())).backward()
    torch.testing.assert_close(net.stem.weight.grad.full_tensor(), plain.stem.weight.grad)


def test_features_are_a_plain_list_and_unchecked_while_compiling(monkeypatch):
    net, hooks = hooked()
    net(batch())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for _ in range(3):
        assert type(hooks.features) is list
        use([torch.randn(3, 6)], hooks.features)
        train_heads(hooks)


@pytest.mark.parametrize("layers", [3, None, torch.nn.ReLU])
def test_refuses_layers_that_are_no_list(net, layers):
    with pytest.raises(TypeError, match=r"`layers` must be a list of module names; got \w+\."):
        FeatureHooks(net, layers)


# What a review found.

FORMS = {
    "list": list,
    "unpacked": lambda hooks: [*hooks],
    "slice": lambda hooks: hooks.features[:],
    "tuple": lambda hooks: tuple(hooks.features),
    "dict": lambda hooks: dict(zip("ab", hooks.features, strict=True)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_staleness_is_noticed_in_whatever_list_features_come(form):
    (student, of_student), (teacher, of_teacher) = hooked(), hooked()
    twin = copy.deepcopy(teacher)
    student(batch(0))
    teacher(batch(0))
    use(form(of_student), form(of_teacher))
    student(batch(1))
    twin(batch(1))
    with pytest.raises(RuntimeError, match=r"features .*earlier step"):
        use(form(of_student), form(of_teacher))


def test_features_that_are_changed_on_the_way_are_noticed_at_the_second_stale_read():
    teacher, hooks = hooked()
    twin = copy.deepcopy(teacher)
    teacher(batch(0))
    for seed in (1, 2):
        assert all((2 * feature).isfinite().all() for feature in hooks)
        if seed == 1:
            twin(batch(seed))
    twin(batch(3))
    with pytest.raises(RuntimeError, match=r"place the hooks on that copy"):
        _ = hooks.features
    teacher(batch(4))
    _ = hooks.features


def test_the_same_student_does_not_hide_that_a_copy_teaches():
    teacher, hooks = hooked()
    twin, student = copy.deepcopy(teacher), [torch.randn(3, 6)] * 2
    teacher(batch(0))
    use(student, hooks)
    use(student, hooks)
    twin(batch(1))
    with pytest.raises(RuntimeError, match=r"teacher's features"):
        use(student, hooks)


def test_a_loss_without_gradient_is_no_step():
    (student, of_student), (teacher, of_teacher) = hooked(), hooked()
    teacher(batch(0))
    for seed in range(3):  # to look at the loss after each step, say
        student(batch(seed))
        with torch.no_grad():
            use(of_student, of_teacher)


class Owner(nn.Module):
    """Holds its network and its hooks."""

    def __init__(self, mode):
        super().__init__()
        self.net, self.mode = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), mode
        self.hooks = FeatureHooks(self.net, ["0"])

    def forward(self, x):
        with self.mode():
            self.net(x)
        return self.hooks.features


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "average"])
def test_copied_hooks_hold_no_batch_and_say_that_they_are_a_copy(mode, kind):
    owner = Owner(mode)
    owner(batch(0))
    make = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda x: pickle.loads(pickle.dumps(x)),
        "average": torch.optim.swa_utils.AveragedModel,
    }
    twin = make[kind](owner)
    with pytest.raises(RuntimeError, match=r"hooks are a copy.*FeatureHooks\(model, layers\)"):
        twin(batch(1))
    assert torch.equal(owner(batch(2))[0], owner.net[0](batch(2)))


def test_a_backward_pass_through_a_checkpoint_does_not_count_as_a_run():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)

    net = Checkpointed()
    with FeatureHooks(net, ["layer"]) as hooks:
        output = net(batch())
        before = hooks.features[0]
        output.sum().backward()
        assert hooks.features[0] is before
