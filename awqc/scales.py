"""Scales that a search chose and nobody has folded yet."""

from __future__ import annotations

from torch import Tensor


class Scales(dict[str, Tensor]):
    """Scale vector ``(channels,)`` by group name; groups that keep the identity are absent."""
