"""FeatureHooks: what it collects, from which models, and what it refuses."""

import copy
import dataclasses
import functools
import gc
import pickle
import weakref
from collections import UserDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from graph_kd import FeatureHooks, GraphTransferLoss

# torch.jit announces its end, from inside torch.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
compiled = functools.partial(torch.compile, backend="eager")


class Net(nn.Module):
    """Layers whose names have dots, and one that may be left out or run twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.spare = nn.Linear(4, 6), nn.Identity()
        self.stages = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 6))
        # Fabric's wrapper has attributes of these names; a plain model may have them too.
        self._forward_module, self._original_module = nn.Identity(), None

    def forward(self, x, spare_uses=0):
        x = self.stages(self.stem(x))
        for _ in range(spare_uses):
            x = self.spare(x)
        return x.exp()


LAYERS = ["stem", "stages.0.1", "stages.1"]


class Gives(nn.Module):
    """A linear layer, and a function of its output."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(4, 5), function

    def forward(self, x):
        return self.function(self.linear(x))


@pytest.fixture(autouse=True)
def start_afresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def net():
    return Net()


def batch(seed=1):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))


def hook_count(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def assert_same(features, others):
    assert all(a is b for a, b in zip(features, others, strict=True))


def assert_unreadable(hooks, message, error=RuntimeError):
    """Assert that reading the features raises, and return the error."""
    with pytest.raises(error, match=message) as caught:
        _ = hooks.features
    return caught.value


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


def test_each_forward_replaces_the_features_but_no_list_that_was_read(net):
    hooks = FeatureHooks(net, LAYERS)
    first_output = net(batch(1))
    first = hooks.features
    second_output = net(batch(2))
    torch.autograd.grad(first_output.sum(), first)  # raises unless the output came from them
    torch.autograd.grad(second_output.sum(), hooks.features)


def test_before_any_forward_and_after_one_that_failed_no_layer_has_run(net):
    hooks = FeatureHooks(net, LAYERS)
    for _ in range(2):
        assert_unreadable(hooks, "Layer 'stem' did not run in the last forward")
        net(batch())
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            net(torch.randn(3, 5))


def test_leaving_removes_the_hooks_and_keeps_the_features_and_hooks_of_others(net):
    net.stem.register_forward_hook(lambda *_: None)
    net.register_forward_pre_hook(lambda *_: None)
    hooks = FeatureHooks(net, LAYERS)
    assert hook_count(net) == 6
    output = net(batch(1)).sum()
    with pytest.raises(ZeroDivisionError), hooks:
        raise ZeroDivisionError
    assert hook_count(net) == 2
    hooks.remove()  # a second time does no harm
    net(batch(2))
    torch.autograd.grad(output, hooks.features)


@pytest.mark.parametrize("compile_net", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("uses", "message"),
    [
        (0, "did not run in the last forward pass.*name layers that its forward uses"),
        (2, r"ran 2 times.*must run once.*Call `model\(\.\.\.\)`, not `model\.forward"),
    ],
)
def test_a_layer_that_did_not_run_or_ran_twice_is_named(net, uses, message, compile_net):
    model = compiled(net, fullgraph=True) if compile_net else net
    hooks = FeatureHooks(model, ["stem", "spare"])
    for _ in range(2):
        model(batch(), spare_uses=1)
        assert len(hooks.features) == 2
        model(batch(), spare_uses=uses)
        assert_unreadable(hooks, f"Layer 'spare' {message}")


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
    message = "Layer 'linear' gave a tensor that was changed in place.*Hook the layer that changes"
    assert_unreadable(hooks, message)


@pytest.mark.parametrize("mode", ["inference", "eager", "aot_eager"])
@pytest.mark.parametrize("name", ["relu", "detached"])
def test_inference_mode_and_compiled_code_keep_the_output_as_it_was(mode, name):
    net = Gives(IN_PLACE[name])
    wanted, weight = net.linear(batch()), net.linear.weight
    hooks = FeatureHooks(net, ["linear"])
    inference = mode == "inference"
    model = net if inference else torch.compile(net, backend=mode, fullgraph=True)
    with torch.inference_mode(inference):
        model(batch())
        assert_close(hooks.features[0], wanted)
    if not inference:
        gradients = [torch.autograd.grad(f.sin().sum(), weight) for f in (*hooks, wanted)]
        assert_close(*gradients)


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


@pytest.mark.parametrize(("name", "compile_net"), CASES)
def test_select_takes_the_tensor_out_of_an_output_and_the_message_says_which(name, compile_net):
    make, described, *selects = OUTPUTS[name]
    net = nn.Sequential(Gives(make))
    without = FeatureHooks(net, ["0"])
    selecting = [FeatureHooks(net, ["0"], select=eval(s)) for s in selects if s != NONE]
    model = compiled(net, backend="aot_eager", fullgraph=True) if compile_net else net
    gave = described.replace("{}", "Tensor (3, 5)")
    message = f"Layer '0' gave {gave}, which is no tensor. Pass `select={selects[0]}`."
    for seed in (1, 2):
        model(batch(seed))
        for hooks in selecting:
            assert_close(hooks.features[0], net[0].linear(batch(seed)))
        error = assert_unreadable(without, "Layer '0' gave", TypeError)
        assert str(error) == message
        assert error.__cause__ is None


@pytest.mark.parametrize("select", [0, [None, 0], (None, 0), [None, lambda output: output[0]]])
def test_select_is_one_for_all_layers_or_a_list_and_leaves_tensors_as_they_are(select):
    net = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 5))
    hooks = FeatureHooks(net, ["0", "1"], select=select)
    output, _ = net(batch())
    assert torch.equal(hooks.features[0], net[0].forward(batch()))
    assert hooks.features[1] is output


