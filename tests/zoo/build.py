"""Tiny random models by model type, with inputs that they accept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from tests.zoo.inputs import inputs_of
from tests.zoo.sizes import small


@dataclass(frozen=True)
class Specimen:
    """A model of the zoo.

    Args:
        kind: the model type of transformers.
        head: the class that builds it, ``"CausalLM"`` for ``AutoModelForCausalLM``, a full class name, or
            empty for ``AutoModel``.
        changes: fields of the config, see :func:`tests.zoo.sizes.small`.
        inputs: makes what the model is called with.
    """

    kind: str
    head: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[nn.Module], dict[str, Tensor]] = inputs_of

    def build(self) -> nn.Module:
        """The model in float32, the same each time."""
        torch.manual_seed(0)
        config = small(CONFIG_MAPPING[self.kind], self.changes)
        auto = getattr(transformers, "AutoModel" + (f"For{self.head}" if self.head else ""), None)
        build = auto.from_config if auto is not None else getattr(transformers, self.head)._from_config
        model: nn.Module = build(config)
        return randomize(model.float().eval())

    def batch(self, model: nn.Module) -> dict[str, Tensor]:
        """Inputs of one call."""
        return self.inputs(model)


def randomize(model: nn.Module) -> nn.Module:
    """Weights large enough for every branch to matter; norms and biases not at one and zero."""
    generator = torch.Generator().manual_seed(0)
    seen = set[int]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and id(parameter) not in seen:
                seen.add(id(parameter))
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim < 2:
                    parameter.add_(0.2 * noise)
                else:
                    parameter.copy_(noise * max(parameter.shape[-2:]) ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.5 * torch.rand(buffer.shape, generator=generator))
    return model


@dataclass(frozen=True)
class Plain:
    """A module of plain torch and its inputs."""

    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]

    def build(self) -> nn.Module:
        """The module in float32, the same each time."""
        torch.manual_seed(0)
        return randomize(self.make().eval())

    def batch(self, model: nn.Module) -> dict[str, Tensor]:
        """Inputs of one call."""
        return self.inputs
