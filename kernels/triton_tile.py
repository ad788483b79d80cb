"""Launch configurations of the Triton products, and the shared memory that a program takes with one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from awqc.kernels.hardware import Hardware
from awqc.kernels.planes import PLANES

#: Bytes of an activation, of a word, and of an element of the result before it is rounded.
_ACTIVATION, _WORD, _SUM = 2, 2, 4


@dataclass(frozen=True)
class Tile:
    """A launch configuration of ``gemm``.

    Args:
        block_m, block_n: tokens and rows of a tile.
        warps, stages: of a program: warps, and tiles in flight.
        programs: as many as a processor holds at a time.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int

    def shares(self, token_tiles: int, rows: int, blocks: int, processors: int) -> int:
        """Shares of the ``blocks`` of K with which tiles of ``rows`` fill the device, but not twice."""
        tiles = token_tiles * math.ceil(rows / self.block_n)
        return max(1, min(processors * self.programs // tiles, blocks))

    def constants(self, n: int) -> dict[str, Any]:
        """Arguments that say how kernels cut a weight of ``n`` rows."""
        return {
            "block_m": self.block_m,
            "block_n": self.block_n,
            "stages": self.stages,
            "whole_n": n % self.block_n == 0,
            "num_warps": self.warps,
        }

    def shared_bytes(self, width: int, run: int, scale: int, at: Hardware) -> int:
        """Bytes of shared memory that a program takes, at most.

        In the loop over K that is a block of activations, words and scales for each stage but the one that
        is multiplied, and what scales and zero points need to change their layout. From Hopper on the matrix
        unit still reads the activations of the stage before. The result changes its layout in the same
        memory, when the loop is over.

        Args:
            width, run: of the planes, as ``gemm`` takes them.
            scale: bytes of a scale.
            at: the device.
        """
        ahead = max(self.stages - 1, 0)
        unfinished = at.capability is not None and at.capability[0] >= 9
        buffers = self.stages if unfinished else max(ahead, 1)
        activations = PLANES * width * self.block_m * _ACTIVATION
        words = width * self.block_n * _WORD
        scales = PLANES // run * self.block_n * scale
        loop = buffers * activations + ahead * (words + scales) + self.block_n * _SUM
        return max(loop, self.block_m * self.block_n * _SUM)

    def fitting(self, width: int, run: int, scale: int, at: Hardware) -> Tile:
        """This tile, or the largest below it whose programs have enough shared memory on ``at``.

        Stages go first, which cost the least, down to the two that let memory be read ahead; then tokens,
        then rows. A device of which nothing is known (``shared_bytes`` 0) is taken to have enough.
        """
        tile, limit = self, at.shared_bytes or math.inf
        while tile.shared_bytes(width, run, scale, at) > limit and (smaller := tile._smaller()) is not None:
            tile = smaller
        return tile

    def _smaller(self) -> Tile | None:
        if self.stages > 2:
            return replace(self, stages=self.stages - 1)
        if self.block_m > 16:
            return replace(self, block_m=self.block_m // 2)
        if self.block_n > 32:
            return replace(self, block_n=self.block_n // 2, warps=max(1, self.warps // 2))
        return None
