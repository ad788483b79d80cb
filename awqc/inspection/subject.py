"""A lowered graph with all that is known of it: of a checkpoint that is loaded, or of an outline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from awqc.calibration import example_inputs
from awqc.capture import capture
from awqc.checkpoints import open_checkpoint
from awqc.config import QuantConfig
from awqc.context import Context
from awqc.driver import canonical_pipeline
from awqc.inspection.outline import Outline, find_hardware, outline
from awqc.kernels.hardware import Hardware
from awqc.page.layers import Layers
from awqc.report import LinearRow, Report
from awqc.runtime.lowered_graph import quantized_linear
from awqc.runtime.packed import PackedModule
from awqc.storage.loading import load
from awqc.storage.source import ModelSource, named_tensors


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Args:
        graph: lowered.
        tensors: by name of ``get_attr`` nodes; on ``meta`` in an outline.
        linears: what runs each quantized linear and each stack of experts, by name.
        report: of the compile, or the decisions of the outline; without linears for a checkpoint of others.
        hardware: what the kernels are for.
        device: where it is, or would be.
        outlined: whether there are no values.
    """

    graph: fx.Graph
    tensors: Mapping[str, Tensor]
    linears: Mapping[str, PackedModule]
    report: Report
    hardware: Hardware
    device: torch.device
    outlined: bool

    def linear(self, node: fx.Node) -> str | None:
        """The name of the quantized linear that ``node`` is, if it is one."""
        return quantized_linear(node, self.linears)

    def row(self, name: str) -> LinearRow | None:
        """The report's row for the linear called ``name``."""
        rows = self.report.linears
        return rows.get(name) or rows.get(f"{name}.weight")

    def layers(self) -> Layers:
        """Where its names belong."""
        return Layers([*self.linears, *(row.name for row in self.report.linears.values())])


def is_quantized(model: Path) -> bool:
    """Whether the directory holds a quantized checkpoint, rather than a float model or its config alone.

    Raises:
        CheckpointError: if it is damaged.
    """
    return any(model.glob("*.safetensors")) and open_checkpoint(model).format is not None


def look_at(
    model: Path,
    *,
    backend: str = "auto",
    device: str = "cpu",
    gpu: str | None = None,
    tokens: int = 16,
    config: QuantConfig | None = None,
) -> Subject:
    """The lowered graph of a quantized checkpoint as it is loaded here, or the outline of a float model.

    Args:
        model: a directory; of a float model, ``config.json`` is enough.
        backend: what linears are lowered to.
        device: where a checkpoint is loaded.
        gpu: name of a GPU that need not be here; a checkpoint is then outlined for it too.
        tokens: of the input that the graph is captured with.
        config: of the outline of a float model.

    Raises:
        AwqcError: if there is no such model, or it cannot be captured or lowered.
    """
    at = find_hardware(gpu, device)
    if not is_quantized(model):
        return of_outline(outline(model, config, backend=backend, hardware=at, tokens=tokens))
    if gpu is None:
        return _loaded(model, backend, torch.device(device), at, tokens)
    compiled = load(model, "reference")
    schemes = {n: m.scheme for n, m in compiled.named_modules() if isinstance(m, PackedModule)}
    return of_outline(outline(model, backend=backend, hardware=at, tokens=tokens, schemes=schemes))


def of_outline(made: Outline) -> Subject:
    """An outline as something to look at."""
    graph = made.graph
    tensors = {name: graph.weights[name] for name in graph.parameters()}
    device = torch.device(made.hardware.type)
    return Subject(graph.fx, tensors, made.linears, made.report, made.hardware, device, True)


def _loaded(model: Path, backend: str, device: torch.device, at: Hardware, tokens: int) -> Subject:
    compiled = load(model, backend, device=device)
    held = dict(named_tensors(compiled))
    source = ModelSource(compiled, lambda name: held[name])
    inputs = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in example_inputs(compiled, tokens).items()
    }
    graph = capture(source, inputs, None, device)
    canonical_pipeline().run(graph, Context(QuantConfig()))
    tensors = {name: graph.weights[name] for name in graph.parameters()}
    linears = {n: m for n, m in compiled.named_modules() if isinstance(m, PackedModule)}
    return Subject(graph.fx, tensors, linears, compiled.report, at, device, False)
