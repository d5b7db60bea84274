"""Extract the README's fenced blocks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

README = Path(__file__).parent.parent / "README.md"


class Block(NamedTuple):
    language: str
    text: str


def blocks() -> list[Block]:
    """Return the blocks in order."""
    text = README.read_text(encoding="utf-8")
    return [
        Block(*match)
        for match in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def setup_commands() -> list[str]:
    """Return the one-line commands that install from the checkout and run something."""
    lines = [line for block in blocks() for line in block.text.splitlines()]
    return [line for line in lines if line.startswith("pip install -c constraints.txt")]


if __name__ == "__main__":
    print("\n".join(setup_commands()))
