"""What divides a tensor when scales are folded: in every sample alike, or up to the expert of each row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from awqc.scaleflow.routing import Routing


@dataclass(frozen=True)
class Divisor:
    """The divisor of one tensor.

    Args:
        values: it, broadcastable to the tensor; or with a ``routing`` ``(E, U)``, at each expert that of each
            of U kinds of elements.
        routing: which expert serves each element.
        kinds: which of the U each element is, broadcastable to the tensor.
    """

    values: Tensor
    routing: Routing | None = None
    kinds: Tensor | None = None

    def at(self, known: Mapping[fx.Node, Tensor]) -> Tensor:
        """For a sample of which ``known`` holds the value of ``routing.key``; broadcastable to the tensor."""
        if self.routing is None or self.kinds is None:
            return self.values
        experts = self.routing.served_by(known[self.routing.key])
        return self.values[experts.to(self.values.device), self.kinds]
