"""Command lines from frozen dataclasses: a field is a flag, its metadata the help."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from parts.distributed import fails_first

__all__ = [
    "check_above_zero",
    "check_at_least",
    "check_device",
    "check_seeds",
    "flag",
    "parse",
    "plain",
]

C = TypeVar("C")


def flag(default: Any, help: str) -> Any:  # noqa: A002 # argparse's own name for it
    """Return a dataclass field whose flag has this default and help text."""
    return dataclasses.field(default=default, metadata={"help": help})


def parse(config: type[C], description: str | None, arguments: Sequence[str] | None = None) -> C:
    """Read the command line into ``config``; unknown flags and wrong values end the program.

    A field ``tuple[T, ...]`` takes several values, ``T | None`` may be left out, a `Literal` is one
    of its values, and a bool is false unless its flag is there.
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):  # type: ignore[arg-type] # any dataclass will do
        hint, default = _given(hints[field.name]), field.default
        name = "--" + field.name.replace("_", "-")
        if hint is bool:
            parser.add_argument(name, action="store_true", help=field.metadata["help"])
            continue
        several = get_origin(hint) is tuple
        kind = get_args(hint)[0] if several else hint
        literal = get_origin(kind) is Literal
        shown = "" if default is None else f" (default: {_shown(default)})"
        parser.add_argument(
            name,
            type=str if literal else kind,
            default=default,
            nargs="+" if several else None,
            choices=get_args(kind) if literal else None,
            help=(field.metadata["help"] + shown).replace("%", "%%"),
        )
    values = vars(parser.parse_args(arguments))
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def check_at_least(config: Any, **least: float) -> None:
    """Refuse a config of which a field is given and below its least value."""
    for name, value in least.items():
        got = getattr(config, name)
        if got is not None and not value <= got < math.inf:
            raise ValueError(f"`--{name.replace('_', '-')}` must be ≥ {value}; got {got}.")


def check_above_zero(config: Any, *names: str) -> None:
    """Refuse a config of which a field is not above zero."""
    for name in names:
        got = getattr(config, name)
        if not 0 < got < math.inf:
            raise ValueError(f"`--{name.replace('_', '-')}` must be > 0; got {got}.")


def check_seeds(name: str, *seeds: int) -> None:
    """Refuse what is no seed of torch's generators."""
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise ValueError(f"`--{name}` must be ≥ 0 and < 2**63; got {seed}.")


def check_device(config: Any) -> None:
    """Refuse a config whose device this machine does not have."""
    try:
        torch.empty(0, device=config.device).cpu()  # "meta" holds nothing
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`--device` must be one of this machine; got {config.device}.") from error


def plain(config: Any) -> dict[str, Any]:
    """Return a config as plain types, for records and checkpoints."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(config).items()
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End the program; among several processes one of them says why."""
        if not fails_first():
            sys.exit(2)
        super().error(message)


def _given(hint: Any) -> Any:
    """Return the type of a field that is not None."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
