"""Small modules for tests of capture and scale flow: named parts and a function that uses them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import awqc
from awqc.analysis import Analysis
from awqc.capture import relative_error

WIDTH = 8


class Net(nn.Module):
    """``forward(x)`` is ``compute(self, x)``; plain tensors among ``parts`` become buffers."""

    def __init__(
        self, compute: Callable[[Any, Tensor], Any], **parts: nn.Module | nn.Parameter | Tensor
    ) -> None:
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            if isinstance(part, (nn.Module, nn.Parameter)):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


def linear(inputs: int = WIDTH, outputs: int = WIDTH, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


def norm() -> nn.LayerNorm:
    return nn.LayerNorm(WIDTH)


def inputs(*leading: int) -> dict[str, Tensor]:
    """``x`` of shape ``(*leading, WIDTH)``, by default ``(2, 3, WIDTH)``."""
    size = (*(leading or (2, 3)), WIDTH)
    return {"x": torch.randn(size, generator=torch.Generator().manual_seed(1))}


def analyze(net: nn.Module) -> Analysis:
    """Analyze, and check that folding what was found moves nothing: the float64 module run eagerly."""
    analysis = awqc.analyze(net, inputs())
    assert analysis.prove(inputs()) < 1e-9
    assert fold_error(net, analysis) < 1e-12
    return analysis


def fold_error(net: nn.Module, analysis: Analysis) -> float:
    """Relative error of the module's output after random scales are folded into a copy of it."""
    folded, x = copy.deepcopy(net).double(), inputs()["x"].double()
    with torch.no_grad():
        before = folded(x)
        analysis.fold(folded)
        return relative_error(folded(x), before)


def members(analysis: Analysis) -> dict[str, tuple[str, ...]]:
    """Group name -> its linears, in the order of the groups."""
    return {group.name: group.linears for group in analysis.groups}


def refusals(analysis: Analysis) -> dict[str, str]:
    """Linear -> why it has no group."""
    return {name: found for name, found in analysis.linears.items() if isinstance(found, str)}
