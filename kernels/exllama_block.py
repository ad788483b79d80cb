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
#: Variants of ``exllama.cu`` that are off: see its macros.
EARLY, STREAMED = 0, 0


@dataclass(frozen=True)
class Block:
    """A launch configuration of ``product``.

    Args:
        tokens: of a block; more are shared out over blocks.
        columns: output features of a thread.
        warps: of a block, which share its input channels.
        blocks: as many as a processor holds at a time.
        rounds: how often blocks fill the device, one set after the other.
        depth: chunks of 32 channels whose words are loaded ahead.
    """

    tokens: int
    columns: int
    warps: int
    blocks: int
    rounds: int = 1
    depth: int = 1

    def shares(self, tokens: int, rows: int, chunks: int, span: int, processors: int, limit: int) -> int:
        """Shares of the ``chunks`` of K with which blocks fill the device ``rounds`` times, but no oftener.
        There are more rounds where activations of so many blocks do not fit a processor's shared memory, of
        which one block may have ``limit`` bytes.

        Args:
            span: chunks that stay together, see :func:`chunks_of_a_step`.
        """
        blocks = math.ceil(tokens / self.tokens) * math.ceil(rows / (32 * self.columns))
        at_once = processors * self.blocks
        spans = math.ceil(chunks / span)
        room = (limit + _RESERVED) // self.blocks - _RESERVED - self._told_bytes
        least = math.ceil(spans / (room // (_CHUNK_BYTES * span * self.tokens)))
        rounds = max(self.rounds, math.ceil(blocks * least / at_once))
        return max(least, min(rounds * at_once // blocks, spans), 1)

    def shared_bytes(self, chunks: int, span: int, shares: int) -> int:
        """Shared memory of a block: activations of its chunks, later the sums of the warps."""
        staged = math.ceil(math.ceil(chunks / span) / shares) * span * _CHUNK_BYTES
        return max(self.tokens * staged + self._told_bytes, 4 * 32 * self.tokens * self.columns * self.warps)

    @property
    def _told_bytes(self) -> int:
        """Shared memory for what threads tell each other."""
        return 8 * 32 * self.warps


def chunks_of_a_step(group: int) -> int:
    """Chunks whose activations share a step, for ``group`` channels that share a scale: 1, 2 or 4."""
    return math.gcd(math.ceil(group / CHANNELS), 4)


def macros(block: Block, dtype: torch.dtype, scales: torch.dtype, dependent: bool = False) -> dict[str, int]:
    """Of ``exllama.cu``, for activations and scales of these dtypes."""
    return {
        "COLUMNS": block.columns,
        "TOKENS": block.tokens,
        "WARPS": block.warps,
        "BLOCKS": block.blocks,
        "DEPTH": block.depth,
        "BFLOAT": int(dtype == torch.bfloat16),
        "SCALES": _SCALES[scales],
        "DEPENDENT": int(dependent),
        "EARLY": EARLY,
        "STREAMED": STREAMED,
    }


#: For ``reconstruct``, which is not cut.
ALONE = Block(tokens=1, columns=1, warps=1, blocks=1)
