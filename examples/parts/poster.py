"""The poster's tables: which cells each has, and the numbers that were published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["PUBLISHED", "Row", "Table"]

Table = Literal["cifar100", "tinyimagenet", "students", "heads", "sota"]


@dataclass(frozen=True)
class Row:
    """One pair of networks, or one number of heads, of a table.

    Args:
        title: What the table calls it.
        experiment: The pair's name in `reproduce.EXPERIMENTS`.
        published: Accuracy of "teacher" and of each method, per cent, as printed.
        num_heads: Attention heads, where the table varies them.
    """

    title: str
    experiment: str
    published: dict[str, float]
    num_heads: int | None = None


COMPARED = ("teacher", "student", "soft-logits", "fsp", "ab", "kd-svd", "kd-svdf", "mhgd")
STUDENTS = ("student", "soft-logits", "fsp", "ab", "kd-svd", "mhgd")
SOTA = (
    *("student", "teacher", "soft-logits", "fitnet", "at", "fsp"),
    *("dml", "kd-svd", "ft", "ab", "rkd", "mhgd"),
)


def _row(title: str, experiment: str, methods: tuple[str, ...], *accuracies: float) -> Row:
    return Row(title, experiment, dict(zip(methods, accuracies, strict=True)))


PUBLISHED: dict[Table, list[Row]] = {
    "cifar100": [
        _row("VGG", "cifar100_vgg", COMPARED,
             67.99, 59.97, 60.95, 61.87, 64.56, 64.25, 64.38, 67.02),
        _row("WRN", "cifar100_wrn", COMPARED,
             77.22, 71.62, 71.88, 71.57, 72.23, 71.83, 71.82, 72.79),
    ],
    "tinyimagenet": [
        _row("VGG", "tinyimagenet_vgg", COMPARED,
             56.30, 52.40, 53.78, 54.85, 54.99, 55.33, 55.35, 56.35),
        _row("WRN", "tinyimagenet_wrn", COMPARED,
             61.31, 55.91, 56.00, 56.04, 56.53, 55.72, 55.95, 56.90),
    ],
    "students": [
        _row("VGG (modified)", "VGG-modified", STUDENTS, 69.76, 70.51, 69.44, 71.24, 70.31, 71.52),
        _row("MobileNet", "MobileNet", STUDENTS, 66.18, 67.35, 60.35, 67.84, 67.03, 68.32),
        _row("ResNet", "ResNet-small", STUDENTS, 71.57, 71.81, 70.40, 71.55, 71.55, 72.74),
    ],
    # The poster's 0 heads is the student alone.
    "heads": [Row("0 heads", "cifar100_vgg", {"student": 59.97})]
    + [
        Row(f"{heads} heads", "cifar100_vgg", {"mhgd": accuracy}, heads)
        for heads, accuracy in ((1, 65.71), (2, 66.41), (4, 67.01), (8, 67.02), (16, 66.70))
    ],
    "sota": [
        _row("ResNet32 → ResNet8", "ResNet8", SOTA,
             71.76, 78.96, 71.79, 72.74, 72.31, 72.65, 73.27, 73.68, 73.35, 73.08, 73.40, 73.98),
    ],
}  # fmt: skip
