"""A quantized linear for few tokens: ``marlin_small.cu``, which streams the packed weight once for every 16.

How a weight is cut for it is decided by its shape, the number of tokens (in powers of two) and the device.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from awqc.kernels import marlin_layout as layout
from awqc.kernels.cuda_launch import CudaKernel, kernel, tensor_map
from awqc.kernels.hardware import Hardware, hardware
from awqc.kernels.launch import Launch, nbytes
from awqc.kernels.machine_code import CudaCode
from awqc.kernels.marlin_join import join, join_launch

#: Bytes of shared memory at the start of a streaming block: for its alignment, and for its barriers.
_BARRIERS = 2048
#: Whether sums of 16 activations are one product with ones rather than two: ``TURNED`` of marlin_block.cuh.
TURNED = 0
#: Channels of a row of 128 bytes, which is what copies swizzle.
_HALF_CHANNELS = 64
#: Rows of a strip.
_STRIP_ROWS = layout.ROWS // layout.STRIPS


@dataclass(frozen=True)
class Tiling:
    """How ``marlin_small.cu`` cuts a weight; the names are those of its macros.

    Args:
        warps: of a block; they take turns along the channels.
        strips: strips of 16 rows that a block works on at a time.
        rounds: times that it does.
        split: blocks, of one cluster where there are clusters, that share the channels of the same strips.
        depth: pieces of weights that every warp has in flight.
    """

    warps: int
    strips: int
    rounds: int
    split: int
    depth: int

    def blocks(self, strips: int) -> int:
        """Blocks of the grid for a weight of ``strips`` strips."""
        return -(-strips // (self.strips * self.rounds)) * self.split

    def shared_bytes(self, tokens: int, group: int) -> int:
        """Shared memory of a block: barriers, rings, the warps' sums, and those that the ranks exchange."""
        activations = tile_tokens(tokens) * 2 * layout.CHANNELS
        ring = self.warps * self.depth * (self.strips * layout.strip_bytes(group) + activations)
        rows = self.strips * _STRIP_ROWS
        parts = self.warps * tokens * (rows + 4) * 4
        per_rank = -(-tokens * rows // (32 * self.split)) * 32
        gathered = self.split * self.rounds * per_rank * 4 if self.split > 1 else 0
        return _BARRIERS + (max(ring, parts) if self.rounds == 1 else ring + parts) + gathered

    def occupied_bytes(self, tokens: int, group: int, limit: int) -> int:
        """What a block asks for: more than half of what there is. Two to a processor, where the next launch
        begins beside this one, would leave other processors without work."""
        return max(self.shared_bytes(tokens, group), limit // 2 + 2048)


def tile_tokens(tokens: int) -> int:
    """Tokens for which a block's shared memory and instructions are made."""
    return 8 if tokens <= 8 else 16


@dataclass(frozen=True)
class Stream:
    """The launch of ``marlin_small.cu`` for one shape.

    Args:
        main: the kernel.
        tiling: how the weight is cut.
        blocks: of the grid.
        hopper: whether it is the path of bulk copies and clusters.
    """

    main: CudaKernel
    tiling: Tiling
    blocks: int
    hopper: bool


def tile(rows: int, columns: int, tokens: int, group: int, processors: int, limit: int) -> Tiling:
    """How to cut a weight of ``rows`` by ``columns`` blocks for ``tokens`` tokens, at most 16.

    Measured on an H200 (docs/kernels.md): every multiprocessor takes one share of the rows and all channels,
    unless for more than 8 tokens half the channels of twice the rows are a share long enough to repay the
    joining. Sums of few rows leave registers for sixteen warps, which pay where there are channels for them.

    Args:
        processors: multiprocessors of the device.
        limit: bytes of shared memory that a block may have.
    """
    strips = rows * layout.STRIPS
    share = -(-strips // processors)
    split = 2 if tokens > 8 and share in (3, 4) and columns >= 64 else 1
    share = -(-strips // (processors // split))
    token_tiles = -(-tokens // 8)
    rounds = -(-share // 8)
    at_once = -(-share // rounds)
    warps = 16 if at_once * token_tiles <= 4 and columns >= 64 else 8
    for depth in (2, 1):
        tiling = Tiling(warps=warps, strips=at_once, rounds=rounds, split=split, depth=depth)
        if tiling.shared_bytes(tokens, group) <= limit:
            return tiling
    # Many tokens, small groups, little shared memory: fewer rows at a time.
    return Tiling(warps=4, strips=2, rounds=-(-share // 2), split=split, depth=2)


@functools.cache
def has_bulk_copies(device: torch.device) -> bool:
    """See :attr:`awqc.kernels.hardware.Hardware.has_bulk_copies`; kept, since every call asks."""
    return hardware(device).has_bulk_copies


@functools.cache
def stream(
    rows: int,
    columns: int,
    tokens: int,
    group: int,
    dtype: torch.dtype,
    bfloat16_scales: bool,
    device: torch.device,
) -> Stream:
    """The launch for a weight of ``rows`` by ``columns`` blocks and up to 16 tokens, compiled and loaded."""
    at = hardware(device)
    hopper, limit = has_bulk_copies(device), at.shared_bytes
    tiling = tile(rows, columns, tokens, group, at.processors, limit)
    defines = _macros(tiling, tokens, group, dtype, bfloat16_scales, hopper)
    main = kernel(
        "marlin_small.cu",
        "small",
        "128sPPPiiiii" if hopper else "PPPPPiiiii",
        device,
        shared=tiling.occupied_bytes(tokens, group, limit),
        cluster=tiling.split if hopper else 1,
        dependent=hopper,
        **defines,
    )
    return Stream(main, tiling, tiling.blocks(rows * layout.STRIPS), hopper)


def _macros(
    tiling: Tiling, tokens: int, group: int, dtype: torch.dtype, bfloat16_scales: bool, hopper: bool
) -> dict[str, int | str]:
    return {
        "BF16": int(dtype == torch.bfloat16),
        "SCALE_BF16": int(bfloat16_scales),
        "GROUP": group,
        "TOKENS": tile_tokens(tokens),
        "WARPS": tiling.warps,
        "STRIPS": tiling.strips,
        "ROUNDS": tiling.rounds,
        "SPLIT": tiling.split,
        "DEPTH": tiling.depth,
        "HOPPER": int(hopper),
        "TURNED": TURNED,
    }


def _launch_tokens(tokens: int) -> int:
    """The tokens that a launch is made for: it changes with powers of two only."""
    return min(1 << (tokens - 1).bit_length(), 16)


def describe(
    at: Hardware, rows: Tensor, packed: Tensor, bias: Tensor | None, n: int, group: int, bfloat16_scales: bool
) -> list[Launch]:
    """The launches of :func:`multiply`."""
    tokens, most = rows.shape[0], _launch_tokens(rows.shape[0])
    strips, columns, limit = packed.shape[0] * layout.STRIPS, packed.shape[1], at.shared_bytes
    tiling = tile(packed.shape[0], columns, most, group, at.processors, limit)
    joined = tiling.split > 1 and not at.has_bulk_copies
    out = tokens * n * rows.itemsize
    partial = tiling.split * tokens * n * 4
    main = Launch(
        "marlin_small.cu:small",
        nbytes(rows, packed, None if joined else bias),
        partial if joined else out,
        grid=(tiling.blocks(strips), -(-tokens // 16)),
        block=(tiling.warps * 32,),
        shared=tiling.occupied_bytes(most, group, limit),
        cluster=tiling.split if at.has_bulk_copies else 1,
        config=asdict(tiling),
        code=CudaCode(
            "marlin_small.cu",
            "small",
            _macros(tiling, most, group, rows.dtype, bfloat16_scales, at.has_bulk_copies),
        ),
    )
    return [main, join_launch(tiling.split, tokens, n, rows.dtype, bias, False)] if joined else [main]


def multiply(
    rows: Tensor, packed: Tensor, bias: Tensor | None, n: int, group: int, bfloat16_scales: bool
) -> Tensor:
    """``rows @ W.T + bias`` for ``rows`` ``(M, K)`` float16 or bfloat16, contiguous; ``(M, n)``.

    Args:
        packed, group, bfloat16_scales: of :func:`awqc.kernels.qlinear_marlin.qlinear_marlin`.
        bias: ``(n,)`` of the dtype of ``rows``, or None.
    """
    rows = aligned(rows)
    tokens, k = rows.shape
    out = rows.new_empty(tokens, n)
    if not tokens:
        return out
    most = _launch_tokens(tokens)
    launch = stream(packed.shape[0], packed.shape[1], most, group, rows.dtype, bfloat16_scales, rows.device)
    own_bias = 0 if bias is None else bias.data_ptr()
    sizes = (tokens, n, packed.shape[0] * layout.STRIPS, packed.shape[1])
    grid, block = (launch.blocks, -(-tokens // 16)), (launch.tiling.warps * 32,)
    if launch.hopper:
        x = tensor_map(rows, most, _HALF_CHANNELS)
        launch.main.launch(grid, block, (x, out.data_ptr(), packed.data_ptr(), own_bias, *sizes, most))
        return out
    split = launch.tiling.split
    partials = torch.empty(split, tokens, n, dtype=torch.float32, device=rows.device)
    pointers = (rows.data_ptr(), out.data_ptr(), packed.data_ptr(), own_bias, partials.data_ptr())
    launch.main.launch(grid, block, (*pointers, *sizes, k))
    if split > 1:
        join(out, partials, bias, dependent=False)
    return out


def aligned(rows: Tensor) -> Tensor:
    """``rows`` ``(M, K)`` with rows that begin at multiples of 16 bytes, as copies need; K may have grown by
    zeros."""
    if rows.shape[1] % 8:
        rows = F.pad(rows, (0, -rows.shape[1] % 8))
    return rows.clone() if rows.data_ptr() % 16 else rows
