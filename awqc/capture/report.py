"""How a graph was obtained: the rung of the ladder that succeeded, and why those above it did not."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class CaptureReport:
    """How a graph was obtained.

    Args:
        rung: which way of capturing succeeded.
        checks: (input, largest relative error of any output against eager) for each comparison made.
        notes: rungs that failed before, with the reason, and modules that are run as they are.
        root: the submodule that was captured; empty for the whole model.
    """

    rung: str
    checks: list[tuple[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    root: str = ""
