"""The journal as processes see it that do not write it: the first process of a job does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from awqc.errors import JournalError
from awqc.journal.entry import read_entry
from awqc.journal.identity import Identity
from awqc.journal.journal import Journal
from awqc.observers.stages import Stage
from awqc.report import Report

if TYPE_CHECKING:
    from awqc.observers.activations import Activations


class Follower(Journal):
    """Reads what the first process has written, and holds no more than a stage in memory itself.

    Args:
        directory: of the journal, on a disk that all processes share.
        identity: of this compile.
        report: of this process.
    """

    def __init__(self, directory: Path, identity: Identity, report: Report) -> None:
        #: Whether the last stage is still held in memory.
        self._uncollected = False
        super().__init__(directory, identity, None, report)

    def commit(self, stage: Stage, activations: Activations) -> None:
        """Forget what ``stage`` has changed as soon as the first process has it on disk."""
        self._settle()
        self._opened().take(self._moved or {})
        self._moved = None
        activations.events.clear()
        self._uncollected = True
        self._next += 1
        self._remember()

    def finish(self) -> None:
        """Wait for the first process to have everything on disk."""
        self._settle()

    def remove(self) -> None:
        """The first process does."""

    # -- on disk -------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        if self._uncollected:
            self.ranks.agree("", None)
            entry = read_entry(self.directory, self._next - 1)
            if entry is None:
                raise JournalError(
                    f"{self.directory} lacks the stage that the first process has written: the processes of "
                    "a job need a disk in common for their output"
                )
            self._opened().add(entry)
            self._uncollected = False

    def _acquire(self) -> None:
        """Only who writes locks."""

    def _begin(self) -> None:
        """There is nothing to write."""

    def _clear(self) -> None:
        """There is nothing to remove."""

    def _open(self) -> None:
        while (entry := read_entry(self.directory, len(self._entries))) is not None:
            self._entries.append(entry)
