"""What a number was measured with: versions, hardware, commit."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch
from parts.distributed import num_processes

import graph_kd

__all__ = ["environment"]

RESULTS = ":(top,exclude)examples/results"  # what runs leave there does not change the program


def environment(device: torch.device) -> dict[str, str | None]:
    """Return versions, hardware and commit."""
    hardware = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{_processor()}, {torch.get_num_threads()} threads"
    )
    return {
        "graph_kd": graph_kd.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": hardware if num_processes() == 1 else f"{num_processes()} × {hardware}",
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines: Iterable[str] = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = ()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of the checkout this file is in, "+" if it was changed; None without."""
    folder = Path(__file__).parent
    try:
        commit, changed = (
            subprocess.run(
                ["git", "-C", str(folder), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "--", ":/src", ":/examples", RESULTS],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")
