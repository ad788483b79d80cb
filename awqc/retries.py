"""Running a pass that runs out of memory again: after tidying up, then with less of its stage on the device.

A stage whose Gram matrices did not fit beside what its passes need holds them on the host; if that is still
too much, as a sample. What was seen to be too much is not tried again on stages that need as much; those that
need less are held as if nothing had happened.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch

from awqc.context import Context
from awqc.graph import Graph
from awqc.memory import Kind, MemoryLimit, choose_kind, stage_bytes
from awqc.observers.activations import Activations
from awqc.observers.statistics import Statistics

if TYPE_CHECKING:
    from awqc.pipeline import Pass

#: How often a pass is run: as it is, after tidying up, and with each cheaper kind of statistics.
_ATTEMPTS = 4
_HOW: dict[Kind, str] = {
    "offloaded": "its Gram matrices on the host",
    "sampled": "a sample of tokens in the place of its Gram matrices",
}


class Retries:
    """Runs passes on ``graph``."""

    def __init__(self, graph: Graph, context: Context) -> None:
        self._graph, self._context = graph, context

    def run(self, current: Pass) -> None:
        """Run ``current``; where the device runs out of memory, again with less on it.

        Raises:
            torch.cuda.OutOfMemoryError: if there is nothing left to do without, or the pass has changed
                something by then and cannot be repeated; or of one process among several.
        """
        failure = ""
        for attempt in range(_ATTEMPTS):
            state = self._progress()
            try:
                if attempt > 0:
                    self._tidy()
                    how = self._hold_less() if attempt > 1 else ""
                    what = f"ran out of memory on {self._where()} ({failure}): done again{how}"
                    self._context.report.note(current.name, what)
                current.run(self._graph, self._context)
                return
            except torch.cuda.OutOfMemoryError as error:
                changed = self._progress() != state and not current.repeatable
                last = attempt == _ATTEMPTS - 1 or (attempt > 0 and self._cheaper() is None)
                if last or changed or self._context.ranks.count > 1:
                    raise
                # Not the error itself: its traceback would hold on to what was in use.
                failure = str(error).partition(". ")[0]

    def _progress(self) -> tuple[int, ...]:
        """What a pass changes, other than facts."""
        graph, activations = self._graph, self._graph.facts.get(Activations)
        return graph.version, graph.weights.version, 0 if activations is None else len(activations.events)

    def _where(self) -> str:
        stage = self._context.stage
        return "the whole graph" if stage is None else stage.observers[0].name

    def _tidy(self) -> None:
        """Give back what the device holds unused: there may have been enough, but in pieces."""
        self._graph.weights.release()
        gc.collect()
        if self._graph.weights.device.type == "cuda":
            torch.cuda.empty_cache()

    def _cheaper(self) -> tuple[Kind, MemoryLimit] | None:
        """How the statistics of the stage take less, and the limit that knows it; None if they cannot."""
        facts, context, limit = self._graph.facts, self._context, self._context.limit
        stage, activations, statistics = context.stage, facts.get(Activations), facts.get(Statistics)
        if stage is None or activations is None:
            return None
        device, group = self._graph.weights.device, context.config.group_size
        resident = activations.resident

        def chosen(limit: MemoryLimit) -> Kind:
            return choose_kind(stage.observers, limit, device, group, True, resident)

        kind = chosen(limit) if statistics is None else statistics.kind
        less = limit.without(kind, stage_bytes(stage.observers, kind, group, True, resident))
        # Tokens that have moved on cannot be sampled.
        gone = statistics is not None and chosen(less) == "sampled" and not activations.are_at(stage)
        return None if chosen(less) == kind or gone else (chosen(less), less)

    def _hold_less(self) -> str:
        """Hold the statistics of the stage in less memory, and from now on those of all stages that need as
        much; says how."""
        cheaper, stage, facts = self._cheaper(), self._context.stage, self._graph.facts
        assert cheaper is not None
        assert stage is not None
        kind, self._context.limit = cheaper
        if Statistics in facts:
            if kind == "offloaded":
                facts[Statistics].offload()
            else:
                facts.drop(Statistics)  # before there is another
                facts[Statistics] = facts[Activations].observe(stage)
            facts[Statistics].tell(stage, self._context.report)
        return f" with {_HOW[kind]}"
