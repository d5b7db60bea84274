"""What the user is told of a file that does not hold what it should."""

from __future__ import annotations

from pathlib import Path

__all__ = ["malformed"]


def malformed(source: str | Path, rule: str, got: object, fix: str = "") -> ValueError:
    """Return the error: what ``source`` must do, what was found and how to mend it."""
    return ValueError(f"`{source}` must {rule}; got {got}.{fix and ' '}{fix}")
