"""Settings of every test: derandomised properties, one thread, and a way around a bug of oneDNN."""

import os

# Small tensors gain nothing from a second thread. Programs that a test starts inherit both lines.
os.environ["OMP_NUM_THREADS"] = "1"
# On machines with AVX2 and without AVX-512, oneDNN's gradient of a strided 1×1 convolution with
# fewer than 8 input channels writes out of bounds: it hangs or crashes (seen with torch 2.13).
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX")

import broken_torchvision  # noqa: F401  # before anything imports torchvision
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
