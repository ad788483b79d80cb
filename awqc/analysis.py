"""``awqc.analyze``: capture and scale flow alone, also for models without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from awqc.capture import CaptureReport, capture, other_inputs
from awqc.config import QuantConfig
from awqc.context import Context
from awqc.driver import analysis_pipeline
from awqc.errors import ConfigError
from awqc.graph import Graph
from awqc.groups import ScaleGroup, ScaleGroups, random_scales
from awqc.proof import prove
from awqc.source import aliases, from_module, named_tensors, skeleton
from awqc.weights import Weights


@dataclass
class Analysis:
    """What :func:`analyze` found.

    Args:
        groups: scale groups with producers and consumers by parameter name.
        linears: parameter name of every linear -> its group, or the reason it has none.
        capture: rung and checks of the capture.
        graph: the captured, canonical graph.
    """

    groups: list[ScaleGroup]
    linears: dict[str, ScaleGroup | str]
    capture: CaptureReport
    graph: Graph

    def prove(self, batch: Mapping[str, Tensor], seed: int = 0) -> float:
        """Relative error of the model's outputs in float64 after folding random scales into all groups.

        Raises:
            VerifyError: if it exceeds 1e-9.
        """
        return prove(self.graph, self.groups, batch, seed)

    def fold(self, model: nn.Module, scales: Mapping[str, Tensor] | None = None, seed: int = 0) -> None:
        """Fold scales into ``model`` in place, so that anyone can check with eager execution that its
        output does not move.

        Args:
            model: the analyzed model, or one with the same parameter names, with weights.
            scales: ``(channels,)`` by group name; all groups with random scales by default.
            seed: of the random scales.

        Raises:
            ConfigError: if ``scales`` names a group that there is not, or has another length.
        """
        tensors = dict(named_tensors(model))
        weights = Weights(list(tensors), lambda name: tensors[name].detach(), None, "cpu", aliases(model))
        generator = torch.Generator().manual_seed(seed)
        chosen = (
            {g.name: random_scales(g, generator) for g in self.groups} if scales is None else dict(scales)
        )
        by_name = {group.name: group for group in self.groups}
        for name, vector in chosen.items():
            if name not in by_name:
                raise ConfigError(
                    f"no scale group is called {name!r}: there are {', '.join(by_name) or 'none'}"
                )
            if tuple(vector.shape) != (by_name[name].channels,):
                raise ConfigError(
                    f"scales of group {name!r} have shape {tuple(vector.shape)}: "
                    f"expected ({by_name[name].channels},)"
                )
            by_name[name].fold(vector, weights)
        for name, value in weights.changed().items():
            assert isinstance(value, Tensor)
            with torch.no_grad():
                tensors[name].copy_(value)


def analyze(model: nn.Module | str | Path, inputs: Mapping[str, Tensor] | Tensor) -> Analysis:
    """Capture and scale flow alone: no calibration, no weights needed.

    Args:
        model: a module, also one on ``meta``, or a directory (only its config is read).
        inputs: example inputs by argument name, or ``input_ids`` ``(batch, tokens)``.

    Raises:
        CaptureError: if the model cannot be traced, or the graph differs from eager execution.
    """
    source = from_module(model if isinstance(model, nn.Module) else skeleton(Path(model)))
    batch = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    checks = {"inputs": batch, "reversed": other_inputs(batch)} if source.has_values else None
    graph = capture(source, batch, None, checks=checks, purpose="analyze")
    analysis_pipeline().run(graph, Context(QuantConfig()))
    found = graph.facts[ScaleGroups]
    linears: dict[str, ScaleGroup | str] = dict(found.refusals)
    for group in found:
        linears.update(dict.fromkeys(group.linears, group))
    return Analysis(found.groups, linears, graph.facts[CaptureReport], graph)
