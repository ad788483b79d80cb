"""A weight in planes as the Triton kernels take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from awqc.kernels.hardware import Hardware
from awqc.kernels.planes import PLANES
from awqc.kernels.qlinear import group_channels
from awqc.kernels.triton_call import Target
from awqc.kernels.triton_tile import Tile


@dataclass(frozen=True)
class Weight:
    """A packed weight ``(n, k)``, as the op takes it, or a stack ``(E, n, k)`` of them.

    Args:
        packed: ``(blocks, rows, width)`` int16; of a stack ``(E, ...)``, as are the others.
        scales: ``(G, rows)`` floating.
        zeros: ``(G, rows)`` uint8.
        n, k: features.
        group_size: channels that share a scale; -1 for the whole row.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor
    n: int
    k: int
    group_size: int

    @property
    def group(self) -> int:
        """Channels that share a scale; padded channels belong to the only group too."""
        blocks, _, width = self.packed.shape[-3:]
        group = group_channels(self.group_size, self.k)
        return blocks * PLANES * width if group == self.k else group

    @property
    def run(self) -> int:
        """Consecutive planes that share a scale: 1, 2 or 4."""
        return next(r for r in (4, 2, 1) if self.group % (r * self.packed.shape[-1]) == 0)

    def fitting(self, tile: Tile, at: Hardware) -> Tile:
        """``tile``, or what of it a program on the weight has shared memory for."""
        return tile.fitting(self.packed.shape[-1], self.run, self.scales.element_size(), at)

    def operands(self, at: Target) -> dict[str, Any]:
        """Arguments that every kernel on the weight takes."""
        _, rows, width = self.packed.shape[-3:]
        return {
            "words_ptr": self.packed,
            "scales_ptr": self.scales,
            "zeros_ptr": self.zeros,
            "n": self.n,
            "k": self.k,
            "rows": rows,
            "groups": self.scales.shape[-2],
            "group": self.group,
            "run": self.run,
            "width": width,
            "whole_k": self.k % (PLANES * width) == 0,
            "ptx": at.ptx,
        }
