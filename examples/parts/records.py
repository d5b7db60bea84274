"""What a run leaves behind: one JSON line an epoch, one JSON record a run."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from parts.distributed import is_main, num_processes
from parts.files import write_json

import graph_kd

__all__ = ["Record", "environment"]


class Record:
    """Collect a run's epochs, phase by phase, in ``out``.

    ``epochs.jsonl`` gets a line when an epoch is done; ``record.json`` is written anew, whole, when
    a phase ends. A folder that already holds a record is refused. Among several processes the main
    one sees to all that.

    Args:
        out: Folder of the run.
        config: The run's settings, plain types.
        device: Where it runs.
    """

    def __init__(self, out: Path, config: dict[str, Any], device: torch.device) -> None:
        self.out = out
        self._lines = out / "epochs.jsonl"
        if is_main():
            if self._lines.exists():
                raise FileExistsError(
                    f"`--out` must be a folder without a run; {out} holds one. Choose another "
                    "folder, or move it away."
                )
            out.mkdir(parents=True, exist_ok=True)
            self._lines.touch()
        self.content: dict[str, Any] = {
            "config": config,
            "environment": environment(device),
            "phases": {},
        }
        self._started = time.perf_counter()

    def epoch(self, phase: str, values: dict[str, Any]) -> None:
        """Append one epoch to the line file and to its phase."""
        line = {"phase": phase, **values}
        if is_main():
            with self._lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.content["phases"].setdefault(phase, {"epochs": []})["epochs"].append(values)

    def phase(self, phase: str, **summary: Any) -> None:
        """Close a phase with its summary and write the record."""
        self.content["phases"].setdefault(phase, {"epochs": []}).update(summary)
        self.content["seconds"] = round(time.perf_counter() - self._started, 1)
        write_json(self.out / "record.json", self.content)


def environment(device: torch.device) -> dict[str, Any]:
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
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")
