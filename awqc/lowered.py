"""Facts about quantized and lowered linears, by module name; those of experts by their parameter's."""

from __future__ import annotations

from awqc.experts import QuantExperts
from awqc.quantized import QuantizedWeight
from awqc.runtime import QuantLinear


class QuantizedLinears(dict[str, QuantizedWeight]):
    """Canonical weight of every quantized linear, and of every stack of experts' linears."""


class LoweredLinears(dict[str, QuantLinear]):
    """The module that runs each quantized linear; its buffers are the tensors in the lowered graph."""


class LoweredExperts(dict[str, QuantExperts]):
    """The module that stands for each quantized stack of experts' weights."""
