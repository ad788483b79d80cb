"""What a compile would make of a model, from shapes alone: no weights, no calibration, no device needed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from awqc.backend import Backend
from awqc.calibration import example_inputs
from awqc.capture import CaptureReport, capture
from awqc.config import QuantConfig
from awqc.context import Context
from awqc.driver import default_pipeline, outline_pipeline
from awqc.errors import ConfigError
from awqc.flags import Flags
from awqc.graph import Graph
from awqc.kernels.hardware import Hardware as Hardware
from awqc.kernels.hardware import assumed, known
from awqc.kernels.hardware import hardware as hardware_of
from awqc.quantized import Scheme
from awqc.report import Report
from awqc.runtime.lowered import LoweredExperts, LoweredLinears
from awqc.runtime.packed import PackedModule
from awqc.storage.source import ModelSource, named_tensors, skeleton

#: What the graph before the first pass is called.
CAPTURED = "captured"


@dataclass(frozen=True)
class Outline:
    """A lowered graph without values.

    Args:
        graph: lowered; its tensors are on ``meta``.
        linears: what would run each quantized linear and each stack of experts, by name.
        report: decisions, without what searches would choose.
        hardware: what it is for.
        texts: of the graph after each pass that was asked for.
    """

    graph: Graph
    linears: Mapping[str, PackedModule]
    report: Report
    hardware: Hardware
    texts: Mapping[str, str]


def find_hardware(name: str | None, device: str = "cpu") -> Hardware:
    """The hardware called ``name``, or the device that is here if there is no name.

    Raises:
        ConfigError: for a name that nothing is known of, or a device that is not here.
    """
    if name is None:
        try:
            return hardware_of(torch.device(device))
        except (RuntimeError, AssertionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"torch cannot use device {device!r} here ({reason}): try cpu") from error
    if name not in known():
        raise ConfigError(f"nothing is known of a GPU {name!r}: there are {', '.join(known())}")
    return known()[name]


def outline(
    model: Path | nn.Module,
    config: QuantConfig | None = None,
    *,
    backend: str | Backend = "auto",
    hardware: Hardware | None = None,
    tokens: int = 16,
    schemes: Mapping[str, Scheme] | None = None,
    texts_of: Collection[str] = (),
) -> Outline:
    """Capture ``model`` and lower it.

    Args:
        model: a directory with a ``config.json``, or a module, which may be on ``meta``.
        config: bits, group size and so on.
        backend: what linears are lowered to.
        hardware: what they run on; the CPU that is here by default.
        tokens: of the input.
        schemes: of each quantized linear by module name, where that is known.
        texts_of: passes whose result is kept as text; :data:`CAPTURED` is the graph before all of them.

    Raises:
        AwqcError: if there is no such model, or it cannot be captured or lowered.
    """
    at = hardware or find_hardware(None)
    module = model if isinstance(model, nn.Module) else skeleton(model)
    tensors = dict(named_tensors(module))
    source = ModelSource(module, lambda name: tensors[name].to("meta"), has_values=False)
    dtype = torch.float32 if at.type == "cpu" else _half(module)
    graph = capture(source, example_inputs(module, tokens), dtype)
    graph.weights.device = torch.device("meta")
    kept = _Kept(dump=frozenset(texts_of), check=False)
    if CAPTURED in texts_of:
        kept.texts[CAPTURED] = graph.text()
    context = Context(config or QuantConfig())
    pipeline = outline_pipeline(default_pipeline(), backend, torch.device(at.type), schemes)
    with assumed(at):
        pipeline.run(graph, context, kept.without(CAPTURED))
    report = context.report
    report.capture = {"rung": graph.facts[CaptureReport].rung, "checks": [], "notes": []}
    report.config = context.config.as_dict()
    linears: dict[str, PackedModule] = {**graph.facts[LoweredLinears], **graph.facts[LoweredExperts]}
    return Outline(graph, linears, report, at, kept.texts)


def _half(module: nn.Module) -> torch.dtype:
    """The 16-bit dtype that the model's config names, or float16."""
    stated = getattr(getattr(module, "config", None), "dtype", None)
    return stated if stated in (torch.float16, torch.bfloat16) else torch.float16


@dataclass(frozen=True)
class _Kept(Flags):
    """Flags that keep the texts which they are given to write."""

    texts: dict[str, str] = field(default_factory=dict)

    def write(self, name: str, text: str, diff: str) -> None:
        self.texts[name] = text

    def without(self, name: str) -> _Kept:
        """The same, writing to the same place, without one of the names."""
        return _Kept(dump=self.dump - {name}, check=self.check, texts=self.texts)
