"""Settings of every test: derandomised properties, and two threads as on a small machine."""

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
torch.set_num_threads(min(2, torch.get_num_threads()))
# oneDNN's backward pass of the narrowest convolutions here hangs or aborts at times.
torch.backends.mkldnn.set_flags(False)
