"""A quantized linear for many tokens on Hopper: ``marlin_wide.cu``, bound by tensor cores or by copies."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from awqc.kernels import marlin_layout as layout
from awqc.kernels.aligned import aligned
from awqc.kernels.cuda_launch import CudaKernel, kernel, tensor_map
from awqc.kernels.hardware import Hardware, hardware
from awqc.kernels.launch import Launch, nbytes
from awqc.kernels.machine_code import CudaCode
from awqc.kernels.marlin_parts import Parts

#: Bytes at the start of a block's shared memory: for its alignment, and for its barriers.
_BARRIERS = 2048
#: Tokens of a tile, as the instruction has them.
TILE_TOKENS = (32, 64, 128)
#: Tokens whose sums a thread holds four of.
_CHUNK = 8


@dataclass(frozen=True)
class WideTiling:
    """How ``marlin_wide.cu`` cuts a product; the names are those of its macros.

    Args:
        tokens: of a tile.
        split: blocks that share the channels.
        stages: of 128 channels in flight.
        row_blocks: blocks of 64 rows of a tile, 2 or 4, one for each warpgroup that multiplies.
    """

    tokens: int
    split: int
    stages: int
    row_blocks: int

    @property
    def threads(self) -> int:
        """Of a block: the warpgroups that multiply, and one that copies."""
        return 128 * (self.row_blocks + 1)

    def blocks(self, row_blocks: int, tokens: int) -> int:
        """Blocks of the grid for ``row_blocks`` blocks of 64 rows."""
        return -(-row_blocks // self.row_blocks) * -(-tokens // self.tokens) * self.split

    def shared_bytes(self, group: int) -> int:
        """Shared memory of a block: barriers and the ring, through which the tile leaves in the end."""
        weights = self.row_blocks * layout.STRIPS * layout.strip_bytes(group)
        stage = self.tokens * 2 * layout.CHANNELS + -(-weights // 1024) * 1024
        return _BARRIERS + self.stages * stage

    def parts(self, row_blocks: int, tokens: int) -> Parts:
        """What blocks of the grid for ``row_blocks`` blocks of 64 rows leave for each other: sums of some of
        the tokens for every block that adds up."""
        if self.split == 1:
            return Parts()
        chunks = self.tokens // _CHUNK
        owners = min(self.split, chunks)
        flags = self.blocks(row_blocks, tokens) * owners * self.row_blocks
        return Parts(flags * (chunks // owners) * _CHUNK * layout.ROWS * 4, flags)


def tile(row_blocks: int, columns: int, tokens: int, group: int, processors: int, limit: int) -> WideTiling:
    """How to cut the product of a weight of ``row_blocks`` by ``columns`` blocks with ``tokens`` tokens.

    Tiles are as wide as the tokens. The channels are split as long as every block has a processor of its own.
    Tiles of 256 rows, which read the activations half as often, pay where most processors have 32 steps. Few
    stages leave room for the blocks of the next launch, which then begin early.

    Args:
        processors: multiprocessors of the device; each takes one block of the grid at a time.
        limit: bytes of shared memory that a block may have.
    """
    at_once = tile_tokens(tokens)
    for size in (4, 2) if at_once <= 64 else (2,):
        tiles = -(-row_blocks // size) * -(-tokens // at_once)
        fitting = [split for split in (2, 4, 8) if tiles * split <= processors and split <= columns]
        split = max(fitting, default=1)
        if tiles * split >= processors * 3 // 4 and columns // split >= 32:
            break
    return next(
        tiling
        for stages in (4 if at_once < 128 else 5, 3, 2)
        if (tiling := WideTiling(at_once, split, stages, size)).shared_bytes(group) <= limit
    )


def tile_tokens(tokens: int) -> int:
    """The smallest tile that has ``tokens`` tokens, or the largest."""
    return next((size for size in TILE_TOKENS if size >= tokens), TILE_TOKENS[-1])


@dataclass(frozen=True)
class Wide:
    """The launch of ``marlin_wide.cu`` for one shape."""

    main: CudaKernel
    tiling: WideTiling


@functools.cache
def wide(
    row_blocks: int,
    columns: int,
    tokens: int,
    group: int,
    dtype: torch.dtype,
    bfloat16_scales: bool,
    device: torch.device,
) -> Wide:
    """The launch for a weight of ``row_blocks`` by ``columns`` blocks, compiled and loaded."""
    at = hardware(device)
    tiling = tile(row_blocks, columns, tokens, group, at.processors, at.shared_bytes)
    main = kernel(
        "marlin_wide.cu",
        "wide",
        "128sPPPPPqiiiii",
        device,
        shared=tiling.shared_bytes(group),
        dependent=True,
        **_macros(tiling, group, dtype, bfloat16_scales),
    )
    return Wide(main, tiling)


def _macros(tiling: WideTiling, group: int, dtype: torch.dtype, bfloat16_scales: bool) -> dict[str, int]:
    return {
        "BF16": int(dtype == torch.bfloat16),
        "SCALE_BF16": int(bfloat16_scales),
        "GROUP": group,
        "TOKENS": tiling.tokens,
        "SPLIT": tiling.split,
        "STAGES": tiling.stages,
        "ROW_BLOCKS": tiling.row_blocks,
    }


def _launch_tokens(tokens: int) -> int:
    """The tokens that a launch is made for: it changes with tiles of tokens only."""
    size = tile_tokens(tokens)
    return -(-tokens // size) * size


def describe(
    at: Hardware, rows: Tensor, packed: Tensor, bias: Tensor | None, n: int, group: int, bfloat16_scales: bool
) -> list[Launch]:
    """The launch of :func:`multiply`."""
    tokens, (row_blocks, columns) = rows.shape[0], packed.shape[:2]
    tiling = tile(row_blocks, columns, _launch_tokens(tokens), group, at.processors, at.shared_bytes)
    left = tiling.parts(row_blocks, tokens).nbytes
    return [
        Launch(
            "marlin_wide.cu:wide",
            nbytes(rows, packed, bias) + left,
            tokens * n * rows.itemsize + left,
            grid=(tiling.blocks(row_blocks, tokens),),
            block=(tiling.threads,),
            shared=tiling.shared_bytes(group),
            config=asdict(tiling),
            code=CudaCode("marlin_wide.cu", "wide", _macros(tiling, group, rows.dtype, bfloat16_scales)),
        )
    ]


def multiply(
    rows: Tensor, packed: Tensor, bias: Tensor | None, n: int, group: int, bfloat16_scales: bool
) -> Tensor:
    """``rows @ W.T + bias`` for ``rows`` ``(M, K)`` float16 or bfloat16, contiguous; ``(M, n)``.

    Args:
        packed, group, bfloat16_scales: of :func:`awqc.kernels.qlinear_marlin.qlinear_marlin`.
        bias: ``(n,)`` of the dtype of ``rows``, or None.
    """
    rows = aligned(rows)
    tokens = rows.shape[0]
    row_blocks, columns = packed.shape[:2]
    whole = _launch_tokens(tokens)
    launch = wide(row_blocks, columns, whole, group, rows.dtype, bfloat16_scales, rows.device)
    tiling = launch.tiling
    out = rows.new_empty(tokens, n)
    parts = tiling.parts(row_blocks, tokens)
    memory = parts.allocate(rows.device)
    launch.main.launch(
        (tiling.blocks(row_blocks, tokens),),
        (tiling.threads,),
        (
            tensor_map(rows, tiling.tokens, 64),
            *(out.data_ptr(), packed.data_ptr(), 0 if bias is None else bias.data_ptr()),
            *parts.arguments(memory),
            *(tokens, n, row_blocks, columns, -(-tokens // tiling.tokens)),
        ),
    )
    return out
