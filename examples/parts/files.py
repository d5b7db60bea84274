"""Files that are whole or not there at all, and written once: JSON records and checkpoints."""

from __future__ import annotations

import io
import json
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

import torch
from parts.distributed import is_main
from torch import nn

__all__ = [
    "load_model",
    "load_tensors",
    "save_model",
    "save_tensors",
    "write_atomically",
    "write_json",
]


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path`` and put it in place when it is done.

    Among several processes the main one does, the others do nothing.

    Raises:
        OSError: it can not be written, for want of room or rights; what was there is kept.
    """
    if not is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=path.name, suffix=".part", delete=False
    ) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        except BaseException as error:
            Path(file.name).unlink()
            # A connection that broke while a download was written wants no room.
            broken = isinstance(error, (ConnectionError, TimeoutError))
            if isinstance(error, OSError) and error.errno is not None and not broken:
                raise OSError(
                    error.errno,
                    f"{path} could not be written ({error.strerror}); what was there is kept. Make "
                    "room for it, and run the same command again",
                ) from error
            raise
    Path(file.name).chmod(0o666 & ~_umask())  # a temporary file is its owner's alone
    Path(file.name).replace(path)


def _umask() -> int:
    mask = os.umask(0)  # it can not be read without being set
    os.umask(mask)
    return mask


def write_json(path: Path, content: Any) -> None:
    """Write plain types as JSON, whole or not at all."""
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain types so that ``weights_only`` loads them."""
    buffer = io.BytesIO()  # torch turns an error of a file into one of its own that says nothing
    torch.save(content, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load_tensors(path: Path, keys: tuple[str, ...], *, name: str, fix: str = "") -> dict[str, Any]:
    """Return what `save_tensors` wrote, on the CPU.

    Args:
        path: The file.
        keys: Entries that it has to hold.
        name: What the user calls the path, for messages.
        fix: What can be done where it is damaged.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not one of these files, or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"`{name}` must be a checkpoint file; there is none at {path}.{fix}"
        )
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return {key: content[key] for key in keys} | content
    except (
        OSError,
        EOFError,
        KeyError,
        IndexError,
        TypeError,
        RuntimeError,
        ValueError,
        BadZipFile,
        pickle.UnpicklingError,
    ) as error:
        raise ValueError(
            f"`{name}` must be a whole checkpoint made by these examples; {path} is not "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'empty'})."
            f"{fix}"
        ) from error


def save_model(path: Path, model: nn.Module, about: dict[str, Any]) -> None:
    """Write weights, buffers and ``about`` (plain types) so that ``weights_only`` loads them."""
    save_tensors(path, {"about": about, "model": model.state_dict()})


def load_model(
    path: Path, model: nn.Module, about: dict[str, Any], *, name: str, fix: str = ""
) -> None:
    """Fill ``model`` from a checkpoint; ``model`` is untouched if it does not fit.

    Args:
        path: The file.
        model: The model to fill.
        about: What the checkpoint has to say of itself, among other things.
        name: What the user calls the path, for messages.
        fix: What can be done where it is missing or damaged.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, or one of another model.
    """
    content = load_tensors(path, ("about", "model"), name=name, fix=fix)
    saved_about, state = content["about"], content["model"]
    for key, value in about.items():
        if saved_about.get(key) != value:
            raise ValueError(
                f"`{name}` must hold a model with {key} = {value!r}; {path} holds one with "
                f"{saved_about.get(key)!r}."
            )
    own = {key: tensor.shape for key, tensor in model.state_dict().items()}
    found = {key: tensor.shape for key, tensor in state.items()}
    if own != found:
        key = next(k for k in [*own, *found] if own.get(k) != found.get(k))
        raise ValueError(
            f"`{name}` must hold the model's tensors; {key!r} should be "
            f"{_shape(own.get(key))}, {path} has {_shape(found.get(key))}."
        )
    model.load_state_dict(state)


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(tuple(shape))