def test_select_is_applied_once_a_pass_and_the_rest_is_not_kept():
    net = Gives(lambda x: [x + 1, x])
    hooks = FeatureHooks(net, [""], select=list.pop)  # a second pop takes another tensor
    rest = weakref.ref(net(batch())[0])
    assert_same(hooks.features, hooks.features)
    assert rest() is None


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
    cause = assert_unreadable(hooks, "Layer '1' gave .*" + message, TypeError).__cause__
    assert isinstance(cause, Exception) == ("failed" in message)
    assert getattr(cause, "__traceback__", None) is None  # it held the batch


# Wrapped models, copies and traces.


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


def with_a_layer_compiled_and_run(net):
    net.stem = compiled(net.stem)
    net(batch())
    return net


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "compiled": lambda net: compiled(net, fullgraph=True),
    "compiled by aot_eager": lambda net: compiled(net, backend="aot_eager", fullgraph=True),
    "compiled in place": lambda net: net.compile(backend="eager", fullgraph=True) or net,
    "compiled ddp": lambda net: compiled(DistributedDataParallel(net)),
    "compiled inside": lambda net: net.add_module("stages", compiled(net.stages)) or net,
    "compiled layer, run before": with_a_layer_compiled_and_run,
    "checkpoint": lambda net: net.add_module("stages", checkpoint_wrapper(net.stages)) or net,
    "sharded in place": sharded,
    "shell of ddp of compiled": lambda net: Shell(DistributedDataParallel(compiled(net)), net),
    "fabric": by_fabric,
}


@pytest.fixture
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# torch.compile looks at `.grad` of what comes into a compiled submodule, and warns itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Lightning
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", WRAPPERS)
def test_hooks_on_a_wrapped_model_give_the_plain_models_features_and_gradients(net, name):
    plain = copy.deepcopy(net)
    hooks_of_plain, model = FeatureHooks(plain, LAYERS), WRAPPERS[name](net)
    count = hook_count(net)
    with FeatureHooks(model, LAYERS) as hooks:
        assert hook_count(net) == count + 4  # all on the plain model
        for seed in (1, 2, 3):
            got = [model(batch(seed)), *hooks]
            wanted = [plain(batch(seed)), *hooks_of_plain]
            assert_close(got, wanted)
            for outputs in (got, wanted):
                sum(output.square().sum() for output in outputs).backward()
            for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
                grad = ours.grad.full_tensor() if name == "sharded in place" else ours.grad
                assert_close(grad, theirs.grad)
    assert hook_count(net) == count
    model(batch(4))
    # What a checkpoint computed again in the backward pass did not count as a run either.
    assert_close(hooks.features, hooks_of_plain.features)


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


def test_a_copy_of_the_model_leaves_the_hooks_of_the_original_alone(net):
    hooks = FeatureHooks(net, LAYERS)
    trace = torch.jit.trace(net.eval(), batch())
    net(batch())
    twin, before = copy.deepcopy(net), hooks.features
    for other in (twin, AveragedModel(net), pickled(net), trace, torch.jit.freeze(trace)):
        other(batch(2))
    assert_same(hooks.features, before)
    with FeatureHooks(twin, LAYERS) as hooks_of_twin:
        output = twin(batch(2))
        torch.autograd.grad(output.sum(), hooks_of_twin.features)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", [copy.deepcopy, pickled])
