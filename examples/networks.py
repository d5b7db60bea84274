"""What the networks of the poster cost, as a Markdown table, beside the poster's own numbers.

    python examples/networks.py

Multiply-adds are those of convolutions and linear layers for one image. The poster's numbers do not
follow from the architectures that its authors give, so they stand beside the counted ones.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from parts.config import flag, parse
from parts.models import NETWORKS, TEACHERS, build
from parts.multiply_adds import count_multiply_adds, count_parameters

CIFAR100 = (100, 32)  # classes, pixels
TINYIMAGENET = (200, 64)
POSTER = {  # millions of operations (its "FLOPS") and of parameters
    "VGG16": ("143.7", "11.83"),
    "VGG7": ("17.6", "2.19"),
    "WRN-22-4": ("374.2", "0.417"),
    "WRN-10-4": ("93.2", "0.1404"),
}


@dataclass(frozen=True)
class Config:
    """Settings of the table; each is a flag."""

    width: float = flag(1.0, "factor on every channel count")


def table(width: float) -> str:
    """Return the table, a line a network."""
    lines = [
        "| network | teacher | channels at the sensing points | multiply-adds, M: CIFAR-100 "
        "| poster | TinyImageNet | parameters, M: CIFAR-100 | poster | TinyImageNet |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in NETWORKS:
        operations, parameters = [], []
        for classes, size in (CIFAR100, TINYIMAGENET):
            with torch.device("meta"):  # shapes alone, no weights
                model = build(name, classes, width, size)
            operations.append(f"{count_multiply_adds(model, size) / 1e6:.1f}")
            parameters.append(f"{count_parameters(model) / 1e6:.3f}")
        channels = ", ".join(map(str, model.channels))
        of_poster = POSTER.get(name, ("–", "–"))
        cells = [name, TEACHERS.get(name, "–"), channels]
        for (cifar, tiny), poster in zip((operations, parameters), of_poster, strict=True):
            cells += [cifar, poster, tiny]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line; what the user can mend ends in one line."""
    try:
        print(table(parse(Config, __doc__).width))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


if __name__ == "__main__":
    main()
