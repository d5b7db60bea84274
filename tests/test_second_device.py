"""The modules on a simulated second device; see `laws_on_second_device.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="backends in Python came with torch 2.10",
)
def test_the_laws_hold_on_another_device():
    laws = Path(__file__).with_name("laws_on_second_device.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(laws)]
    command += ["--cov", "--cov-report=", "--cov-fail-under=0"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=laws.parents[1],
        # What runs here counts: a run with --cov combines all files of this name.
        env={**os.environ, "COVERAGE_FILE": str(laws.parents[1] / ".coverage.second_device")},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
