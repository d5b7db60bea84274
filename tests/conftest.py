"""Settings of every test: derandomised properties, one thread."""

import os

import broken_torchvision  # noqa: F401  # before anything imports torchvision
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "graph-kd",
    derandomize=True,
    deadline=None,  # the first example of a shape pays for torch's start-up
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("graph-kd")
# Tensors here are too small for a second thread to pay. Scripts that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
