"""A quantized linear for many tokens on Hopper, by blocks that stay for several tiles: ``marlin_many.cu``."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product

import torch
from torch import Tensor

from awqc.kernels import marlin_layout as layout
from awqc.kernels.aligned import aligned
from awqc.kernels.cuda_launch import CudaKernel, kernel, tensor_map
from awqc.kernels.hardware import Hardware, hardware
from awqc.kernels.launch import Launch, nbytes
from awqc.kernels.machine_code import CudaCode
from awqc.kernels.marlin_parts import Parts

#: Threads of a block: two warpgroups that multiply, and one that copies.
_THREADS = 384
#: Blocks of 64 rows of a tile.
_ROW_BLOCKS = 2
#: Flags of a block: for both threads that copy its sums, from both warpgroups that leave them.
_FLAGS = 4
#: Tokens of a tile.
TILE_TOKENS = (32, 64, 128, 256)
#: Tokens up to which ``marlin_wide.cu`` has a tile for all.
_WIDE_TOKENS = 128
#: Bytes for the alignment of a block's shared memory.
_ALIGNMENT = 1024
#: Blocks of a weight that the L2 cache holds.
_CACHED_BLOCKS = 14000


@dataclass(frozen=True)
class ManyTiling:
    """How ``marlin_many.cu`` cuts a product; the names of the first two are those of its macros.

    Args:
        tokens: of a tile.
        stages: of 128 channels in flight.
        form: ``whole``: a tile has one block; ``shared``: several, where that gives all blocks as much to do;
            ``cluster``: two, of one cluster.
    """

    tokens: int
    stages: int
    form: str

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return 2 if self.form == "cluster" else 1

    def shared_bytes(self, group: int) -> int:
        """Shared memory of a block: the ring, and barriers."""
        weights = _ROW_BLOCKS * layout.STRIPS * layout.strip_bytes(group)
        stage = self.tokens * 2 * layout.CHANNELS + -(-weights // _ALIGNMENT) * _ALIGNMENT
        return _ALIGNMENT + self.stages * (stage + 24)

    def tiles(self, row_blocks: int, tokens: int) -> int:
        """Tiles of ``row_blocks`` blocks of 64 rows and ``tokens`` tokens."""
        return -(-row_blocks // _ROW_BLOCKS) * -(-tokens // self.tokens)

    def shares(self, row_blocks: int, columns: int, tokens: int, processors: int) -> Shares:
        """Who does what of a weight of ``row_blocks`` by ``columns`` blocks with ``tokens`` tokens."""
        tiles = self.tiles(row_blocks, tokens)
        if self.form == "cluster":
            return Shares(2 * tiles, 0, tiles, columns)
        if self.form == "whole":
            blocks = min(processors, tiles)
            return Shares(blocks, -(-tiles // blocks), tiles, columns)
        if 2 * tiles <= processors:
            return Shares(tiles * min(processors // tiles, columns), 0, tiles, columns)
        # Shares are of one to two tiles: a tile has two blocks at most, and the second came to it first.
        return Shares(processors, max(0, tiles // processors - 1), tiles, columns)


@dataclass(frozen=True)
class Shares:
    """Which steps of which tiles each block takes: ``marlin_share.cuh`` in Python.

    Args:
        blocks: of the grid.
        waves: tiles that every block takes whole, one of each wave.
        tiles: of the product; those after the waves are one row of steps, of which each block has a share.
        steps: of a tile.
    """

    blocks: int
    waves: int
    tiles: int
    steps: int

    def __post_init__(self) -> None:
        assert self.blocks * max(0, self.left) * self.steps < 2**31, self

    @property
    def left(self) -> int:
        """Tiles after the waves."""
        return self.tiles - self.waves * self.blocks

    def first(self, block: int) -> int:
        """Where the share of ``block`` begins, in steps from that of the first tile left."""
        return block * self.left * self.steps // self.blocks if self.left > 0 else 0

    def pieces(self, block: int) -> Iterator[tuple[int, int, int]]:
        """Tile, first step and end of what ``block`` does, in its order."""
        for wave in range(self.waves):
            if (tile := wave * self.blocks + block) < self.tiles:
                yield tile, 0, self.steps
        at, end = self.first(block), self.first(block + 1)
        while at < end:
            tile, begin = divmod(at, self.steps)
            stop = min(self.steps, begin + end - at)
            yield self.waves * self.blocks + tile, begin, stop
            at += stop - begin

    def others(self, block: int, tile: int) -> list[int]:
        """Whose sums ``block``, which has the first steps of ``tile``, adds to its own, in order."""
        end = (tile - self.waves * self.blocks + 1) * self.steps
        after = range(block + 1, self.blocks)
        return [b for b in after if self.first(b) < end and self.first(b) < self.first(b + 1)]

    @property
    def joins(self) -> bool:
        """Whether a tile has several blocks."""
        return self.left > 0 and any(self.first(block) % self.steps for block in range(self.blocks))

    def parts(self, tiling: ManyTiling) -> Parts:
        """What blocks leave for each other: sums of a tile each, if any, and flags."""
        if tiling.form == "cluster" or not self.joins:
            return Parts()
        return Parts(self.blocks * _ROW_BLOCKS * layout.ROWS * tiling.tokens * 4, self.blocks * _FLAGS)


def fitting(tokens: int, form: str, group: int, limit: int) -> ManyTiling:
    """The tiling with as many stages as fit into ``limit`` bytes of shared memory."""
    tilings = (ManyTiling(tokens, stages, form) for stages in (6, 5, 4, 3, 2))
    return next(tiling for tiling in tilings if tiling.shared_bytes(group) <= limit)


def takes(row_blocks: int, columns: int, tokens: int, processors: int) -> bool:
    """Whether this kernel is the one for a weight of ``row_blocks`` by ``columns`` blocks and ``tokens``
    tokens: beyond 128 of them, and below where sharing the last of several rounds of tiles saves time."""
    if tokens > _WIDE_TOKENS:
        return True
    if -(-row_blocks // _ROW_BLOCKS) <= processors:
        return False
    whole, shared = (ManyTiling(_tile_tokens(tokens)[0], 2, form) for form in ("whole", "shared"))
    return _cost(shared, row_blocks, columns, tokens, processors) < _cost(
        whole, row_blocks, columns, tokens, processors
    )


def _tile_tokens(tokens: int) -> tuple[int, ...]:
    """Tiles that may be best for ``tokens`` tokens: the smallest that has them all, or the largest two."""
    return next(((size,) for size in TILE_TOKENS if tokens <= size <= _WIDE_TOKENS), TILE_TOKENS[-2:])


def tile(row_blocks: int, columns: int, tokens: int, group: int, processors: int, limit: int) -> ManyTiling:
    """How to cut the product of a weight of ``row_blocks`` by ``columns`` blocks with ``tokens`` tokens.

    Args:
        processors: multiprocessors of the device; each takes one block of the grid at a time.
        limit: bytes of shared memory that a block may have.
    """
    tilings = [
        tiling
        for size, form in product(reversed(_tile_tokens(tokens)), ("whole", "cluster", "shared"))
        if (tiling := fitting(size, form, group, limit)).form != "cluster"
        or 2 * tiling.tiles(row_blocks, tokens) <= processors
    ]
    return min(tilings, key=lambda t: _cost(t, row_blocks, columns, tokens, processors))


@dataclass(frozen=True)
class _Clocks:
    """What things take for tiles of one size, in clocks of a processor of an H200 (docs/kernels.md, 37).

    Args:
        step: 128 channels.
        store: what a tile takes to leave.
        exchange: of half of the sums in a cluster.
        join: of all sums with those of a block that ends at the same time.
        late: with those of a block that ended before, and to leave sums for another one.
    """

    step: int
    store: int
    exchange: int
    join: int
    late: int


_CLOCKS = {
    32: _Clocks(680, 800, 2000, 2500, 2000),
    64: _Clocks(850, 1000, 2500, 3000, 3000),
    128: _Clocks(1140, 1900, 3900, 4200, 5000),
    256: _Clocks(2050, 4400, 5900, 8500, 9500),
}


def _cost(tiling: ManyTiling, row_blocks: int, columns: int, tokens: int, processors: int) -> float:
    """Clocks from the first block's start to the last one's end, as far as tilings differ in them."""
    tiles, of = tiling.tiles(row_blocks, tokens), _CLOCKS[tiling.tokens]
    whole = of.step * columns + of.store
    if tiling.form == "whole":
        return -(-tiles // processors) * whole
    if tiling.form == "cluster":
        return of.step * -(-columns // 2) + of.exchange + of.store / 2
    if 2 * tiles <= processors:
        parts = min(processors // tiles, columns)
        return of.step * -(-columns // parts) + of.join * (parts - 1) + of.store
    waves = max(0, tiles // processors - 1)
    left = (tiles - waves * processors) / processors
    # Blocks at different channels read at different times, and from memory what the cache does not hold.
    apart = 1.04 if row_blocks * columns <= _CACHED_BLOCKS else 1.3
    return waves * whole + apart * left * of.step * columns + of.late + of.store


@dataclass(frozen=True)
class Many:
    """The launch of ``marlin_many.cu`` for one shape.

    Args:
        main: the kernel.
        tiling: how the product is cut.
        shares: who does what.
        parts: what blocks leave for each other.
    """

    main: CudaKernel
    tiling: ManyTiling
    shares: Shares
    parts: Parts


@functools.cache
def many(
    tiling: ManyTiling | None,
    row_blocks: int,
    columns: int,
    tokens: int,
    group: int,
    dtype: torch.dtype,
    bfloat16_scales: bool,
    device: torch.device,
) -> Many:
    """The launch for a weight of ``row_blocks`` by ``columns`` blocks, compiled and loaded, cut as ``tiling``
    says, or else :func:`tile`."""
    at = hardware(device)
    if tiling is None:
        tiling = tile(row_blocks, columns, tokens, group, at.processors, at.shared_bytes)
    main = kernel(
        "marlin_many.cu",
        "many",
        "128sPPPPPqiiiiii",
        device,
        shared=tiling.shared_bytes(group),
        cluster=tiling.cluster,
        dependent=True,
        **_macros(tiling, group, dtype, bfloat16_scales),
    )
    shares = tiling.shares(row_blocks, columns, tokens, at.processors)
    return Many(main, tiling, shares, shares.parts(tiling))


def _macros(tiling: ManyTiling, group: int, dtype: torch.dtype, bfloat16_scales: bool) -> dict[str, int]:
    return {
        "BF16": int(dtype == torch.bfloat16),
        "SCALE_BF16": int(bfloat16_scales),
        "GROUP": group,
        "TOKENS": tiling.tokens,
        "STAGES": tiling.stages,
        "CLUSTER": int(tiling.form == "cluster"),
    }


def _launch_tokens(tokens: int, tiling: ManyTiling | None = None) -> int:
    """The tokens that a launch is made for: it changes with tiles of tokens only."""
    size = tiling.tokens if tiling else _tile_tokens(tokens)[0]
    return -(-tokens // size) * size


def describe(
    at: Hardware, rows: Tensor, packed: Tensor, bias: Tensor | None, n: int, group: int, bfloat16_scales: bool
) -> list[Launch]:
    """The launch of :func:`multiply`."""
    tokens, (row_blocks, columns) = rows.shape[0], packed.shape[:2]
    tiling = tile(row_blocks, columns, _launch_tokens(tokens), group, at.processors, at.shared_bytes)
    shares = tiling.shares(row_blocks, columns, tokens, at.processors)
    left = shares.parts(tiling).nbytes
    return [
        Launch(
            "marlin_many.cu:many",
            nbytes(rows, packed, bias) + left,
            tokens * n * rows.itemsize + left,
            grid=(shares.blocks,),
            block=(_THREADS,),
            shared=tiling.shared_bytes(group),
            cluster=tiling.cluster,
            config=asdict(tiling) | {"waves": shares.waves},
            code=CudaCode("marlin_many.cu", "many", _macros(tiling, group, rows.dtype, bfloat16_scales)),
        )
    ]


def multiply(
    rows: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    n: int,
    group: int,
    bfloat16_scales: bool,
    tiling: ManyTiling | None = None,
) -> Tensor:
    """``rows @ W.T + bias`` for ``rows`` ``(M, K)`` float16 or bfloat16, contiguous; ``(M, n)``.

    Args:
        packed, group, bfloat16_scales: of :func:`awqc.kernels.qlinear_marlin.qlinear_marlin`.
        bias: ``(n,)`` of the dtype of ``rows``, or None.
        tiling: other than that of :func:`tile`.
    """
    rows = aligned(rows)
    tokens = rows.shape[0]
    row_blocks, columns = packed.shape[:2]
    whole = _launch_tokens(tokens, tiling)
    launch = many(tiling, row_blocks, columns, whole, group, rows.dtype, bfloat16_scales, rows.device)
    out = rows.new_empty(tokens, n)
    parts = launch.parts.allocate(rows.device)
    launch.main.launch(
        (launch.shares.blocks,),
        (_THREADS,),
        (
            tensor_map(rows, launch.tiling.tokens, 64),
            *(out.data_ptr(), packed.data_ptr(), 0 if bias is None else bias.data_ptr()),
            *launch.parts.arguments(parts),
            *(tokens, n, row_blocks, columns, -(-tokens // launch.tiling.tokens), launch.shares.waves),
        ),
    )
    return out
