"""What is to be captured, and what every rung of the ladder needs to know about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from awqc.capture.builder import Builder
from awqc.capture.tracing import accepted_settings
from awqc.storage.source import ModelSource, aliases, named_tensors
from awqc.weights import Weights


@dataclass
class Subject:
    """One model, or a part of it, and an example of its inputs.

    Args:
        source: the model.
        inputs: example inputs of the root by argument name.
        dtype: floating-point dtype of the graph; None keeps that of the parameters.
        device: of the graph.
        root: name of the submodule to capture; the whole model if empty.
        notes: what a rung has to say about its graph.
    """

    source: ModelSource
    inputs: Mapping[str, Any]
    dtype: torch.dtype | None
    device: torch.device | str
    root: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def module(self) -> nn.Module:
        """The root."""
        return self.source.module.get_submodule(self.root)

    def paths(self) -> dict[nn.Module, str]:
        """Every module of the root -> its name in the model."""
        prefix = f"{self.root}." if self.root else ""
        return {module: f"{prefix}{name}".rstrip(".") for name, module in self.module.named_modules()}

    def weights(self) -> Weights:
        """All tensors of the model, read when they are needed."""
        source = self.source
        named = aliases(source.module)
        weights = Weights(source.names(), source.read, self.dtype, self.device, named, source.buffers())
        weights.stand_ins = source.stand_ins
        return weights

    def builder(self) -> Builder:
        """An empty graph."""
        return Builder(self.weights(), {id(t): name for name, t in named_tensors(self.source.module)})

    def arguments(self) -> dict[str, Any]:
        """Arguments of the root's forward."""
        return {**accepted_settings(self.module), **self.inputs}
