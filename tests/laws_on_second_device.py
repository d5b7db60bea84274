"""The modules on another device: never mixed with the CPU, few kernels, no sync but documented.

The device is simulated: its tensors hold their numbers on the CPU and count what a GPU would be
asked to do. torch's autograd must not have run before the device is registered, so that
`test_second_device.py` runs these tests in a process of their own.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from networks import build
from second_device import NAME, SecondDevice
from sklearn.datasets import load_digits
from torch import nn

from graph_kd import (
    FeatureHooks,
    GatedGradClip,
    GraphTransferLoss,
    MultiHeadGraphEstimator,
    SVDFeature,
    align_singular_vectors,
)
from graph_kd._precision import has_float64
from graph_kd._svd import top_singular_vectors

CHANNELS = [32, 36, 40]
# Gram matrices of 32, 36 and 16 rows: two that are searched, one decomposed whole.
SIZES = [8, 7, 4]


class Net(nn.Module):
    def __init__(self, channels):
        super().__init__()
        widths = [3, *channels]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(size))
            for a, b, size in zip(widths[:-1], channels, SIZES, strict=True)
        )
        self.head = nn.Linear(channels[-1], 5)

    def forward(self, images):
        for stage in self.stages:
            images = stage(images)
        return self.head(images.mean(dim=(2, 3)))


def setting(device="cpu", student=CHANNELS, **loss_settings):
    torch.manual_seed(0)
    nets = Net(CHANNELS).eval().requires_grad_(False), Net(student)
    if student != CHANNELS:
        loss_settings["student_channels"] = student
    loss = GraphTransferLoss(CHANNELS, num_heads=2, **loss_settings).to(device)
    images, labels = torch.randn(12, 3, 8, 8).to(device), torch.arange(12).to(device) % 5
    return (*(net.to(device) for net in nets), loss, images, labels)


def step(device, *, gate="norm", scope="parameter", capturable=False, counting=None, **settings):
    teacher, student, loss, images, labels = setting(device, capturable=capturable, **settings)
    layers = [f"stages.{i}" for i in range(3)]
    params = [*student.parameters(), *loss.student_heads.parameters()]
    optimizer = GatedGradClip(
        torch.optim.SGD(params, lr=0.1), gate, scope=scope, capturable=capturable
    )
    with FeatureHooks(teacher, layers) as theirs, FeatureHooks(student, layers) as ours:
        for last in (False, True):  # the first makes constants
            teacher(images)
            task = F.cross_entropy(student(images), labels)
            optimizer.zero_grad()
            if last and counting is not None:
                with counting() as seen:
                    value = loss(ours.features, theirs.features)
                    optimizer.backward(task, value)
            else:
                value = loss(ours.features, theirs.features)
                optimizer.backward(task, value)
    gradients = [p.grad for p in params]
    return (value, gradients, optimizer, loss) + ((seen,) if counting is not None else ())


def held(tensor):
    return tensor.held if hasattr(tensor, "held") else tensor


@pytest.fixture
def device():
    with SecondDevice() as simulated:
        yield simulated


on_device = pytest.mark.usefixtures("device")

SETTINGS = [
    {},
    {"student": [8, 12, 20]},
    {"gate": "sigmoid", "scope": "global", "squash": "tanh"},
    {"gate": lambda task, transfer: task / (task + transfer), "k": 2},
]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_is_that_of_the_cpu_and_its_syncs_are_the_documented_ones(
    device, settings, capturable
):
    given = {"counting": device.counting, "capturable": capturable, **settings}
    value, gradients, optimizer, loss, seen = step(NAME, **given)
    wanted, wanted_gradients, *_ = step("cpu", **settings)
    assert str(value.device).startswith(NAME)
    torch.testing.assert_close(held(value), wanted, rtol=1e-3, atol=1e-5)
    # A bias before a batch norm has no gradient but rounding.
    largest = max(float(theirs.abs().max()) for theirs in wanted_gradients)
    for ours, theirs in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(held(ours), theirs, rtol=1e-2, atol=1e-4 * largest)
    if capturable:
        assert (int(held(loss.doubtful)), int(held(optimizer.skipped))) == (0, 0)
        # On a GPU these sync in torch up to 2.13 at least, though nothing here shows it.
        assert not [name for name in seen.by_op if "solve_ex" in name or "linalg_lu" in name]
    # Three or four small decompositions, the check of the samples, and that of the gradients.
    assert seen.waits <= (0 if capturable else 6), seen.where


@pytest.mark.parametrize(("capturable", "most"), [(False, 770), (True, 2400)])
def test_a_step_stays_within_its_launches(device, capturable, most):
    *_, seen = step(NAME, counting=device.counting, capturable=capturable)
    # Of the solver some 400, of the two gradients' way through the student some 40. Without the
    # host, rotations that decompose small matrices are some 1,400 more.
    assert seen.launches <= most, (seen.launches, seen.by_op.most_common(10))


@on_device
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(bad):
    features = torch.randn(4, 24, 6, 6)
    features[2, 3, 4, 5] = bad
    with pytest.raises(ValueError, match=r"`features` must be finite; .*in 1 of 4"):
        SVDFeature(2)(features.to(NAME))


@on_device
def test_what_is_not_finite_never_reaches_the_parameters_of_a_capturable_step():
    params = [nn.Parameter(torch.ones(3).to(NAME)), nn.Parameter(torch.ones(2).to(NAME))]
    optimizer = GatedGradClip(torch.optim.SGD(params, lr=0.1), capturable=True)
    for count, factor in enumerate([1.0, float("nan"), float("inf"), 2.0]):
        optimizer.zero_grad()
        task = sum(p.sum() for p in params)
        optimizer.backward(task, factor * sum(p.square().sum() for p in params))
        # The transfer gradient has twice the task's norm or more, and is bounded by it.
        part = 1.0 if factor in (1.0, 2.0) else 0.0
        for p in params:
            torch.testing.assert_close(held(p.grad), torch.full_like(held(p), 1 + part))
        assert int(held(optimizer.skipped)) == [0, 1, 2, 2][count]
    assert int(held(optimizer.state_dict()["skipped"])) == 2
    assert optimizer.skipped.device.type == NAME


@pytest.mark.parametrize("gate", ["norm", "sigmoid", lambda *_: 0.5])
def test_capturable_calls_of_one_step_copy_nothing_from_or_to_the_host(device, monkeypatch, gate):
    param, run = nn.Parameter(torch.ones(3).to(NAME)), SecondDevice.run
    optimizer = GatedGradClip(torch.optim.SGD([param], lr=0.1), gate, capturable=True)

    def refusing(self, func, args, kwargs):
        assert func is not torch.ops.aten._to_copy.default or hasattr(args[0], "held")
        return run(self, func, args, kwargs)

    monkeypatch.setattr(SecondDevice, "run", refusing)
    with device.counting() as seen:
        for _ in range(2):
            optimizer.backward(param.sum(), param.square().sum())
    assert seen.waits == 0, seen.where


def test_an_error_of_a_gpu_is_not_taken_for_a_lack_of_float64(monkeypatch):
    def no_memory(*_sizes, **_options):
        raise RuntimeError

    monkeypatch.setattr(torch, "zeros", no_memory)
    assert has_float64.__wrapped__(torch.device("cuda"))


@on_device
def test_a_callable_gate_may_return_a_tensor_on_the_host():
    params = [nn.Parameter(torch.ones(n).to(NAME)) for n in (3, 2)]
    optimizer = GatedGradClip(torch.optim.SGD(params, lr=0.1), lambda *_: torch.tensor(0.5))
    total = sum(p.sum() for p in params)
    optimizer.backward(total, 2 * total)
    for p in params:
        assert held(p.grad).tolist() == [2] * len(p)


@on_device
def test_samples_that_want_float64_are_counted_and_stay_finite():
    loss = setting(NAME, capturable=True)[2]
    maps = [torch.randn(12, c, s, s).relu() for c, s in zip(CHANNELS, SIZES, strict=True)]
    maps[0][3] = 1.0  # all but one of its singular values are zero
    maps[1][5] = 0.0
    ours = [m.clone().to(NAME).requires_grad_() for m in maps]
    value = loss(ours, [m.to(NAME) for m in maps])
    value.backward()
    assert all(bool(held(m.grad).isfinite().all()) for m in ours)
    # The constant map of the student, whose k is 4, and the map of zeros of both.
    assert int(held(loss.doubtful)) == 3
    loss(ours, [m.to(NAME) for m in maps])
    assert int(held(loss.doubtful)) == 6
    assert "doubtful" not in loss.state_dict()


@on_device
def test_modules_move_copy_and_load():
    loss = setting()[2]
    there = copy.deepcopy(loss).to(NAME)
    back = GraphTransferLoss(CHANNELS, num_heads=2)
    back.load_state_dict(there.state_dict())
    for name, tensor in loss.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
    maps = [torch.randn(6, c, s, s) for c, s in zip(CHANNELS, SIZES, strict=True)]
    graphs = copy.deepcopy(there).graphs([m.to(NAME) for m in maps])
    for ours, wanted in zip(graphs, loss.graphs(maps), strict=True):
        torch.testing.assert_close(held(ours), wanted, rtol=1e-3, atol=1e-5)
    estimator = MultiHeadGraphEstimator(4, 6, num_heads=2).to(NAME)
    rows = torch.randn(5, 4).to(NAME), torch.randn(5, 6).to(NAME)
    assert held(estimator.loss(*rows)).isfinite()


@on_device
@pytest.mark.parametrize("shape", [(24, 8, 8), (40, 4, 4), (6, 3, 3)])
def test_vectors_and_their_gradient_are_those_of_the_cpu(shape):
    maps = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)).relu()
    results = []
    for where in ("cpu", NAME):
        features = maps.clone().to(where).requires_grad_()
        with torch.no_grad():
            target = SVDFeature(1)(features)
        vectors = align_singular_vectors(SVDFeature(4)(features), target)
        vectors.square().mul(torch.arange(shape[0]).to(where)).sum().backward()
        results.append((held(vectors.detach()), held(features.grad)))
    for wanted, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@on_device
def test_a_device_without_float64_is_served_by_the_cpu(monkeypatch):
    run = SecondDevice.run

    def refusing(self, func, args, kwargs):
        result = run(self, func, args, kwargs)
        if hasattr(result, "held") and result.held.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return result

    has_float64.cache_clear()
    monkeypatch.setattr(SecondDevice, "run", refusing)
    try:
        value, gradients, *_ = step(NAME)
        steep = torch.diag(8.0 ** -torch.arange(20))[None].to(NAME).requires_grad_()
        (found,) = top_singular_vectors([steep], [4], ["map"])
        found.vectors().sum().backward()  # doubtful samples need float64 here too
    finally:
        has_float64.cache_clear()
    assert (found.all.device.type, found.doubtful.device.type) == (NAME, "cpu")
    assert found.doubtful.all()
    assert held(steep.grad).isfinite().all()
    wanted, wanted_gradients, *_ = step("cpu")
    torch.testing.assert_close(held(value), wanted, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(held(ours), theirs, rtol=1e-3, atol=1e-5)


@on_device
@pytest.mark.parametrize("name", ["VGG7", "WRN-10-4"])
def test_hardly_a_sample_of_a_trained_network_wants_float64(name):
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8)[:256] / 8 - 1
    images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    labels, net = torch.from_numpy(labels)[:256], build(name, 10, 0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    for i in range(24):
        some = slice(32 * (i % 8), 32 * (i % 8) + 32)
        optimizer.zero_grad()
        F.cross_entropy(net(images[some]), labels[some]).backward()
        optimizer.step()
    with FeatureHooks(net, net.sensing_points) as hooks, torch.no_grad():
        net(images[:64])
        maps = [rearrange(f, "b c h w -> b (h w) c") for f in hooks.features]
    counts = [min(4, *m.shape[1:]) for m in maps]
    names = ["map"] * len(maps)
    # The CPU filters as often as needed; elsewhere, and in a capturable step, the rounds are fixed.
    for where, capturable in (("cpu", False), (NAME, False), (NAME, True)):
        there = [m.to(where) for m in maps]
        found = top_singular_vectors(there, counts, names, capturable=capturable)
        shares = [float(held(f.doubtful).float().mean()) for f in found]
        assert max(shares) <= 0.02, (where, capturable, shares)


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="torch has no such tag")
@pytest.mark.parametrize("name", ["top_vectors", "top_vectors_gradient"])
def test_operators_that_sync_say_so(name):
    unsafe = torch.Tag.cudagraph_unsafe
    assert unsafe in getattr(torch.ops.graph_kd, name).default.tags
    assert unsafe not in getattr(torch.ops.graph_kd, f"{name}_capturable").default.tags
