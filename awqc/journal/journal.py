"""The journal: after each stage its result is committed; a later run replays what is there.

    OUT.journal/identity.json           what the compile is made from
    OUT.journal/weights.json            SHA-256 of the weights, known a little later
    OUT.journal/stage-00000.safetensors tensors of the first finished stage
    OUT.journal/stage-00000.json        its record: folds, rows of the report, seconds, checksums

A replayed stage is not searched again. What it did to the tokens on their way is done to them in the same
order with the same operations, so that an interrupted compile ends with the bits of one that was not.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from torch import Tensor

from awqc.checkpoints.tensors import read_tensor
from awqc.errors import JournalError
from awqc.journal.entry import Entry, drop_entries, read_entry, read_sealed, write_entry, write_sealed
from awqc.journal.identity import Identity, SourceDigest
from awqc.journal.store import JournalStore, moved
from awqc.observers.stages import Stage
from awqc.quantization.scales import FoldedScales
from awqc.ranks import current
from awqc.report import Report, group_row, linear_row
from awqc.scaleflow.groups import ScaleGroups
from awqc.weights import Memory, Rounded

if TYPE_CHECKING:
    from awqc.graph import Graph
    from awqc.observers.activations import Activations

_IDENTITY, _WEIGHTS, _LOCK = "identity.json", "weights.json", "lock"
#: In front of the name of a vector of scales that was folded.
_FOLD = "fold:"


def journal_path(out: Path) -> Path:
    """Where the journal of a compile to ``out`` is."""
    return out.with_name(f"{out.name}.journal")


@dataclass
class _Mark:
    """How far the report has been written down."""

    notes: int
    seconds: dict[str, float]


class Journal:
    """Finished stages on disk. Nothing is written before the first stage begins.

    Args:
        directory: of the journal.
        identity: of this compile.
        weights: their hash, which is waited for before the first commit.
        report: is told what was continued, and rows of stages that are replayed.
        resume: False throws away what is there.

    Raises:
        JournalError: if another process writes to it, or it is that of another compile.
    """

    def __init__(
        self,
        directory: Path,
        identity: Identity,
        weights: SourceDigest | None,
        report: Report,
        resume: bool = True,
    ) -> None:
        self.directory, self.identity, self._weights = directory, identity, weights
        self._report, self.ranks = report, current()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._writing: Future[Entry] | None = None
        self._weights_known = False
        self._lock: FileLock | None = None
        self._store: JournalStore | None = None
        self._mark = _Mark(0, {})
        self._moved: dict[str, Tensor | Rounded] | None = None
        #: Stages that have begun in this run: the number of the next entry.
        self._next = 0
        self._entries: list[Entry] = []
        if directory.is_dir():
            self._acquire()
            if resume:
                self._open()
            else:
                self._clear()

    @property
    def left(self) -> int:
        """Finished stages that are still to be replayed."""
        return max(len(self._entries) - self._next, 0)

    def attach(self, graph: Graph) -> None:
        """Keep the graph's changed weights in the journal from now on."""
        if self._store is not None:
            return
        self._begin()
        self._store = JournalStore(Memory(graph.weights.changed()), graph.weights.device)
        graph.weights.keep_in(self._store)
        self._remember()

    def replay(self, stage: Stage, graph: Graph, activations: Activations | None) -> None:
        """Do what a finished ``stage`` did, without a search.

        Args:
            activations: what the tokens are on their way as; None if no later stage needs them.
        """
        entry = self._entries[self._next]
        if entry.record["stage"] != stage.observers[0].name:
            raise JournalError(
                f"{self.directory}: entry {self._next} is of {entry.record['stage']!r}, not of "
                f"{stage.observers[0].name!r}: pass resume=False (--no-resume) to start over"
            )
        self._next += 1
        groups = {group.name: group for group in graph.facts[ScaleGroups]}
        folded = graph.facts.get(FoldedScales) or FoldedScales()
        graph.facts[FoldedScales] = folded
        early = entry.record["early"]
        self._place(entry, graph, early)
        for name, value in moved(entry):
            graph.weights[name] = value
        for i, (what, name) in enumerate(entry.record["events"]):
            if what == "fold":
                folded[name] = read_tensor(entry.tensors[f"{_FOLD}{i}"]).to(graph.weights.device)
                if activations is not None:
                    activations.fold(groups[name], folded[name])
            elif activations is not None:
                activations.advance(stage)
        if early is not None:
            self._place(entry, graph)
        if activations is not None:
            activations.events.clear()
        graph.weights.release()
        self._report.linears |= {k: linear_row(v) for k, v in entry.record["linears"].items()}
        self._report.groups |= {k: group_row(v) for k, v in entry.record["groups"].items()}
        for where, what in entry.record["notes"]:
            self._report.note(where, what)
        for name, seconds in entry.record["seconds"].items():
            self._report.add_seconds(name, seconds)
        self._remember()

    def _place(self, entry: Entry, graph: Graph, only: list[str] | None = None) -> None:
        self._opened().pending.clear()
        self._opened().add(entry, only)
        graph.weights.forget([*entry.record["rounded"], *entry.record["dense"]])

    def moving(self) -> None:
        """The tokens are about to move on through the weights as they are now, unless they have before."""
        if self._moved is None:
            self._moved = dict(self._opened().pending)

    def commit(self, stage: Stage, activations: Activations) -> None:
        """Write what ``stage`` has changed, in the background; at most one stage is being written.

        Raises:
            JournalError: if the stage before could not be written.
        """
        self._settle()
        record, tensors = self._opened().take(self._moved or {})
        self._moved = None
        events = []
        for i, (name, scales) in enumerate(activations.events):
            events.append(["move", ""] if scales is None else ["fold", name])
            if scales is not None:
                tensors[f"{_FOLD}{i}"] = scales.detach().cpu().clone()
        activations.events.clear()
        report = self._report
        views = [view for observer in stage.observers for view in observer.views]
        linears = {v.parameter: report.linears[v.parameter] for v in views if v.parameter in report.linears}
        names = [group.name for group in stage.groups if group.name in report.groups]
        record |= {
            "stage": stage.observers[0].name,
            "dense": [name.partition(":")[2] for name in tensors if name.startswith("dense:")],
            "events": events,
            "linears": {name: asdict(row) for name, row in linears.items()},
            "groups": {name: asdict(report.groups[name]) for name in names},
            "notes": report.notes[self._mark.notes :],
            "seconds": {
                name: spent - self._mark.seconds.get(name, 0.0)
                for name, spent in report.seconds.items()
                if spent != self._mark.seconds.get(name, 0.0)
            },
        }
        self._writing = self._threads.submit(self._write, self._next, record, tensors)
        self._next += 1
        self._remember()

    def finish(self) -> None:
        """Wait until everything is on disk and the weights are known to be those of all stages.

        Raises:
            JournalError: as :meth:`commit`.
        """
        self._settle()
        self._threads.submit(self._check_weights).result()

    def remove(self) -> None:
        """The result is safe elsewhere."""
        self.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def close(self) -> None:
        """Leave it to another run; what is being written is written. Without a finished stage nothing is
        left."""
        self._threads.shutdown(wait=True)
        if self._lock is None:
            return
        if not any(self.directory.glob("stage-*.json")):
            shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.release()
        self._lock = None

    # -- on disk -------------------------------------------------------------------------------------------

    def _acquire(self) -> None:
        self._lock = FileLock(self.directory / _LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            self._lock = None
            raise JournalError(
                f"{self.directory} is in use: another process compiles to the same output; wait for it, or "
                "choose another output path"
            ) from error
        for stale in self.directory.glob("activations-*"):
            shutil.rmtree(stale, ignore_errors=True)

    def _begin(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JournalError(f"cannot write a journal to {self.directory}: {error.strerror}") from error
        if self._lock is None:
            self._acquire()
        if not (self.directory / _IDENTITY).is_file():
            write_sealed(self.directory / _IDENTITY, {"identity": self.identity})

    def _open(self) -> None:
        """Take in what is there; entries from the first damaged one on are dropped."""
        if not (self.directory / _IDENTITY).is_file():
            return self._clear()
        try:
            before = read_sealed(self.directory / _IDENTITY)["identity"]
            weights = self.directory / _WEIGHTS
            known = read_sealed(weights)["weights"] if weights.is_file() else None
        except JournalError as error:
            self._report.note("journal", f"nothing was continued: {error}")
            return self._clear()
        self._refuse(self.identity.changes(before))
        if known is not None:
            assert self._weights is not None
            found = self._weights.result()
            self._refuse([f"{n} has other content" for n in found if found[n] != known.get(n)])
            self._refuse([f"{n} is gone" for n in known if n not in found])
            self._weights_known = True
        try:
            while (entry := read_entry(self.directory, len(self._entries))) is not None:
                self._entries.append(entry)
        except JournalError as error:
            done = len(self._entries)
            self._report.note("journal", f"stages after the first {done} are computed again: {error}")
        drop_entries(self.directory, len(self._entries))
        if self._entries:
            self._report.note("journal", f"continued after {len(self._entries)} finished stages")

    def _refuse(self, changes: list[str]) -> None:
        if changes:
            self.close()
            raise JournalError(
                f"{self.directory} was left by a compile of something else: {'; '.join(changes)}. Run it as "
                "it was, choose another output path, or pass resume=False (--no-resume) to start over"
            )

    def _clear(self) -> None:
        drop_entries(self.directory, 0)
        for name in (_IDENTITY, _WEIGHTS):
            (self.directory / name).unlink(missing_ok=True)

    def _check_weights(self) -> None:
        if not self._weights_known:
            assert self._weights is not None
            write_sealed(self.directory / _WEIGHTS, {"weights": self._weights.result()})
            self._weights_known = True

    def _write(self, number: int, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Entry:
        self._check_weights()
        return write_entry(self.directory, number, record, tensors)

    def _settle(self) -> None:
        if self._writing is not None:
            entry = self._writing.result()
            self._writing = None
            self.ranks.agree("", None)  # other processes read it now
            self._opened().add(entry)

    def _remember(self) -> None:
        self._mark = _Mark(len(self._report.notes), dict(self._report.seconds))

    def _opened(self) -> JournalStore:
        assert self._store is not None
        return self._store
