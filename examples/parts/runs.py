"""A training run as a folder: what it is, how far it has come, and where it goes on.

``record.json``: the run's settings, versions, commit and every epoch; two runs of the same settings
on the same machine write the same bytes, interrupted or not. ``seconds.json``: how long it took.
``epochs.jsonl``: a line an epoch, to follow. ``checkpoint.pt``: where an unfinished run goes on.
``model.pt``: what a finished one has trained.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout
from parts.distributed import is_main, wait_for_all
from parts.environment import environment
from parts.files import load_tensors, save_tensors, write_atomically, write_json

__all__ = ["Run", "Stateful", "hold", "read_record"]


class Stateful(Protocol):
    """What a checkpoint can hold: modules, optimizers, schedulers, loss scalers."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain types."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take them back."""


class Run:
    """Open a folder to begin, go on with, or read a run.

    Args:
        folder: Where; made if it is missing.
        about: The run's settings, plain types. A folder that holds a run of others is refused.
        device: Where it runs.
        checkpoint_seconds: Least time between two checkpoints within a phase.

    Attributes:
        content: What ``record.json`` holds.

    Raises:
        ValueError: the folder holds a run of other settings, or a damaged file.
    """

    def __init__(
        self, folder: Path, about: dict[str, Any], device: torch.device, checkpoint_seconds: float
    ) -> None:
        self.folder, self.device, self.checkpoint_seconds = folder, device, checkpoint_seconds
        self._saved_at = time.monotonic()
        self._seconds: dict[str, float] = {}
        self._checkpoint: dict[str, Any] | None = None
        self.content: dict[str, Any] = {
            "about": about,
            "environment": environment(device),
            "finished": False,
            "phases": {},
        }
        earlier = read_record(folder, about)
        if earlier is not None and earlier["finished"]:
            self.content = earlier
            self._drop_checkpoint()  # it was killed between the record and this
        else:
            self._go_on()

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        finished: bool = self.content["finished"]
        return finished

    def phase(self, name: str) -> dict[str, Any]:
        """Return what the record says of a phase, to write to."""
        phase: dict[str, Any] = self.content["phases"].setdefault(name, {"epochs": []})
        return phase

    def is_done(self, name: str) -> bool:
        """Return whether a phase has ended, and another one was checkpointed after it."""
        begun = self._checkpoint["phase"] if self._checkpoint else None
        return begun != name and bool(self.content["phases"].get(name, {}).get("done"))

    def restore(self, phase: str, state: Mapping[str, Stateful], order: torch.Generator) -> int:
        """Take back the state of a phase, if the checkpoint is of it; return its epochs."""
        if self._checkpoint is None or self._checkpoint["phase"] != phase:
            return 0
        saved = self._checkpoint["state"]
        if missing := state.keys() - saved.keys():
            raise ValueError(
                f"{self.folder / 'checkpoint.pt'} must hold the state of {', '.join(state)}; it "
                f"lacks {', '.join(sorted(missing))}, as another version of these examples left "
                "it. Delete its folder to begin this run anew."
            )
        for name, part in state.items():
            part.load_state_dict(saved[name])
        order.set_state(self._checkpoint["order"])
        torch.set_rng_state(self._checkpoint["random"])
        if self.device.type == "cuda" and "random_cuda" in self._checkpoint:  # else it was on a CPU
            torch.cuda.set_rng_state(self._checkpoint["random_cuda"], self.device)
        return len(self.phase(phase)["epochs"])

    def epoch(
        self,
        phase: str,
        values: dict[str, Any],
        seconds: float,
        state: Mapping[str, Stateful],
        order: torch.Generator,
        *,
        last: bool,
    ) -> None:
        """Add an epoch to the record, and write a checkpoint where one is due."""
        self.phase(phase)["epochs"].append(values)
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
        if is_main():
            with (self.folder / "epochs.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"phase": phase, **values}) + "\n")
        if last:
            self.phase(phase)["done"] = True
        if last or time.monotonic() - self._saved_at >= self.checkpoint_seconds:
            self._save(phase, state, order)

    def finish(self, model: Mapping[str, Any], **result: Any) -> None:
        """Keep the trained model and close the record; its checkpoint goes."""
        save_tensors(self.folder / "model.pt", {"about": self.content["about"], "model": model})
        write_json(self.folder / "seconds.json", self._seconds)
        self.content |= {"finished": True, **result}
        write_json(self.folder / "record.json", self.content)
        self._drop_checkpoint()
        wait_for_all()  # or another process finds the folder unfinished, and trains in it

    def _drop_checkpoint(self) -> None:
        if is_main():
            (self.folder / "checkpoint.pt").unlink(missing_ok=True)

    def _save(self, phase: str, state: Mapping[str, Stateful], order: torch.Generator) -> None:
        checkpoint = {
            "record": json.dumps(self.content),
            "seconds": self._seconds,
            "phase": phase,
            "state": {name: part.state_dict() for name, part in state.items()},
            "order": order.get_state(),
            "random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            checkpoint["random_cuda"] = torch.cuda.get_rng_state(self.device)
        save_tensors(self.folder / "checkpoint.pt", checkpoint)
        self._saved_at = time.monotonic()

    def _go_on(self) -> None:
        """Read where the run stands, and let the files say the same."""
        path, environment_now = self.folder / "checkpoint.pt", self.content["environment"]
        if path.exists():
            self._checkpoint = load_tensors(
                path,
                ("record", "seconds", "phase", "state", "order", "random"),
                name="checkpoint.pt",
                fix=" Delete it to begin this run anew.",
            )
            content = json.loads(self._checkpoint["record"])
            _check_same(self.folder, content["about"], self.content["about"])
            self.content, self._seconds = content, self._checkpoint["seconds"]
            if environment_now not in (
                content["environment"],
                *content.get("went_on_with", ()),
            ):
                content.setdefault("went_on_with", []).append(environment_now)
        write_json(self.folder / "record.json", self.content)
        lines = [
            json.dumps({"phase": name, **values}) + "\n"
            for name, phase in self.content["phases"].items()
            for values in phase["epochs"]
        ]
        write_atomically(
            self.folder / "epochs.jsonl", lambda file: file.write("".join(lines).encode())
        )


def read_record(folder: Path, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record in a folder, finished or not; None where there is none.

    Raises:
        ValueError: it is of a run that differs in one of ``about``, or damaged.
    """
    path = folder / "record.json"
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        earlier, _ = record["about"], record["finished"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`{path}` must be the record of a run of these examples; it is not "
            f"({type(error).__name__}: {error}). Move its folder away to train it again."
        ) from error
    _check_same(folder, earlier, about)
    return record


def _check_same(folder: Path, earlier: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    for key, value in about.items():
        if earlier.get(key) != value:
            raise ValueError(
                f"`--out` must be new or hold runs of the same settings; {folder} holds one with "
                f"{key} = {earlier.get(key)!r}, where {value!r} is wanted. Choose another folder."
            )


@contextmanager
def hold(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a folder, so that no other process works in it; yield whether it could be had.

    The operating system lets go of it when the process ends, however it ends.
    """
    if not is_main():
        yield True
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    try:
        for unfinished in folder.glob("*.part"):  # of a process that was killed while writing
            unfinished.unlink()
        yield True
    finally:
        lock.release()
