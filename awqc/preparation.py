"""From a model and its calibration inputs to a checked graph and the batches that it runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from awqc.calibration.together import rows_together, together
from awqc.capture import CaptureReport, capture, flat_inputs, other_inputs
from awqc.capture.ladder import EAGER, EXPORT
from awqc.capture.roots import arguments_of, check_root, largest_part, text_part
from awqc.capture.scans import longest, reads_steps
from awqc.errors import CaptureError
from awqc.graph import Graph
from awqc.memory import MemoryLimit
from awqc.report import Report
from awqc.storage.source import ModelSource, aliases, named_tensors
from awqc.verify import Probe
from awqc.weights import Weights

#: Tokens in the input on which whole graphs are compared and folds are proven.
PROBE_TOKENS = 16

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A graph that computes what the model does.

    Args:
        graph: for batches of the shape of ``batches``.
        batches: calibration inputs of the graph, by placeholder.
        rows: how many of the given inputs each of them holds.
        probe: the same program at a small shape, if there is one.
        root: the submodule that the graph is of; empty for the whole model.
    """

    graph: Graph
    batches: list[dict[str, Tensor]]
    rows: int
    probe: Probe | None
    root: str


def prepare(
    source: ModelSource,
    batches: Sequence[Batch],
    device: torch.device | str,
    report: Report,
    root: str | None = None,
    limit: MemoryLimit | None = None,
) -> Prepared:
    """Capture the model, or the part of it that is to be compiled, on calibration inputs.

    Args:
        batches: arguments of the model's forward, all of one shape.
        report: is told how the capture went.
        root: submodule to compile; None chooses the part that reads text, or what can be captured.
        limit: of the memory that batches may take.

    Raises:
        CaptureError: if the model does not run on its inputs.
        ConfigError: if it has no submodule ``root``.
    """
    check_root(source.module, root or "")
    moved = [_on(batch, device) for batch in batches]
    preparation = _Preparation(source, moved, device, report, limit or MemoryLimit())
    chosen = text_part(source.module) if root is None else root
    if chosen and root is None:
        report.note(
            "capture", f"only {chosen!r}, which reads the text, is compiled: pass root='' for the whole"
        )
    prepared = preparation.run(chosen)
    part = largest_part(source.module)
    if root is None and not chosen and part and prepared.graph.facts[CaptureReport].rung == EAGER:
        try:
            smaller = preparation.run(part)
        except CaptureError as error:
            report.note("capture", f"the part {part!r} cannot be captured by itself either: {error}")
        else:
            if smaller.graph.facts[CaptureReport].rung != EAGER:
                report.note("capture", f"only {part!r} is compiled: the whole cannot be captured")
                prepared = smaller
    report.capture = asdict(prepared.graph.facts[CaptureReport])
    return prepared


