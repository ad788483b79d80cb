"""Calibration sequences that move through the graph together: a batch of several costs as many calls as one.

Of the sequences of a batch all are held out, or none: batch ``i`` of several is held out where sequence ``i``
of one each would be, so that the same sequences are, however many move together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from awqc.memory import FLOAT, MemoryLimit
from awqc.observers.input_statistics import HELD_OUT_EVERY
from awqc.ranks import current

#: Tokens of a batch at most: with more, products and not calls take the time.
TOKENS = 2048
#: Values as wide as the widest weight that a token leaves behind in a stage, about, and the share of the
#: limit of memory that those of a batch may take.
_VALUES, _SHARE = 8, 0.125


def rows_together(count: int, tokens: int, module: nn.Module, limit: MemoryLimit) -> int:
    """Of ``count`` sequences how many move together; 1 where they cannot be put together evenly.

    Args:
        tokens: in each sequence.
        module: the model; no weight of it is read.
        limit: of memory.
    """
    width = max((p.shape[-1] for p in module.parameters() if p.ndim > 1), default=1)
    most = TOKENS
    if limit.device is not None:
        most = min(most, int(_SHARE * limit.device / (_VALUES * FLOAT * width)))
    rows = 1
    while (
        count % (2 * rows * HELD_OUT_EVERY) == 0
        and 2 * rows * tokens <= most
        and count // (2 * rows) >= current().count
    ):
        rows *= 2
    return rows


def together(batches: Sequence[Mapping[str, Tensor]], rows: int) -> list[dict[str, Tensor]]:
    """``batches``, ``rows`` of them joined into one at a time."""
    return [
        {name: torch.cat([batches[i][name] for i in members(index, rows)]) for name in batches[0]}
        for index in range(len(batches) // rows)
    ]


def members(index: int, rows: int) -> list[int]:
    """Which batches :func:`together` joins into number ``index``."""
    block, place = divmod(index, HELD_OUT_EVERY)
    return [(block * rows + row) * HELD_OUT_EVERY + place for row in range(rows)]
