"""Scale vectors by group: chosen by a search, then folded."""

from __future__ import annotations

from torch import Tensor


class Scales(dict[str, Tensor]):
    """Scale vector ``(channels,)`` by group name; groups that keep the identity are absent."""


class FoldedScales(dict[str, Tensor]):
    """Scale vector ``(channels,)`` by group name, of every group that a scale was folded into."""