def test_copied_hooks_hold_no_batch_and_say_that_they_are_a_copy(net, mode, make):
    net.hooks = FeatureHooks(net, LAYERS, select=lambda output: output)
    empty = len(pickle.dumps(net))
    with mode():
        net(batch())
    features = net.hooks.features
    assert len(pickle.dumps(net)) == empty
    twin = make(net)
    size = len(pickle.dumps(twin))
    twin(batch(2))
    assert len(pickle.dumps(twin)) == size
    assert_unreadable(twin.hooks, r"hooks are a copy.*FeatureHooks\(model, layers\)")
    twin.hooks.remove()
    assert (hook_count(twin), hook_count(net)) == (0, 4)
    assert_same(net.hooks.features, features)


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
    assert_unreadable(hooks, message)
    net(batch())
    assert hooks.features[0].shape == (3, 5)


def test_layers_that_run_in_cpp_are_refused():
    part = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    net = nn.Sequential(nn.Sequential(torch.jit.script(part)), torch.jit.trace(part, batch()))
    for name, where in {"0.0": "a", "0.0.1": "inside a", "1.1": "inside a"}.items():
        with pytest.raises(TypeError, match=rf"must not name '{name}': it is {where} ScriptModule"):
            FeatureHooks(net, ["0", name])
    assert not net[0]._forward_hooks
    # What holds a script runs in Python, and so does the call of a traced part.
    hooks = FeatureHooks(net, ["0", "1"])
    output = net(batch())
    assert hooks.features[1] is output
    torch.autograd.grad(output.sum(), hooks.features)


def test_scripting_a_hooked_model_names_remove():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
    hooks = FeatureHooks(net, ["1"])
    with pytest.raises(AttributeError, match=r"torch\.jit\.script.*`FeatureHooks\.remove\(\)`"):
        torch.jit.script(net)
    hooks.remove()
    torch.jit.script(net)


# Arguments that are refused.

PARALLEL = r"must not be .* DataParallel .*: its replicas .* Use DistributedDataParallel, or .*modu"
SCRIPT = r"must not be a ScriptModule: its layers run in C\+\+.*plain"


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (r"`model` must be a torch\.nn\.Module; got NoneType\.$", lambda _: None),
        (r"`model` must be a torch\.nn\.Module; got type\.$", type),  # the class of the model
        (PARALLEL, DataParallel),
        (PARALLEL, lambda net: compiled(DataParallel(net))),
        (SCRIPT, lambda net: torch.jit.script(net.stages)),
        (SCRIPT, lambda net: torch.jit.trace(net, batch())),
    ],
)
def test_models_that_hooks_can_not_follow_are_refused_with_the_reason(net, message, make):
    with pytest.raises(TypeError, match=message):
        FeatureHooks(make(net), ["0"])


def test_names_inside_what_hooks_can_not_follow_are_refused_and_those_beside_it_are_not(net):
    net.stages = DataParallel(net.stages)
    FeatureHooks(net, ["stem", "stages"]).remove()
    with pytest.raises(TypeError, match=PARALLEL):
        FeatureHooks(net, ["stem", "stages.module.0"])
    assert hook_count(net) == 0


def test_a_model_without_layers_has_no_near_names():
    with pytest.raises(ValueError, match=UNKNOWN + r"'stem'\. It has no submodules\.$"):
        FeatureHooks(nn.Linear(2, 2), ["stem"])


def test_a_module_in_place_of_its_name_is_told_its_name(net):
    with pytest.raises(TypeError, match=r"got a module, Linear: its name is 'stem'\.$"):
        FeatureHooks(net, [net.stem])
    with pytest.raises(TypeError, match="a module, ReLU: the model does not have it"):
        FeatureHooks(net, [nn.ReLU()])


TWO = ["stem", "spare"]
NO_LIST = r"`layers` must be a list of module names, \['stage1'\] for one; got "
UNKNOWN = "`layers` must name modules of the model; it has no "
COUNT = "`select` must have one entry per layer; got {} for 2 layers"
KIND = "`select` must be an index, a key, a callable or None, or a list of these, one per layer; "


