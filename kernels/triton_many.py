"""A quantized linear in Triton for many tokens on Hopper: ``jit/many_gluon.py``, and how it is cut.

Its language, Gluon, comes with Triton and may change with it: it is used with versions that were tried.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from awqc.kernels.hardware import Hardware
from awqc.kernels.planes import PLANES, ROWS
from awqc.kernels.triton_call import Call, Tiles, interpreted
from awqc.kernels.triton_weight import Weight

#: Fewest tokens that it is for, on the H200: see docs/kernels.md.
FEWEST = 17
#: Versions of Triton that it was tried with: the first, and the last.
VERSIONS = ((3, 6), (3, 9))
#: Rows of a tile, and warps of a program: two warpgroups with 64 rows each.
_ROWS, _WARPS = ROWS, 8
#: Blocks of words on their way.
_WORDS_STAGES = 2
#: Channels that are multiplied while those after them are dequantized.
_PART = 32
#: Tiles of rows that are multiplied with all tokens before the next ones are.
_HEIGHT = 16
#: Tokens of a tile that one program adds the shares of.
_JOINED = 16
#: Microseconds of a launch, of what begins and ends a program, and of the sums of a share of 256 tokens.
_LAUNCH, _ENDS, _JOIN = 2.0, 2.0, 0.08
#: Most shares of a tile.
_SHARES = 8
#: Bytes of a program's barriers, at most.
_BARRIERS = 1024
#: Registers of a processor.
_REGISTERS = 65536


@dataclass(frozen=True)
class ManyTile:
    """A launch configuration of ``gemm_many``.

    Args:
        block_m: tokens of a tile.
        stages, planes: activations on their way: stages, and planes of each.
        programs: as many as a processor holds at a time.
        alone, together: microseconds for 256 channels on an H200: of a program that has a processor for
            itself, and of as many as it holds.
    """

    block_m: int
    stages: int
    planes: int
    programs: int
    alone: float
    together: float

    def shared_bytes(self, width: int) -> int:
        """Shared memory of a program for planes of ``width`` channels, but for its barriers."""
        ring = self.stages * self.planes * self.block_m + _WORDS_STAGES * _ROWS
        return max(2 * width * ring, 4 * self.block_m * _ROWS)

    def time(self, programs: int, blocks: float, processors: int) -> float:
        """Microseconds of ``programs`` with ``blocks`` of 256 channels each."""
        rounds, rest = divmod(programs, processors * self.programs)
        last = self.together if rest > processors else self.alone
        return rounds * (self.together * blocks + _ENDS) + (last * blocks + _ENDS if rest else 0)


#: Tiles to choose from.
TILES = (
    ManyTile(256, 4, 1, 1, alone=2.45, together=2.45),
    ManyTile(128, 6, 1, 1, alone=1.45, together=1.45),
    ManyTile(64, 3, 2, 2, alone=1.15, together=2.1),
    ManyTile(32, 4, 2, 2, alone=0.9, together=1.65),
)


@dataclass(frozen=True)
class Cut:
    """Who does what of a product.

    Args:
        tile: its configuration.
        tiles: of the product.
        whole: tiles that have one program.
        shares: programs of each of the others.
    """

    tile: ManyTile
    tiles: int
    whole: int
    shares: int

    @property
    def shared(self) -> int:
        """Tiles of several programs."""
        return self.tiles - self.whole

    @property
    def programs(self) -> int:
        """Programs of the product."""
        return self.whole + self.shared * self.shares

    def time(self, blocks: float, processors: int) -> float:
        """How many microseconds it takes for ``blocks`` of 256 channels, fitted to what an H200 took."""
        whole = self.tile.time(self.whole, blocks, processors) + _LAUNCH
        if not self.shared:
            return whole
        shared = self.tile.time(self.shared * self.shares, blocks / self.shares, processors) + _LAUNCH
        return whole + shared + _JOIN * self.shared * self.shares * self.tile.block_m / 256


def cuts(tile: ManyTile, m: int, n: int, blocks: int, processors: int) -> Iterator[Cut]:
    """Ways to cut a product: tiles that do not fill the processors may be shared out."""
    tiles = math.ceil(m / tile.block_m) * math.ceil(n / _ROWS)
    left = tiles % (processors * tile.programs)
    yield Cut(tile, tiles, tiles, 1)
    for shares in range(2, min(_SHARES, blocks) + 1) if left else ():
        yield Cut(tile, tiles, tiles - left, shares)


def missing(weight: Weight, at: Hardware) -> str | None:
    """Why the product with ``weight`` cannot be this one on ``at``, in one line; None if it can."""
    return "has no interpreter" if interpreted() else _missing(weight.packed.shape[-1], at)


@functools.cache
def _missing(width: int, at: Hardware) -> str | None:
    if not at.has_bulk_copies:
        return "needs compute capability 9.0"
    if width < _PART:
        return f"needs groups of a multiple of {_PART} channels"
    if at.shared_bytes < max(tile.shared_bytes(width) for tile in TILES) + _BARRIERS:
        return f"needs more shared memory than {at.shared_bytes} bytes"
    return _other_triton(_triton_version())


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def _other_triton(version: str) -> str | None:
    if VERSIONS[0] <= tuple(int(part) for part in version.split(".")[:2]) <= VERSIONS[1]:
        return None
    first, last = (".".join(map(str, tried)) for tried in VERSIONS)
    return f"was tried with Triton {first} to {last}, not with {version}"


def fastest(m: int, weight: Weight, at: Hardware) -> Cut | None:
    """The fastest cut for ``m`` tokens; None where something is missing, for few tokens, and where it is
    faster to write the weight out."""
    if m < FEWEST or missing(weight, at) is not None:
        return None
    blocks, _, width = weight.packed.shape
    return _fastest(m, weight.n, weight.k, blocks, width, at)


@functools.lru_cache(maxsize=4096)
def _fastest(m: int, n: int, k: int, blocks: int, width: int, at: Hardware) -> Cut | None:
    every = [cut for tile in TILES for cut in cuts(tile, m, n, blocks, at.processors)]
    of_256 = blocks * PLANES * width / 256
    cut = min(every, key=lambda cut: cut.time(of_256, at.processors))
    if at.read_rate is None or at.product_rate is None:
        return cut
    # Of many tokens power is what limits these products, and those of the BLAS.
    slower, share = (1.28, 0.7) if m >= 1024 else (1.1, 0.75)
    written, multiplied = 2.5 * n * k / (0.82 * at.read_rate), 2 * m * n * k / (share * at.product_rate)
    dense = 1e6 * (written + multiplied) + 3 * _LAUNCH
    return cut if slower * cut.time(of_256, at.processors) < dense else None


def product(x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor, cut: Cut) -> list[Call]:
    """The calls that write ``x @ W.T + bias`` to ``y`` ``(M, N)``, for ``x`` ``(M, K)`` of ``aligned``."""
    from awqc.kernels.jit.many_gluon import add_tiles, gemm_many

    tile, width = cut.tile, weight.packed.shape[-1]
    assert width % _PART == 0, "product() is for weights that miss nothing"
    block = (tile.block_m, _ROWS)
    partial = x.new_empty(cut.shared, cut.shares, *block, dtype=torch.float32) if cut.shared else x
    place = {"m": x.shape[0], "n": weight.n, "whole": cut.whole, "shares": cut.shares, "height": _HEIGHT}
    sizes = {"block_m": tile.block_m, "block_n": _ROWS, "has_bias": bias is not None}
    common: dict[str, Any] = {
        "partial_ptr": partial,
        "bias_ptr": x if bias is None else bias,
        "y_ptr": y,
        **place,
        **sizes,
        "launch_pdl": True,
    }
    limit = {} if tile.programs == 1 else {"maxnreg": _REGISTERS // (32 * _WARPS * tile.programs)}
    arguments = {
        "x_desc": Tiles(x, (tile.block_m, width)),
        "words_desc": Tiles(weight.packed.view(-1, width), (_ROWS, width)),
        "scales_ptr": weight.scales,
        "zeros_ptr": weight.zeros,
        **common,
        "y_ptr": y if cut.whole else x,
        "rows": weight.packed.shape[-2],
        "groups": weight.scales.shape[-2],
        "blocks": weight.packed.shape[-3],
        "group": weight.group,
        "run": weight.run,
        "width": width,
        "stages": tile.stages,
        "planes": tile.planes,
        "words_stages": _WORDS_STAGES,
        "part": _PART,
        "shared": cut.shared > 0,
        "num_warps": _WARPS,
        **limit,
    }
    written = ("y_ptr",) * (cut.whole > 0) + ("partial_ptr",) * (cut.shared > 0)
    call = Call(gemm_many, (cut.programs,), arguments, written)
    if not cut.shared:
        return [call]
    grid = (cut.shared, math.ceil(tile.block_m / _JOINED))
    return [call, Call(add_tiles, grid, {**common, "block": _JOINED, "num_warps": 4})]
