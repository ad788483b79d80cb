"""Facts about quantized and lowered linears, by module name."""

from __future__ import annotations

from awqc.quantized import QuantizedWeight
from awqc.runtime import QuantLinear


class QuantizedLinears(dict[str, QuantizedWeight]):
    """Canonical weight of every quantized linear."""


class LoweredLinears(dict[str, QuantLinear]):
    """The module that runs each quantized linear; its buffers are the tensors in the lowered graph."""
