"""``awqc.analyze``: capture and scale flow alone, also for models without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awqc.calibration import example_inputs, token_batch
from awqc.capture import CaptureReport, capture, flat_inputs, other_inputs
from awqc.capture.roots import arguments_of, check_root
from awqc.config import QuantConfig
from awqc.context import Context
from awqc.driver import analysis_pipeline
from awqc.errors import ConfigError
from awqc.flags import Flags
from awqc.graph import Graph
from awqc.pipeline import Pipeline
from awqc.scaleflow.groups import ScaleGroup, ScaleGroups, random_scales
from awqc.scaleflow.proof import prove
from awqc.storage.source import aliases, from_module, named_tensors, skeleton
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

    def prove(self, batch: Mapping[str, Any], seed: int = 0) -> float:
        """Relative error of the model's outputs in float64 after folding random scales into all groups.

        Raises:
            VerifyError: if it exceeds 1e-9.
        """
        return prove(self.graph, self.groups, flat_inputs(batch), seed)

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


def analyze(
    model: nn.Module | str | Path, inputs: Mapping[str, Any] | Tensor | None = None, *, root: str = ""
) -> Analysis:
    """Capture and scale flow alone: no calibration, no weights needed.

    Args:
        model: a module, also one on ``meta``, or a directory (only its config is read).
        inputs: example inputs by argument name, or token ids ``(batch, tokens)``; made up from the model's
            config if left out.
        root: submodule to look at, with what the model calls it with; the whole model if empty.

    Raises:
        CaptureError: if the model does not run on its inputs.
        ConfigError: if it has no submodule ``root``, or its config does not say what it reads.
    """
    source = from_module(model if isinstance(model, nn.Module) else skeleton(Path(model)))
    batch = example_inputs(source.module) if inputs is None else inputs
    batch = token_batch(batch, source.module) if isinstance(batch, Tensor) else dict(batch)
    check_root(source.module, root)
    named = aliases(source.module)
    weights = Weights(source.names(), source.read, None, "cpu", named, source.buffers())
    given, other = arguments_of(source, root, [batch, other_inputs(batch)], weights)
    checks = {"inputs": given, "reversed": other} if source.has_values else None
    graph = capture(source, given, None, root=root, checks=checks, purpose="analyze")
    pipeline = analysis_pipeline()
    pipeline.run(graph, Context(QuantConfig()), _flags(pipeline))
    found = graph.facts[ScaleGroups]
    linears: dict[str, ScaleGroup | str] = dict(found.refusals)
    for group in found:
        linears.update(dict.fromkeys(group.linears, group))
    return Analysis(found.groups, linears, graph.facts[CaptureReport], graph)


def _flags(pipeline: Pipeline) -> Flags:
    """The flags of the environment, without the names of passes that only a compile has."""
    flags = Flags.from_environment()
    elsewhere = set(Pipeline.default().names()) - set(pipeline.names())
    return replace(flags, skip=flags.skip - elsewhere, dump=flags.dump - elsewhere)
