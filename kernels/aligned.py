"""Activations as Hopper's bulk copies take them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def aligned(rows: Tensor) -> Tensor:
    """``rows`` ``(M, K)`` with rows that begin at multiples of 16 bytes; K may have grown by zeros."""
    if rows.shape[1] % 8:
        rows = F.pad(rows, (0, -rows.shape[1] % 8))
    return rows.clone() if rows.data_ptr() % 16 else rows