@pytest.mark.parametrize(
    ("error", "layers", "select", "message"),
    [
        (TypeError, "stem", None, NO_LIST + r"the string 'stem'\.$"),
        (TypeError, 3, None, NO_LIST + r"int\.$"),
        (TypeError, {"stem", "spare"}, None, NO_LIST + r"set\.$"),
        (ValueError, [], None, r"`layers` must name at least one layer; got none\.$"),
        (ValueError, ["stem", "stem"], None, r"must name each layer once; got 'stem' twice\.$"),
        (ValueError, ["stage.0"], None, UNKNOWN + r"'stage\.0'\. The nearest .*'stages\.0'"),
        (ValueError, ["stages.0.0.0"], None, r"The nearest names are ('[^']*'(, )?){3}\.$"),
        (ValueError, ["module.stem"], None, r"'module\.stem'\. The nearest names are 'stem'\.$"),
        (
            ValueError,
            ["qqqqqq"],
            None,
            UNKNOWN + r"'qqqqqq'\. The nearest names are ('[^']*'(, )?){3}",
        ),
        (ValueError, [["stem"]], None, UNKNOWN + r"\['stem'\]\. The nearest"),
        (ValueError, [3], None, UNKNOWN + r"3\. The nearest"),
        *[(TypeError, TWO, s, KIND) for s in (1.0, True, b"out", {"0": 0}, [None, False])],
        *[(ValueError, TWO, [0] * n, COUNT.format(n)) for n in (0, 1, 3)],
    ],
)
def test_wrong_arguments_are_refused_and_leave_no_hooks(net, error, layers, select, message):
    with pytest.raises(error, match=message):
        FeatureHooks(net, layers, select=select)
    assert hook_count(net) == 0


# Features of an earlier step.


def stages():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6))


def without_hooks():
    return [torch.randn(3, 6, requires_grad=True) for _ in range(2)]


@pytest.fixture(params=["as they are", "in a mapping, one changed"])
def do(request):
    """Return a function that follows a text in the words of a training loop.

    The name of a model runs it. "student+teacher" is the loss of the features of both, "+teacher"
    that of the attention heads. "front" and "back" are hooks on other layers of the student and of
    the teacher; no hooks gave "unhooked" and "other". "keep" reads the features into lists, "look"
    is a loss without gradient, "settle" that of the attention heads.
    """
    nets = {name: stages() for name in ("student", "assistant", "teacher")}
    features = {name: FeatureHooks(net, ["1", "2"]) for name, net in nets.items()}
    features["student_anew"] = FeatureHooks(nets["student"], ["1", "2"])
    features["front"] = FeatureHooks(nets["student"], ["0", "1"])
    features["back"] = FeatureHooks(nets["teacher"], ["0", "1"])
    features |= {"unhooked": without_hooks(), "other": without_hooks()}
    nets |= {f"{name}_copy": copy.deepcopy(net) for name, net in nets.items()}
    transfer = GraphTransferLoss([6, 6], 2)

    def read(name):
        if request.param == "as they are" or not isinstance(features[name], FeatureHooks):
            return features[name]
        first, *rest = features[name]
        return dict(enumerate([2 * first, *rest]))

    def follow(word):
        ours, _, theirs = word.partition("+")
        if word in nets:
            nets[word](batch())
        elif word == "keep":
            features["student_list"] = list(features["student"])
            features["teacher_list"] = list(features["teacher"])
        elif word == "look":
            with torch.no_grad():
                follow("student+teacher")
        elif word == "settle":
            with torch.no_grad():
                follow("+teacher")
        elif ours:
            transfer(read(ours), read(theirs))
        else:
            transfer.estimator_loss(read(theirs))

    return lambda text: [follow(word) for word in text.split()]


@pytest.mark.parametrize(
    "text",
    [
        "student teacher student+teacher student teacher student+teacher",
        # Losses of one step.
        "student teacher student+teacher student+teacher +teacher student_copy student+teacher",
        "student teacher keep student student+teacher_list student student+teacher_list",
        "student teacher keep teacher student_list+teacher teacher student_list+teacher",
        "teacher student look student look",  # a loss without gradient is no step
        # Averages run beside both models, before their passes and after a look at the features.
        "teacher_copy teacher student keep teacher_copy student_copy student+teacher +teacher",
        "teacher unhooked+teacher unhooked+teacher teacher other+teacher",
        "student student+unhooked +unhooked student+other",
        # One pass serves every pair of models and layers.
        "student assistant teacher student+assistant assistant+teacher student+teacher",
        "student teacher student+teacher front+teacher student+back front+back front+teacher",
    ],
)
def test_features_serve_their_own_step_and_a_kept_list_any(do, text):
    do(text)