@dataclass
class _Preparation:
    source: ModelSource
    batches: list[dict[str, Any]]
    device: torch.device | str
    report: Report
    limit: MemoryLimit

    def run(self, root: str) -> Prepared:
        batches = self.batches
        if _cut(batches[0], PROBE_TOKENS) is None or _tokens(batches[0]) <= 2 * PROBE_TOKENS:
            graph = self._checked(batches[0], batches[-1], root)
            return Prepared(graph, self._flat(batches, root), 1, None, root)
        each = max(value.numel() for value in batches[0].values())
        rows = rows_together(len(batches), each, self.source.module, self.limit)
        try:
            if rows > 1:
                return self._probed(together(batches, rows), rows, root, EXPORT)
        except CaptureError as error:
            self.report.note(
                "capture", f"calibration batches are taken one by one, not {rows} at once: {error}"
            )
        return self._probed(batches, 1, root)

    def _probed(
        self, batches: list[dict[str, Any]], rows: int, root: str, rung: str | None = None
    ) -> Prepared:
        """A graph for ``batches``, each of so many of those given, that is checked at a small shape."""
        small, other = (_cut(batch, PROBE_TOKENS) or {} for batch in (batches[0], batches[-1]))
        first = self._checked(small, other, root, rung)
        if rows > 1 and reads_steps(first, PROBE_TOKENS):
            raise CaptureError("the forward may loop over time")
        batches = self._short(first, batches, root)
        graph = self._like(first, batches, root)
        probe = Probe(first, self._flat([small], root)[0])
        flat = self._flat(batches, root)
        return Prepared(graph, flat, rows, probe if probe.mirrors(graph) else None, root)

    def _checked(self, batch: Batch, other: Batch, root: str, rung: str | None = None) -> Graph:
        """A graph that was compared with eager execution on ``batch`` and on an input made from ``other``."""
        # A second input that the graph was not traced with: frozen values would show.
        given, second = self._arguments([batch, other_inputs(other)], root)
        checks = {"calibration": given, "reversed": second}
        return capture(self.source, given, torch.float32, self.device, root=root, checks=checks, rung=rung)

    def _like(self, first: Graph, batches: list[dict[str, Any]], root: str) -> Graph:
        """A graph for whole batches, obtained as ``first`` was."""
        found = first.facts[CaptureReport]
        (given,) = self._arguments(batches[:1], root)
        graph = capture(self.source, given, torch.float32, self.device, root=root, rung=found.rung)
        if Probe(first, {}).mirrors(graph):
            graph.facts[CaptureReport] = found
            return graph
        self.report.note("capture", f"traces differently at {PROBE_TOKENS} tokens: checked at full length")
        return self._checked(batches[0], batches[-1], root)

    def _short(self, first: Graph, batches: list[dict[str, Any]], root: str) -> list[dict[str, Any]]:
        """``batches``, cut if the forward loops over time."""
        if not reads_steps(first, PROBE_TOKENS):
            return batches
        tokens, more = _tokens(batches[0]), PROBE_TOKENS + PROBE_TOKENS // 2
        (given,) = self._arguments([_cut(batches[0], more) or {}], root)
        rung = first.facts[CaptureReport].rung
        second = capture(self.source, given, torch.float32, self.device, root=root, rung=rung)
        length = longest((PROBE_TOKENS, len(first.nodes)), (more, len(second.nodes)), tokens)
        if length == tokens:
            return batches
        self.report.note(
            "capture",
            f"the forward loops over time, {len(first.nodes)} ops for {PROBE_TOKENS} tokens and "
            f"{len(second.nodes)} for {more}: calibrated on pieces of {length} tokens",
        )
        starts = range(0, tokens - length + 1, length)
        return [{n: v[:, i : i + length] for n, v in batch.items()} for batch in batches for i in starts]

    def _arguments(self, batches: Sequence[Batch], root: str) -> list[dict[str, Any]]:
        source = self.source
        weights = Weights(
            source.names(), source.read, torch.float32, self.device, aliases(source.module), source.buffers()
        )
        weights.streamed = source.stand_ins is not None
        return arguments_of(source, root, batches, weights)

    def _flat(self, batches: Sequence[Batch], root: str) -> list[dict[str, Tensor]]:
        return [flat_inputs(arguments) for arguments in self._arguments(batches, root)]


def _on(batch: Batch, device: torch.device | str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _tokens(batch: Batch) -> int:
    """Length of the longest input of tokens."""
    return max(value.shape[1] for value in batch.values())


def _cut(batch: Batch, tokens: int) -> dict[str, Any] | None:
    """The first ``tokens`` of a batch that holds nothing but rows of token ids; None for any other."""
    rows = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim == 2]
    if len(rows) != len(batch) or any(value.is_floating_point() for value in rows):
        return None
    return {name: value[:, :tokens] for name, value in batch.items()}


def left_out(source: ModelSource, graph: Graph, root: str) -> dict[str, str]:
    """Parameter name of every linear module that the graph does not hold -> why."""
    found = {}
    inside = {id(m) for m in source.module.get_submodule(root).modules()}
    names = {id(tensor): name for name, tensor in named_tensors(source.module)}
    there = graph.parameters()
    for module in source.module.modules():
        name = names.get(id(module.weight)) if isinstance(module, torch.nn.Linear) else None
        if name is not None and name not in there:
            outside = f"is outside of the root {root!r}" if id(module) not in inside else ""
            found[name] = outside or "is not reached by the calibration inputs"
    return found
