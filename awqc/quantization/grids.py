"""The grid that each linear's codes will lie on, chosen before any rounding."""

from __future__ import annotations

from awqc.quantized import Grid


class Grids(dict[str, Grid]):
    """Grid by weight parameter name, that of experts with their number in front; a linear without one is
    rounded on its min-max grid."""
