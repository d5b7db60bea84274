"""torch.compile with fullgraph: the same numbers as eager, one graph, no recompilation."""

import copy
import pickle
import shutil

import pytest
import torch
import torch._functorch.config as functorch
from torch import nn
from torch.optim import SGD

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss

CHANNELS = [6, 8]  # one pair: each is traced anew, and takes long
OLDEST = torch.__version__.startswith("2.4.")

pytestmark = [
    pytest.mark.usefixtures("dynamo"),
    # torch.compile itself makes a Function object to trace one.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def features(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, c, 4, 4, generator=generator) for c in CHANNELS]


def test_a_copy_of_a_compiled_loss_runs_its_own_weights():
    torch.manual_seed(0)
    loss = GraphTransferLoss(CHANNELS, 3)
    loss.compile(backend="eager")
    for twin in (copy.copy(loss), pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert torch.equal(twin(features(0), features(1)), twin.forward(features(0), features(1)))
    with torch.no_grad():
        twin.estimators[0].theta[0].weight.zero_()
    assert torch.equal(twin(features(0), features(1)), twin.forward(features(0), features(1)))
    assert not torch.equal(twin(features(0), features(1)), loss.forward(features(0), features(1)))


def test_estimator_loss_equals_eager():
    torch.manual_seed(0)
    loss = GraphTransferLoss(CHANNELS, num_heads=1)  # a single head: nothing is drawn
    compiled = torch.compile(loss.estimator_loss, fullgraph=True, backend="aot_eager")
    teacher = features(0)
    wanted = torch.autograd.grad(loss.estimator_loss(teacher), list(loss.parameters()))
    got = torch.autograd.grad(compiled(teacher), list(loss.parameters()))
    torch.testing.assert_close(got, wanted)


class Distillation(nn.Module):
    """A student, its hooks and the loss in one graph."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers, incoming = [], 3
        for channels in CHANNELS:
            layers += [nn.Conv2d(incoming, channels, 3), nn.ReLU()]
            incoming = channels
        self.student = nn.Sequential(*layers)
        self.hooks = FeatureHooks(self.student, ["1", "3"])
        self.loss = GraphTransferLoss(CHANNELS, 3, squash="tanh")

    def forward(self, images, teacher):
        self.student(images)
        return self.loss(self.hooks.features, teacher)


@pytest.mark.skipif(OLDEST, reason="torch 2.4's compiler fails on a model whose hooks fill a list")
def test_hooks_and_loss_fit_into_one_graph_and_new_content_needs_no_new_one():
    step = Distillation()
    parameters = list(step.student.parameters())

    def run(module, seed):
        images = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
        value = module(images, features(seed))
        return [value.detach(), *torch.autograd.grad(value, parameters)]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    run(step, 0)  # from now on the lists of the hooks are not empty
    run(compiled, 0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (0, 2, 4):
            torch.testing.assert_close(run(compiled, seed), run(step, seed))


@pytest.mark.skipif(OLDEST, reason="torch 2.4's export fails on a model whose hooks fill a list")
def test_a_module_that_reads_its_own_hooks_can_be_exported():
    step, inputs = Distillation(), (torch.randn(6, 3, 12, 12), features(0))
    exported = torch.export.export(step, inputs, strict=False).module()
    torch.testing.assert_close(exported(*inputs), step(*inputs))


# Two gradients of a compiled student.


@pytest.mark.skipif(
    not hasattr(functorch, "donated_buffer"), reason="this torch donates no buffers"
)
def test_donated_buffers_are_named_with_the_setting_that_keeps_them():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = GatedGradClip(SGD(net.parameters(), lr=0.1))
    with functorch.patch(donated_buffer=True):
        compiled = torch.compile(net, backend="aot_eager")
        compiled(torch.ones(3, 4)).sum().backward()  # the first backward decides
        output = compiled(torch.ones(3, 4))
        message = r"`torch._functorch.config.donated_buffer = False`"
        with pytest.raises(RuntimeError, match=message) as caught:
            optimizer.backward(output.square().mean(), output.sin().sum())
    assert "donated buffer" in str(caught.value.__cause__)


def compare_gradients(_rank):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    optimizer = GatedGradClip(SGD(net.parameters(), lr=0.1), lambda *_: 1.0)
    if hasattr(functorch, "donated_buffer"):  # not in torch 2.4
        functorch.donated_buffer = False
    x, gradients = torch.randn(4, 2, 6, 6), []
    for forward in (torch.compile(net), net):
        optimizer.zero_grad()
        output = forward(x)
        optimizer.backward(output.square().mean(), output.sin().sum())
        gradients.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_both_gradients_with_the_documented_settings(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # read at import
    torch.multiprocessing.spawn(compare_gradients)
