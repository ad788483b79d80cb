"""Facts about quantized and lowered linears, by module name; those of experts by their parameter's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from awqc.quantized import QuantizedWeight
from awqc.runtime.experts import QuantExperts
from awqc.runtime.linear import QuantLinear
from awqc.weights import Weights


class QuantizedLinears(Mapping[str, QuantizedWeight]):
    """Canonical weight of every quantized linear, and of every stack of experts' linears; each is read when
    it is asked for.

    Args:
        weights: hold them.
        parameters: name of the linear, or of the stack -> its parameter.
    """

    def __init__(self, weights: Weights, parameters: Mapping[str, str]) -> None:
        self.weights, self.parameters = weights, dict(parameters)

    def __getitem__(self, name: str) -> QuantizedWeight:
        rounded = self.weights.rounded(self.parameters[name])
        assert rounded is not None
        return rounded.weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)


class LoweredLinears(dict[str, QuantLinear]):
    """The module that runs each quantized linear; its buffers are the tensors in the lowered graph."""


class LoweredExperts(dict[str, QuantExperts]):
    """The module that stands for each quantized stack of experts' weights."""