@pytest.mark.parametrize(
    ("role", "before", "refused"),
    [
        # Only one model runs: the hooks of the other do not see its pickle or trace.
        ("teacher", "student teacher student+teacher student", "student+teacher"),
        ("student", "student teacher student+teacher teacher", "student+teacher"),
        ("teacher", "student teacher student+teacher student teacher_copy", "student+teacher"),
        ("student", "student teacher student+teacher student_copy teacher", "student+teacher"),
        ("teacher", "student teacher keep student student+teacher_list student", "student+teacher"),
        ("teacher", "student teacher student+teacher student", "student_anew+teacher"),
        ("teacher", "student teacher student+teacher keep student", "student+teacher"),
        ("teacher", "teacher unhooked+teacher", "other+teacher"),
        # A loss of another student does not hide that a step is new, nor does the same student.
        ("teacher", "student teacher student+teacher unhooked+teacher student", "student+teacher"),
        ("teacher", "teacher unhooked+teacher unhooked+teacher teacher_copy", "unhooked+teacher"),
        ("teacher", "teacher +teacher +teacher teacher_copy", "+teacher"),
        ("teacher", "teacher settle settle teacher_copy", "settle"),  # running statistics move
        # Whatever the features are used for: a copy runs, they are read, and so on.
        ("hooked model", "student teacher keep teacher_copy keep teacher_copy", "+teacher"),
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


def test_one_pass_of_the_teacher_serves_students_that_come_and_go():
    teacher, transfer = stages(), GraphTransferLoss([6, 6], 2)
    of_teacher = FeatureHooks(teacher, ["1", "2"])
    teacher(batch())
    for _ in range(20):  # a new model can take the id of one that is gone
        student = stages()
        with FeatureHooks(student, ["1", "2"]) as of_student:
            student(batch())
            transfer(of_student, of_teacher)


def test_losses_keep_no_features_alive_and_make_no_cycles(request):
    student, teacher, unhooked = stages(), stages(), without_hooks()
    of_student, of_teacher = (FeatureHooks(net, ["1", "2"]) for net in (student, teacher))
    student(batch(0))
    teacher(batch(0))
    transfer = GraphTransferLoss([6, 6], 2)
    transfer(of_student, of_teacher)
    transfer(unhooked, of_teacher)
    transfer.estimator_loss(of_teacher)
    watched = [weakref.ref(feature) for feature in (unhooked[0], *of_student, *of_teacher)]
    gc.disable()
    request.addfinalizer(gc.enable)
    del unhooked
    student(batch(1))
    assert [ref() is None for ref in watched] == [True, True, True, False, False]
    teacher(batch(1))
    assert all(ref() is None for ref in watched)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_own_heads_do_not_learn_from_a_student_that_ran_without_gradient(mode):
    student, teacher = stages(), stages().requires_grad_(False)
    of_student, of_teacher = (FeatureHooks(net, ["0", "2"]) for net in (student, teacher))
    loss = GraphTransferLoss([6, 6], 2, student_channels=[6, 6])
    student(batch()), teacher(batch())
    with mode():
        student(batch())  # an evaluation between the two losses
        loss(of_student, of_teacher)  # for a log
    message = r"student's features \(layers \['0', '2'\]\) carry no gradient: .* without"
    with pytest.raises(RuntimeError, match=message):
        loss(of_student, of_teacher)
    student(batch()), teacher(batch())
    loss(of_student, of_teacher).backward()
    student.requires_grad_(False)(batch()), teacher(batch())
    loss(of_student, of_teacher).backward()  # a frozen student whose heads learn


def test_a_norm_of_the_teacher_whose_running_statistics_move_is_named_once_a_loss():
    still = nn.BatchNorm2d(4, track_running_stats=False), nn.InstanceNorm2d(4), nn.Dropout()
    norms = nn.Sequential(*still, nn.BatchNorm2d(4).eval(), nn.SyncBatchNorm(4))
    teacher = nn.Sequential(nn.Conv2d(3, 4, 1), norms)
    student = copy.deepcopy(teacher)
    of_student, of_teacher = (FeatureHooks(net, ["0", "1"]) for net in (student, teacher))
    images = torch.randn(3, 3, 2, 2)
    student(images), teacher(images)
    message = r"teacher is in training mode \(see '1\.4'\).*teacher\.eval\(\)"
    loss, another = (GraphTransferLoss([4, 4], 2) for _ in range(2))
    with pytest.warns(UserWarning, match=message) as caught:
        loss(of_student, of_teacher)
    assert caught[0].filename == __file__
    loss.estimator_loss(of_teacher)  # warnings are errors here
    with pytest.warns(UserWarning, match=message) as caught:
        another.estimator_loss(of_teacher)
    assert caught[0].filename == __file__
    teacher.eval()(images), student(images)
    GraphTransferLoss([4, 4], 2)(of_student, of_teacher)  # the student trains
