"""How the work of ``exllama.cu`` is cut into blocks, and its macros."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from awqc.kernels.exllama_layout import CHANNELS

#: Codes of a scale's dtype in ``exllama.cu``.
_SCALES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
#: Shared memory that 32 channels of a token take: integers, their step and their sum.
_CHUNK_BYTES = 2 * CHANNELS + 8
#: Shared memory that the system takes for each block.
_RESERVED = 1024


@dataclass(frozen=True)
class Block:
    """A launch configuration of ``product``.

    Args:
        tokens: of a block; more are shared out over blocks.
        columns: output features of a thread.
        warps: of a block, which share its input channels.
        blocks: as many as a processor holds at a time.
    """

    tokens: int
    columns: int
    warps: int
    blocks: int

    def shares(self, tokens: int, rows: int, chunks: int, processors: int, limit: int) -> int:
        """Shares of the ``chunks`` of K with which blocks fill the device, but not twice. It is filled more
        often where activations of so many blocks do not fit a processor's shared memory, of which one block
        may have ``limit`` bytes."""
        blocks = math.ceil(tokens / self.tokens) * math.ceil(rows / (32 * self.columns))
        at_once = processors * self.blocks
        room = (limit + _RESERVED) // self.blocks - _RESERVED
        least = math.ceil(chunks / (room // (_CHUNK_BYTES * self.tokens)))
        rounds = math.ceil(blocks * least / at_once)
        return max(least, min(rounds * at_once // blocks, chunks), 1)

    def shared_bytes(self, chunks: int, shares: int) -> int:
        """Shared memory of a block: activations of its chunks, later the sums of the warps."""
        staged = math.ceil(chunks / shares) * _CHUNK_BYTES
        return self.tokens * max(staged, 4 * 32 * self.columns * self.warps)


def macros(block: Block, dtype: torch.dtype, scales: torch.dtype, dependent: bool = False) -> dict[str, int]:
    """Of ``exllama.cu``, for activations and scales of these dtypes."""
    return {
        "COLUMNS": block.columns,
        "TOKENS": block.tokens,
        "WARPS": block.warps,
        "BLOCKS": block.blocks,
        "BFLOAT": int(dtype == torch.bfloat16),
        "SCALES": _SCALES[scales],
        "DEPENDENT": int(dependent),
    }


#: For ``reconstruct``, which is not cut.
ALONE = Block(tokens=1, columns=1, warps=1, blocks=1)
