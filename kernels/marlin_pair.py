"""A quantized linear for many tokens and few rows on Hopper: ``marlin_pair.cu``, two blocks to 64 rows."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from awqc.kernels import marlin_layout as layout
from awqc.kernels.aligned import aligned
from awqc.kernels.cuda_launch import CudaKernel, kernel, tensor_map
from awqc.kernels.hardware import hardware
from awqc.kernels.launch import Launch, nbytes
from awqc.kernels.machine_code import CudaCode
from awqc.kernels.marlin_wide import TILE_TOKENS

#: Threads of a block: two warpgroups that multiply, and one that copies.
_THREADS = 384
#: Bytes at the start of a block's shared memory: for its alignment, and for its barriers.
_BARRIERS = 2048
#: Blocks of 128 channels beyond which sharing them further costs less than tiles of 64 rows do.
_MOST_COLUMNS = 64


@dataclass(frozen=True)
class PairTiling:
    """How ``marlin_pair.cu`` cuts a product; the names are those of its macros.

    Args:
        tokens: of a tile.
        stages: of 128 channels in flight.
    """

    tokens: int
    stages: int

    def blocks(self, row_blocks: int, tokens: int) -> int:
        """Blocks of the grid for ``row_blocks`` blocks of 64 rows."""
        return 2 * row_blocks * -(-tokens // self.tokens)

    def shared_bytes(self, group: int) -> int:
        """Shared memory of a block: barriers and the ring, where sums are exchanged in the end."""
        weights = layout.STRIPS * layout.strip_bytes(group)
        stage = self.tokens * 2 * layout.CHANNELS + -(-weights // 1024) * 1024
        half = layout.ROWS * self.tokens // 2 * 4
        left = 3 * half + half // 2  # sums that are passed on, and what leaves in the end
        return _BARRIERS + max(self.stages * stage, left)


def tile(
    row_blocks: int, columns: int, tokens: int, group: int, processors: int, limit: int
) -> PairTiling | None:
    """How to cut the product of a weight of ``row_blocks`` by ``columns`` blocks with ``tokens`` tokens; None
    where this kernel is not the one to take.

    It is where its blocks are as many as the processors: on an H200 (docs/kernels.md) up to 16% faster then
    than tiles of more rows, whose channels more blocks share.

    Args:
        processors: multiprocessors of the device.
        limit: bytes of shared memory that a block may have.
    """
    if not 2 <= columns <= _MOST_COLUMNS:
        return None
    for size in TILE_TOKENS:
        for stages in (5, 4, 3, 2):  # more do not help the next launch begin early
            tiling = PairTiling(size, stages)
            if tiling.shared_bytes(group) <= limit:
                break
        if processors * 3 // 4 <= tiling.blocks(row_blocks, tokens) <= processors:
            return tiling
    return None


@functools.cache
def plan(row_blocks: int, columns: int, tokens: int, group: int, device: torch.device) -> PairTiling | None:
    """The tiling for ``tokens`` tokens on ``device``, or None: see :func:`tile`."""
    at = hardware(device)
    return tile(row_blocks, columns, tokens, group, at.processors, at.shared_bytes)


@functools.cache
def pair(
    tiling: PairTiling, group: int, dtype: torch.dtype, bfloat16_scales: bool, device: torch.device
) -> CudaKernel:
    """The kernel for ``tiling``, compiled and loaded."""
    return kernel(
        "marlin_pair.cu",
        "pair",
        "128sPPPiiii",
        device,
        shared=tiling.shared_bytes(group),
        cluster=2,
        dependent=True,
        **_macros(tiling, group, dtype, bfloat16_scales),
    )


def _macros(tiling: PairTiling, group: int, dtype: torch.dtype, bfloat16_scales: bool) -> dict[str, int]:
    return {
        "BF16": int(dtype == torch.bfloat16),
        "SCALE_BF16": int(bfloat16_scales),
        "GROUP": group,
        "TOKENS": tiling.tokens,
        "STAGES": tiling.stages,
    }


def describe(
    tiling: PairTiling,
    rows: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    n: int,
    group: int,
    bfloat16_scales: bool,
) -> list[Launch]:
    """The launch of :func:`multiply`."""
    tokens = rows.shape[0]
    return [
        Launch(
            "marlin_pair.cu:pair",
            nbytes(rows, packed, bias),
            tokens * n * rows.itemsize,
            grid=(tiling.blocks(packed.shape[0], tokens),),
            block=(_THREADS,),
            shared=tiling.shared_bytes(group),
            cluster=2,
            config=asdict(tiling),
            code=CudaCode("marlin_pair.cu", "pair", _macros(tiling, group, rows.dtype, bfloat16_scales)),
        )
    ]


def multiply(
    tiling: PairTiling,
    rows: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    n: int,
    group: int,
    bfloat16_scales: bool,
) -> Tensor:
    """``rows @ W.T + bias`` for ``rows`` ``(M, K)`` float16 or bfloat16, contiguous; ``(M, n)``.

    Args:
        tiling: of :func:`plan`.
        packed, group, bfloat16_scales: of :func:`awqc.kernels.qlinear_marlin.qlinear_marlin`.
        bias: ``(n,)`` of the dtype of ``rows``, or None.
    """
    rows = aligned(rows)
    tokens = rows.shape[0]
    row_blocks, columns = packed.shape[:2]
    out = rows.new_empty(tokens, n)
    pair(tiling, group, rows.dtype, bfloat16_scales, rows.device).launch(
        (tiling.blocks(row_blocks, tokens),),
        (_THREADS,),
        (
            tensor_map(rows, tiling.tokens, 64),
            *(out.data_ptr(), packed.data_ptr(), 0 if bias is None else bias.data_ptr()),
            *(tokens, n, columns, -(-tokens // tiling.tokens)),
        ),
    )
    return out
