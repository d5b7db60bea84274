"""FeatureHooks: what it collects, from which models, and what it refuses."""

import copy
import dataclasses
import functools
import gc
import itertools
import pickle
import weakref
from collections import UserDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from graph_kd import FeatureHooks, GraphTransferLoss

# torch.jit announces its end, from inside torch.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Net(nn.Module):
    """Stages whose names have dots, and a layer that may be left out or run twice."""

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


def by_hand(net, x):
    """Return the features at LAYERS without calling a module, which would run its hooks."""
    stem = F.linear(x, *net.stem.parameters())
    first = F.linear(stem.tanh(), *net.stages[0][0].parameters()).tanh()
    return [stem, first, F.linear(first, *net.stages[1][0].parameters()).tanh()]


class Gives(nn.Module):
    """A linear layer, and a function of its output."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(4, 5), function

    def forward(self, x):
        return self.function(self.linear(x))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()


def batch(seed=1):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))


def hook_count(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def assert_same(features, others):
    assert all(a is b for a, b in zip(features, others, strict=True))


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


# What is collected.


def test_features_are_the_layers_very_outputs_in_the_order_of_the_names(net):
    net.alias = net.stages[1]
    wanted, seen = net(batch()), []
    for layer in (net.stem, net.stages[1]):
        layer.register_forward_hook(lambda *passed: seen.append(passed[-1]))
    layers = ["alias", "stem", "stages.1", ""]  # two names of one module, and the model itself
    hooks = FeatureHooks(net, iter(layers))
    output = net(batch())
    stem, stage = seen
    assert torch.equal(output, wanted)
    assert_same(hooks.features, [stage, stem, stage, output])
    assert_same(hooks, hooks.features)
    torch.autograd.grad(output.sum(), hooks.features)  # raises where no gradient flows
    assert len(hooks) == 4
    assert hooks.layers == tuple(layers)
    assert repr(hooks) == f"FeatureHooks(layers={layers})"


def test_a_second_forward_replaces_the_first(net):
    hooks = FeatureHooks(net, LAYERS)
    net(batch(1))
    first = hooks.features
    assert_same(first, hooks.features)
    net(batch(2))
    assert_close(hooks.features, by_hand(net, batch(2)))
    assert_close(first, by_hand(net, batch(1)))  # a list of one's own


def test_leaving_removes_the_hooks_and_keeps_the_features_and_hooks_of_others(net):
    net.stem.register_forward_hook(lambda *_: None)
    net.register_forward_pre_hook(lambda *_: None)
    hooks = FeatureHooks(net, LAYERS)
    assert hook_count(net) == 6
    net(batch(1))
    with pytest.raises(ZeroDivisionError), hooks:
        raise ZeroDivisionError
    hooks.remove()  # a second time does no harm
    assert hook_count(net) == 2
    net(batch(2))
    assert_close(hooks.features, by_hand(net, batch(1)))


# Layers that did not run, or ran twice.


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("uses", "message"),
    [
        (0, "did not run in the last forward pass.*name layers that its forward uses"),
        (2, r"ran 2 times.*must run once.*Call `model\(\.\.\.\)`, not `model\.forward"),
    ],
)
def test_a_layer_that_did_not_run_or_ran_twice_is_named(net, uses, message, compiled):
    model = torch.compile(net, backend="eager", fullgraph=True) if compiled else net
    hooks = FeatureHooks(model, ["stem", "spare"])
    for _ in range(2):
        model(batch(), spare_uses=1)
        assert len(hooks.features) == 2
        model(batch(), spare_uses=uses)
        with pytest.raises(RuntimeError, match=f"Layer 'spare' {message}"):
            _ = hooks.features


def test_before_any_forward_and_after_one_that_failed_no_layer_has_run(net):
    hooks = FeatureHooks(net, LAYERS)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Layer 'stem' did not run"):
            _ = hooks.features
        net(batch())
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            net(torch.randn(3, 5))


# In-place operations after a layer.

IN_PLACE = {
    "relu": nn.ReLU(inplace=True),
    "mul_": lambda x: x.mul_(2),
    "slice": lambda x: x[:, :2].zero_(),
    "view": lambda x: x.view(-1).sigmoid_(),
    "detached": lambda x: x.detach().add_(1),
}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("grad", [True, False])
def test_an_output_changed_in_place_afterwards_is_refused(name, grad):
    net = Gives(IN_PLACE[name])
    hooks = FeatureHooks(net, ["linear"])
    with torch.set_grad_enabled(grad):
        net(batch())
    message = r"Layer 'linear' gave a tensor that was changed in place.*Hook the layer that changes"
    with pytest.raises(RuntimeError, match=message):
        _ = hooks.features


@pytest.mark.parametrize("mode", ["inference", "eager", "aot_eager"])
@pytest.mark.parametrize("name", ["relu", "mul_", "slice"])
def test_inference_mode_and_compiled_code_keep_the_output_as_it_was(mode, name):
    net = Gives(IN_PLACE[name])
    wanted = F.linear(batch(), net.linear.weight, net.linear.bias)
    hooks = FeatureHooks(net, ["linear"])
    inference = mode == "inference"
    model = net if inference else torch.compile(net, backend=mode, fullgraph=True)
    with torch.inference_mode(inference):
        model(batch())
        assert_close(hooks.features[0], wanted)
    if not inference:
        got = torch.autograd.grad(hooks.features[0].sin().sum(), net.linear.weight)
        assert_close(got, torch.autograd.grad(wanted.sin().sum(), net.linear.weight))


# Outputs that are no tensors.

Pair = namedtuple("Pair", ["hidden", "cache"], defaults=[None])
Record = dataclasses.make_dataclass("Record", ["cache", "hidden"])
AT, NONE = "lambda output: output", "lambda output: ..."
# How the output is made, what a message says of it, and selects that take the tensor: first the one
# that the message advises.
OUTPUTS = {
    "tuple": (lambda x: (x, None), "tuple ({}, NoneType)", "0"),
    "list": (lambda x: [*[0] * 7, x], f"list ({'int, ' * 7}{{}})", "7", "-1"),
    "dict": (lambda x: {"out": x}, "dict ('out': {})", "'out'"),
    "mapping": (lambda x: UserDict(out=x), "UserDict ('out': {})", "'out'"),
    "number keys": (lambda x: {7: x}, "dict ({})", "7"),
    "namedtuple": (Pair, "Pair ('hidden': {}, 'cache': NoneType)", "'hidden'", "0"),
    "dataclass": (lambda x: Record(0, x), "Record ('cache': int, 'hidden': {})", "'hidden'"),
    "other keys": (lambda x: {2.5: x}, "dict (2.5: {})", AT + "[2.5]"),
    "behind a deeper one": (lambda x: ([x + 1], x), "tuple (list ({}), {})", "1"),
    "deep": (lambda x: {"a": (0, [x])}, "dict ('a': tuple (int, list ({})))", AT + "['a'][1][0]"),
    "too deep": (lambda x: [[[(x,)]]], "list (list (list (tuple)))", NONE, AT + "[0][0][0][0]"),
    "object": (lambda x: SimpleNamespace(hidden=x), "SimpleNamespace", NONE, "'hidden'"),
    "many": (lambda x: (x,) * 20, f"tuple ({'{}, ' * 8}...)", "0", "19"),
    "nothing": (lambda _: (), "tuple", NONE),
}
COMPILED = ["tuple", "dict", "namedtuple", "deep"]
CASES = [(name, False) for name in OUTPUTS] + [(name, True) for name in COMPILED]


@pytest.mark.parametrize(("name", "compiled"), CASES)
def test_select_takes_the_tensor_out_of_an_output_and_the_message_says_which(name, compiled):
    make, described, *selects = OUTPUTS[name]
    net = nn.Sequential(Gives(make))
    without = FeatureHooks(net, ["0"])
    selecting = [FeatureHooks(net, ["0"], select=eval(s)) for s in selects if s != NONE]
    model = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
    gave = described.replace("{}", "Tensor (3, 5)")
    message = f"Layer '0' gave {gave}, which is no tensor. Pass `select={selects[0]}`."
    for seed in (1, 2):
        model(batch(seed))
        for hooks in selecting:
            assert_close(hooks.features[0], F.linear(batch(seed), *net[0].linear.parameters()))
        with pytest.raises(TypeError) as caught:
            _ = without.features
        assert str(caught.value) == message
        assert caught.value.__cause__ is None


@pytest.mark.parametrize("select", [0, [None, 0], (None, 0), [None, lambda output: output[0]]])
def test_select_is_one_for_all_layers_or_a_list_and_leaves_tensors_as_they_are(select):
    net = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 5))
    hooks = FeatureHooks(net, ["0", "1"], select=select)
    output, _ = net(batch())
    assert torch.equal(hooks.features[0], F.linear(batch(), *net[0].parameters()))
    assert hooks.features[1] is output


def test_select_is_applied_once_a_pass_and_the_rest_is_not_kept():
    rest = []

    def select(output):
        rest.append(weakref.ref(output[1]))
        return output[0]

    net = Gives(lambda x: (x, x + 1))
    hooks = FeatureHooks(net, [""], select=select)
    net(batch())
    assert_same(hooks.features, hooks.features)
    assert [ref() for ref in rest] == [None]


@pytest.mark.parametrize(
    ("make", "select", "message"),
    [
        (lambda x: (x, None), 2, r"tuple \(.*; `select=2` failed with IndexError: tuple index"),
        (lambda x: {"out": x}, "items", r"`select='items'` failed with KeyError"),
        (Pair, "state", r"Pair .*failed with AttributeError: .*`select='hidden'`"),
        (lambda x: x, ord, r"Tensor \(3, 5\); .*function ord.* failed with TypeError"),
        (lambda x: (x, None), 1, r"`select=1` took NoneType, no tensor\. Pass `select=0`"),
        (lambda x: (x, (x, x)), 1, r"`select=1` took tuple \(Tensor \(3, 5\), Tensor.*no tensor"),
    ],
)
def test_a_select_that_takes_no_tensor_raises_where_features_are_read(make, select, message):
    net = nn.Sequential(nn.Identity(), Gives(make))
    hooks = FeatureHooks(net, ["0", "1"], select=[None, select])
    net(batch())
    with pytest.raises(TypeError, match=r"Layer '1' gave .*" + message) as caught:
        _ = hooks.features
    assert ("failed" in message) == isinstance(caught.value.__cause__, Exception)
    assert getattr(caught.value.__cause__, "__traceback__", None) is None  # it held the batch


def test_hooks_of_a_compiled_layer_see_it_after_it_ran_without_them():
    net = nn.Sequential(torch.compile(nn.Linear(4, 6), backend="eager"), nn.Linear(6, 6))
    net(batch())
    with FeatureHooks(net, ["0"]) as hooks:
        net(batch())
        assert hooks.features[0].shape == (3, 6)


# Features of an earlier step.


def hooked():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6))
    return net, FeatureHooks(net, ["1", "2"])


def without_hooks():
    return [torch.randn(3, 6, requires_grad=True) for _ in range(2)]


@pytest.fixture(params=["as they are", "in a mapping, one changed"])
def do(request):
    """Return a function that does what it is told, in the words of a training loop."""
    (student, of_student), (teacher, of_teacher) = hooked(), hooked()
    student_copy, teacher_copy = copy.deepcopy(student), copy.deepcopy(teacher)
    of = {"student": of_student, "teacher": of_teacher, "unhooked": without_hooks()}
    transfer = GraphTransferLoss([6, 6], 2)

    def read(name):
        if request.param == "as they are":
            return of[name]
        first, *rest = of[name]
        return dict(enumerate([2 * first, *rest]))

    words = {
        "student": lambda: student(batch()),
        "teacher": lambda: teacher(batch()),
        "student_copy": lambda: student_copy(batch()),
        "teacher_copy": lambda: teacher_copy(batch()),
        "loss": lambda: transfer(read("student"), read("teacher")),
        "look": torch.no_grad()(lambda: transfer(read("student"), read("teacher"))),
        "heads": lambda: transfer.estimator_loss(read("teacher")),
        "read_teacher": lambda: of_teacher.features,
        "keep": lambda: of.update(kept_student=list(of_student), kept_teacher=list(of_teacher)),
        "loss_of_kept_teacher": lambda: transfer(read("student"), of["kept_teacher"]),
        "loss_of_kept_student": lambda: transfer(of["kept_student"], read("teacher")),
        "another_unhooked": lambda: of.update(unhooked=without_hooks()),
        "loss_of_unhooked": lambda: transfer(of["unhooked"], read("teacher")),
        "loss_of_unhooked_teacher": lambda: transfer(read("student"), without_hooks()),
        "heads_of_unhooked": lambda: transfer.estimator_loss(without_hooks()),
        "hook_student_anew": lambda: of.update(student=FeatureHooks(student, ["1", "2"])),
    }
    return lambda text: [words[word]() for word in text.split()]


@pytest.mark.parametrize(
    "text",
    [
        "student teacher loss student teacher loss",
        "student teacher loss loss heads student_copy loss heads",  # losses of one step
        "student teacher keep student loss_of_kept_teacher student loss_of_kept_teacher",
        "student teacher keep teacher loss_of_kept_student teacher loss_of_kept_student",
        "teacher student look student look",  # a loss without gradient is no step
        # Averages run beside both models, before their passes and after a look at the features.
        "teacher_copy teacher student read_teacher teacher_copy student_copy loss heads",
        "teacher loss_of_unhooked loss_of_unhooked teacher another_unhooked loss_of_unhooked",
        "student loss_of_unhooked_teacher heads_of_unhooked loss_of_unhooked_teacher",
    ],
)
def test_features_serve_their_own_step_and_a_kept_list_any(do, text):
    do(text)


@pytest.mark.parametrize(
    ("role", "before", "refused"),
    [
        # Only one model runs: the hooks of the other do not see its pickle or trace.
        ("teacher", "student teacher loss student", "loss"),
        ("student", "student teacher loss teacher", "loss"),
        ("teacher", "student teacher loss student teacher_copy", "loss"),
        ("student", "student teacher loss teacher student_copy teacher", "loss"),
        ("teacher", "student teacher keep student loss_of_kept_teacher student", "loss"),
        ("teacher", "student teacher loss hook_student_anew student", "loss"),
        ("teacher", "student teacher loss keep student", "loss"),
        ("teacher", "teacher loss_of_unhooked another_unhooked", "loss_of_unhooked"),
        # The same student does not hide that a copy teaches.
        ("teacher", "teacher loss_of_unhooked loss_of_unhooked teacher_copy", "loss_of_unhooked"),
        ("teacher", "teacher heads heads teacher_copy", "heads"),
        # Whatever the features are used for: a copy runs, they are read, and so on.
        ("hooked model", "teacher read_teacher teacher_copy read_teacher teacher_copy", "heads"),
    ],
)
def test_features_of_an_earlier_step_are_refused_until_the_model_runs(do, role, before, refused):
    message = (
        rf"The {role}'s features \(layers \['1', '2'\]\) are those of an earlier step: .*did not "
        "run since.*place the hooks on that copy.*read `features` once and pass that list"
    )
    do(before)
    with pytest.raises(RuntimeError, match=message):
        do(refused)
    do(f"student teacher {refused}")


def test_one_pass_serves_every_pair_of_models_and_layers():
    nets, transfer = [hooked() for _ in range(4)], GraphTransferLoss([6, 6], 2)
    of_nets = [[hooks, FeatureHooks(net, ["0", "1"])] for net, hooks in nets]
    for seed in range(2):
        for net, _ in nets:
            net(batch(seed))
        for pair in itertools.product(of_nets[0] + of_nets[1], of_nets[2] + of_nets[3]):
            transfer(*pair)
            transfer.estimator_loss(pair[1])


def test_one_pass_of_the_teacher_serves_students_that_come_and_go():
    (teacher, of_teacher), transfer = hooked(), GraphTransferLoss([6, 6], 2)
    teacher(batch(0))
    for _ in range(20):  # a new model can take the id of one that is gone
        student, of_student = hooked()
        student(batch(0))
        transfer(of_student, of_teacher)


def test_losses_keep_no_features_alive_and_make_no_cycles():
    (student, of_student), (teacher, of_teacher) = hooked(), hooked()
    transfer, unhooked = GraphTransferLoss([6, 6], 2), without_hooks()
    student(batch(0))
    teacher(batch(0))
    transfer(of_student, of_teacher)
    transfer(unhooked, of_teacher)
    transfer.estimator_loss(of_teacher)
    watched = [weakref.ref(feature) for feature in (unhooked[0], *of_student, *of_teacher)]
    gc.disable()
    try:
        del unhooked
        student(batch(1))
        assert [ref() is None for ref in watched] == [True, True, True, False, False]
        teacher(batch(1))
        assert all(ref() is None for ref in watched)
    finally:
        gc.enable()


def test_a_norm_of_the_teacher_whose_running_statistics_move_is_named():
    still = nn.BatchNorm2d(4, track_running_stats=False), nn.InstanceNorm2d(4), nn.Dropout()
    norms = nn.Sequential(*still, nn.BatchNorm2d(4).eval(), nn.SyncBatchNorm(4))
    teacher = nn.Sequential(nn.Conv2d(3, 4, 1), norms)
    hooks = FeatureHooks(teacher, ["0", "1"])
    teacher(torch.randn(3, 3, 2, 2))
    with pytest.warns(UserWarning, match=r"in training mode \(see '1\.4'\)"):
        GraphTransferLoss([4, 4], 2).estimator_loss(hooks)


# Wrapped models.


class Shell(nn.Module):
    """What Fabric returns from `setup`, as small as it goes."""

    def __init__(self, forward_module, original_module):
        super().__init__()
        self._forward_module, self._original_module = forward_module, original_module

    def forward(self, x):
        return self._forward_module(x)


def by_fabric(net):
    fabric = pytest.importorskip("lightning.fabric", reason="needs the extra `integrations`")
    return fabric.Fabric(accelerator="cpu", devices=1).setup(net)


def sharded(net):
    if torch.__version__.startswith("2.4."):
        pytest.skip("torch 2.4 shards on GPUs only")
    fsdp = pytest.importorskip("torch.distributed._composable.fsdp", reason="not in this torch")
    fsdp.fully_shard(net.stages)
    return fsdp.fully_shard(net) or net


compiled = functools.partial(torch.compile, backend="eager")
WRAPPERS = {
    "ddp": DistributedDataParallel,
    "compiled": lambda net: compiled(net, fullgraph=True),
    "compiled by aot_eager": lambda net: compiled(net, backend="aot_eager", fullgraph=True),
    "compiled in place": lambda net: net.compile(backend="eager", fullgraph=True) or net,
    "compiled ddp": lambda net: compiled(DistributedDataParallel(net)),
    "ddp of compiled": lambda net: DistributedDataParallel(compiled(net)),
    "compiled inside": lambda net: net.add_module("stages", compiled(net.stages)) or net,
    "checkpoint": lambda net: net.add_module("stages", checkpoint_wrapper(net.stages)) or net,
    "sharded in place": sharded,
    "shell of ddp of compiled": lambda net: Shell(DistributedDataParallel(compiled(net)), net),
    "fabric": by_fabric,
}


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


# torch.compile looks at `.grad` of what comes into a compiled submodule, and warns itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Lightning
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", WRAPPERS)
def test_hooks_on_a_wrapped_model_give_the_plain_models_features_and_gradients(net, name):
    plain = copy.deepcopy(net)
    model = WRAPPERS[name](net)
    count = hook_count(net)
    with FeatureHooks(model, LAYERS) as hooks:
        assert hook_count(net) == count + 4  # all on the plain model
        for seed in (1, 2, 3):
            output, wanted = model(batch(seed)), plain(batch(seed))
            features = by_hand(plain, batch(seed))
            assert_close(output, wanted)
            assert_close(hooks.features, features)
            (output.square().sum() + sum(f.sum() for f in hooks)).backward()
            (wanted.square().sum() + sum(f.sum() for f in features)).backward()
            for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
                grad = ours.grad.full_tensor() if name == "sharded in place" else ours.grad
                assert_close(grad, theirs.grad)
    assert hook_count(net) == count
    model(batch(4))
    # What a checkpoint computed again in the backward pass did not count as a run either.
    assert_close(hooks.features, by_hand(plain, batch(3)))


def test_a_model_with_attributes_like_those_of_fabric_is_a_plain_model(net):
    net._forward_module, net._original_module = nn.Linear(1, 1), None
    FeatureHooks(net, LAYERS)  # raises where these names are unknown


# Copies of a model, and of hooks.


def test_a_copy_of_the_model_leaves_the_hooks_of_the_original_alone(net):
    hooks = FeatureHooks(net, LAYERS)
    trace = torch.jit.trace(net.eval(), batch())
    net(batch())
    twin, before = copy.deepcopy(net), hooks.features
    for other in (twin, AveragedModel(net), pickled(net), trace, torch.jit.freeze(trace)):
        other(batch(2))
    assert_same(hooks.features, before)
    with FeatureHooks(twin, LAYERS) as hooks_of_twin:
        twin(batch(2))
        assert_close(hooks_of_twin.features, by_hand(twin, batch(2)))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", [copy.deepcopy, pickled])
def test_copied_hooks_hold_no_batch_and_say_that_they_are_a_copy(net, mode, make):
    net.hooks = FeatureHooks(net, LAYERS, select=lambda output: output)
    empty = len(pickle.dumps(net))
    with mode():
        net(batch())
    assert len(pickle.dumps(net)) == empty
    twin = make(net)
    size = len(pickle.dumps(twin))
    twin(batch(2))
    assert len(pickle.dumps(twin)) == size
    with pytest.raises(RuntimeError, match=r"hooks are a copy.*FeatureHooks\(model, layers\)"):
        _ = twin.hooks.features
    twin.hooks.remove()
    assert (hook_count(twin), hook_count(net)) == (0, 4)
    assert_close(net.hooks.features, by_hand(net, batch()))


# Traces, and layers that run in C++.

TRACES = {
    "fx": torch.fx.symbolic_trace,
    "export": lambda net: torch.export.export(net, (batch(),), strict=False),
    "strict export": lambda net: torch.export.export(net, (batch(),), strict=True),
    "make_fx": lambda net: make_fx(net, tracing_mode="fake", _allow_non_fake_inputs=True)(batch()),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.parametrize("select", [None, 0, lambda output: output[0]])
@pytest.mark.parametrize("name", TRACES)
def test_a_trace_leaves_no_features(name, select):
    net = nn.Sequential(nn.Linear(4, 4), Gives(lambda x: x if select is None else (x, x)))
    hooks = FeatureHooks(net, ["1"], select=select)
    TRACES[name](net)
    message = r"Layer '1' gave no values: the last forward pass was a trace.*Run the model itself"
    if name == "strict export":  # it may undo what hooks did
        message += r"|Layer '1' did not run"
    with pytest.raises(RuntimeError, match=message):
        _ = hooks.features
    net(batch())
    assert hooks.features[0].shape == (3, 5)


@pytest.mark.parametrize(
    ("make", "refused", "allowed"),
    [
        (torch.jit.script, {"1.0": "a", "1.0.1": "inside a"}, ["1"]),
        # What holds a traced part runs in Python, and so does the call of that part.
        (lambda net: torch.jit.trace(net, batch()), {"1.0.1": "inside a"}, ["1", "1.0"]),
    ],
)
def test_names_inside_script_modules_are_refused(make, refused, allowed):
    script = make(nn.Sequential(nn.Linear(4, 5), nn.ReLU()))
    net = nn.Sequential(nn.Identity(), nn.Sequential(script))
    for name, where in refused.items():
        with pytest.raises(TypeError, match=rf"must not name '{name}': it is {where} ScriptModule"):
            FeatureHooks(net, ["0", name])
    assert hook_count(net[0]) == 0
    hooks = FeatureHooks(net, allowed)
    output = net(batch())
    assert_same(hooks, [output] * len(allowed))


def test_scripting_a_hooked_model_names_remove():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
    hooks = FeatureHooks(net, ["1"])
    with pytest.raises(AttributeError, match=r"torch\.jit\.script.*`FeatureHooks\.remove\(\)`"):
        torch.jit.script(net)
    hooks.remove()
    torch.jit.script(net)


# Arguments that are refused.

MODEL = r"`model` must be a torch\.nn\.Module; got \w+\.$"
PARALLEL = r"must not be a DataParallel: its replicas .* Use DistributedDataParallel, or .*module"
SCRIPT = r"must not be a ScriptModule: its layers run in C\+\+.*plain"
MODELS_REFUSED = [
    (MODEL, lambda _: None),
    (MODEL, type),  # the class in place of the model
    (PARALLEL, DataParallel),
    (PARALLEL, lambda net: compiled(DataParallel(net))),
    (SCRIPT, lambda net: torch.jit.script(net.stages)),
    (SCRIPT, lambda net: torch.jit.trace(net, batch())),
]


@pytest.mark.parametrize(("message", "make"), MODELS_REFUSED)
def test_models_that_hooks_can_not_follow_are_refused_with_the_reason(net, message, make):
    with pytest.raises(TypeError, match=message):
        FeatureHooks(make(net), ["0"])


NAMES = r"`layers` must be a list of module names, \['stage1'\] for one; got "
UNKNOWN = "`layers` must name modules of the model; it has no "
KIND = (
    "`select` must be an index, a key, a callable or None, or a list of these, one per layer; got "
)
COUNT = "`select` must have one entry per layer; got {} for 2 layers"


@pytest.mark.parametrize(
    ("error", "given", "message"),
    [
        (TypeError, {"layers": "stem"}, NAMES + r"the string 'stem'\.$"),
        (TypeError, {"layers": 3}, NAMES + r"int\.$"),
        (TypeError, {"layers": {"stem", "head"}}, NAMES + r"set\.$"),
        (ValueError, {"layers": []}, r"`layers` must name at least one layer; got none\.$"),
        (
            ValueError,
            {"layers": ["stem", "stem"]},
            r"must name each layer once; got 'stem' twice\.$",
        ),
        (ValueError, {"layers": ["stage.0"]}, r"'stage\.0'\. The nearest names are .*'stages\.0'"),
        (ValueError, {"layers": ["stages.0.0.0"]}, r"The nearest names are ('[^']*'(, )?){3}\.$"),
        (
            ValueError,
            {"layers": ["module.stem"]},
            r"'module\.stem'\. The nearest names are 'stem'\.$",
        ),
        (
            ValueError,
            {"layers": ["qqqqqq"]},
            UNKNOWN + r"'qqqqqq'\. See `model\.named_modules\(\)`",
        ),
        (ValueError, {"layers": [["stem"]]}, UNKNOWN + r"\['stem'\]\. The nearest"),
        (ValueError, {"layers": [3]}, UNKNOWN + r"3\. See `model\.named_modules\(\)`"),
        *[(TypeError, {"select": s}, KIND) for s in (1.0, True, b"out", {"0": 0}, [None, False])],
        *[(ValueError, {"select": [0] * n}, COUNT.format(n)) for n in (0, 1, 3)],
    ],
)
def test_wrong_arguments_are_refused_and_leave_no_hooks(net, error, given, message):
    with pytest.raises(error, match=message):
        FeatureHooks(net, **{"layers": ["stem", "head"], **given})
    assert hook_count(net) == 0
