"""What passes share while one compile runs: options, calibration batches, the report, the current stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from torch import Tensor

from awqc.config import QuantConfig
from awqc.memory import MemoryLimit
from awqc.ranks import Ranks, current
from awqc.report import Report

if TYPE_CHECKING:
    from awqc.journal import Journal
    from awqc.observers.stages import Stage
    from awqc.verify import Probe

T = TypeVar("T")


class Progress(Protocol):
    """How a long loop shows where it is; the command line draws bars, the library stays silent."""

    def track(self, items: Sequence[T], what: str) -> Iterable[T]:
        """``items`` in order; ``what`` names the work."""
        ...

    def count(self, what: str) -> Callable[[int, int], None]:
        """A callback for steps done and steps in all, where the steps are no items."""
        ...


class Silent(Progress):
    """No progress shown."""

    def track(self, items: Sequence[T], what: str) -> Iterable[T]:
        return items

    def count(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: None


@dataclass
class Context:
    """One compile.

    Args:
        config: the user's options.
        batches: calibration inputs by argument name, each of the shape the graph was captured with.
        report: where passes record what they did.
        progress: how long loops show themselves.
        stage: the stage being processed by stage passes.
        probe: the same forward at a small shape, on which passes over the whole graph are checked.
        limit: of the memory that may be used.
        rows: how many of the user's batches each of ``batches`` holds; see :mod:`awqc.calibration.together`.
        scratch: directory for what does not fit in memory; the system's by default.
        journal: where finished stages are committed, and replayed from; None keeps everything in memory.
        ranks: the processes among which tokens and searches are divided.
    """

    config: QuantConfig
    batches: Sequence[Mapping[str, Tensor]] = ()
    report: Report = field(default_factory=Report)
    progress: Progress = field(default_factory=Silent)
    stage: Stage | None = None
    probe: Probe | None = None
    journal: Journal | None = None
    ranks: Ranks = field(default_factory=current)
    limit: MemoryLimit = field(default_factory=MemoryLimit)
    rows: int = 1
    scratch: Path | None = None
