"""Settings of every test: derandomised properties and one thread."""

import os

# Small tensors gain nothing from a second thread. Programs that a test starts inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import broken_torchvision  # noqa: F401  # before anything imports torchvision
import pytest
import torch
from hypothesis import HealthCheck, settings

# `test_second_device.py` runs them in another process. Torch before 2.10 can not import them.
collect_ignore = ["laws_on_second_device.py", "second_device.py"]

settings.register_profile(
    "graph-kd",
    derandomize=True,
    deadline=None,  # the first example of a shape pays for torch's start-up
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("graph-kd")
torch.set_num_threads(1)

# Whole programs, frameworks and compilers. They cover no line that no other test covers, and take
# up to twice the time under coverage.
UNMEASURED = ("test_compile", "test_examples", "test_integrations", "test_pairs", "test_readme")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name.startswith(UNMEASURED):
            item.add_marker(pytest.mark.no_cover)
