"""Which scheme each linear is quantized with: a fact that passes may change one linear at a time."""

from __future__ import annotations

from awqc.quantized import Scheme


class Schemes(dict[str, Scheme]):
    """Scheme by weight parameter name, for every linear that is to be quantized."""
