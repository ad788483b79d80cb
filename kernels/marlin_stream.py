"""A quantized linear for few tokens: ``marlin_small.cu``, which streams the packed weight once for every 16.

How a weight is cut for it is decided by its shape, the number of tokens (in powers of two) and the device.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from awqc.kernels import extension
from awqc.kernels import marlin_layout as layout
from awqc.kernels.aligned import aligned
from awqc.kernels.cuda_launch import CudaKernel, kernel, tensor_map
from awqc.kernels.hardware import Hardware, hardware
from awqc.kernels.launch import Launch, nbytes
from awqc.kernels.machine_code import CudaCode

#: Bytes of shared memory at the start of a streaming block: for its alignment, and for its barriers.
_BARRIERS = 2048
#: ``Weight`` of marlin_small.cu: packed, bias, residual, y, first strip, rows.
_WEIGHT = struct.Struct("@PPPPii")
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
        depth: pieces of weights that every warp has in flight.
    """

    warps: int
    strips: int
    rounds: int
    depth: int

    def blocks(self, strips: int) -> int:
        """Blocks of the grid for a weight of ``strips`` strips."""
        return -(-strips // (self.strips * self.rounds))

    def shared_bytes(self, tokens: int, group: int) -> int:
        """Shared memory of a block: barriers, rings, and the warps' sums."""
        activations = tile_tokens(tokens) * 2 * layout.CHANNELS
        ring = self.warps * self.depth * (self.strips * layout.strip_bytes(group) + activations)
        rows = self.strips * _STRIP_ROWS
        parts = self.warps * tile_tokens(tokens) * (rows + 4) * 4
        return _BARRIERS + (max(ring, parts) if self.rounds == 1 else ring + parts)

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
        hopper: whether it is the path of bulk copies.
    """

    main: CudaKernel
    tiling: Tiling
    blocks: int
    hopper: bool


def tile(
    rows: int,
    columns: int,
    tokens: int,
    group: int,
    processors: int,
    limit: int,
    *,
    gated: bool = False,
) -> Tiling:
    """How to cut a weight of ``rows`` by ``columns`` blocks for ``tokens`` tokens, at most 16.

    Measured on an H200 (docs/kernels.md): every multiprocessor takes one share of the rows and all channels.
    Sums of few rows leave registers for sixteen warps, which pay where there are channels for them.

    Args:
        processors: multiprocessors of the device.
        limit: bytes of shared memory that a block may have.
        gated: a block has as many strips of a second weight, ``rows`` are those of one.
    """
    width = 2 if gated else 1
    share = -(-rows * layout.STRIPS // processors)
    rounds = -(-share * width // 8)
    at_once = -(-share // rounds) * width
    warps = 16 if at_once * -(-tokens // 8) <= min(2, columns // 32) else 8
    for depth in (2, 1):
        tiling = Tiling(warps=warps, strips=at_once, rounds=rounds, depth=depth)
        if tiling.shared_bytes(tokens, group) <= limit:
            return tiling
    # Many tokens, small groups, little shared memory: fewer rows at a time.
    return Tiling(warps=4, strips=2, rounds=-(-share * width // 2), depth=2)


@functools.cache
def has_bulk_copies(device: torch.device) -> bool:
    """See :attr:`awqc.kernels.hardware.Hardware.has_bulk_copies`; kept, since every call asks."""
    return hardware(device).has_bulk_copies


class Problem(NamedTuple):
    """What decides the launch of ``marlin_small.cu``.

    Args:
        rows, columns: blocks of the weight; rows of all weights that are multiplied at once, or of the gate.
        tokens: at most 16.
        group: of the packed weight.
        dtype: of the activations.
        bfloat16_scales: of the packed weight.
        weights: that are multiplied at once.
        gated: the second of two weights is multiplied by SiLU of the first.
    """

    rows: int
    columns: int
    tokens: int
    group: int
    dtype: torch.dtype
    bfloat16_scales: bool
    weights: int = 1
    gated: bool = False

    def tiling(self, at: Hardware) -> Tiling:
        """How the weights are cut on a device."""
        sizes = (self.rows, self.columns, self.tokens, self.group, at.processors, at.shared_bytes)
        return tile(*sizes, gated=self.gated)

    def blocks(self, tiling: Tiling) -> int:
        """Blocks of the grid."""
        return tiling.blocks(self.rows * layout.STRIPS * (2 if self.gated else 1))

    def macros(self, tiling: Tiling, hopper: bool) -> dict[str, int | str]:
        """Those of the source."""
        return {
            "BF16": int(self.dtype == torch.bfloat16),
            "SCALE_BF16": int(self.bfloat16_scales),
            "GROUP": self.group,
            "TOKENS": tile_tokens(self.tokens),
            "WARPS": tiling.warps,
            "STRIPS": tiling.strips,
            "ROUNDS": tiling.rounds,
            "DEPTH": tiling.depth,
            "HOPPER": int(hopper),
            "WEIGHTS": self.weights,
            "GATED": int(self.gated),
        }


@functools.cache
def stream(problem: Problem, device: torch.device) -> Stream:
    """The launch for ``problem``, compiled and loaded."""
    at = hardware(device)
    hopper, tiling = at.has_bulk_copies, problem.tiling(at)
    size = _WEIGHT.size * problem.weights
    main = kernel(
        "marlin_small.cu",
        "small",
        f"128s{size}siiii" if hopper else f"P{size}siiii",
        device,
        shared=tiling.occupied_bytes(problem.tokens, problem.group, at.shared_bytes),
        dependent=hopper,
        **problem.macros(tiling, hopper),
    )
    blocks = problem.blocks(tiling)
    if hopper and problem.weights == 1 + problem.gated:
        index = torch.cuda.current_device() if device.index is None else device.index
        own = (index, problem.dtype == torch.bfloat16, problem.bfloat16_scales, problem.group, problem.gated)
        key = (*own, problem.rows, problem.columns, problem.tokens)
        extension.plan(key, main.handle, blocks, 32 * tiling.warps, main.shared)
    return Stream(main, tiling, blocks, hopper)


def _launch_tokens(tokens: int) -> int:
    """The tokens that a launch is made for: it changes with powers of two only."""
    return min(1 << (tokens - 1).bit_length(), 16)


def describe(
    at: Hardware, rows: Tensor, packed: Tensor, bias: Tensor | None, n: int, group: int, bfloat16_scales: bool
) -> list[Launch]:
    """The launches of :func:`multiply`."""
    tokens, most = rows.shape[0], _launch_tokens(rows.shape[0])
    problem = Problem(packed.shape[0], packed.shape[1], most, group, rows.dtype, bfloat16_scales)
    tiling = problem.tiling(at)
    main = Launch(
        "marlin_small.cu:small",
        nbytes(rows, packed, bias),
        tokens * n * rows.itemsize,
        grid=(problem.blocks(tiling), -(-tokens // 16)),
        block=(tiling.warps * 32,),
        shared=tiling.occupied_bytes(most, group, at.shared_bytes),
        config=asdict(tiling),
        code=CudaCode("marlin_small.cu", "small", problem.macros(tiling, at.has_bulk_copies)),
    )
    return [main]


def multiply(
    rows: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    n: int,
    group: int,
    bfloat16_scales: bool,
    residual: Tensor | None = None,
) -> Tensor:
    """``rows @ W.T + bias + residual`` for ``rows`` ``(M, K)`` float16 or bfloat16, contiguous; ``(M, n)``.

    Args:
        packed, group, bfloat16_scales: of :func:`awqc.kernels.qlinear_marlin.qlinear_marlin`.
        bias: ``(n,)`` of the dtype of ``rows``, or None.
        residual: ``(M, n)`` contiguous, of the dtype of ``rows``, or None.
    """
    out = rows.new_empty(rows.shape[0], n)
    if rows.shape[0]:
        weight = (packed, bias, residual, out, n)
        problem = _problem(rows, packed.shape[0], packed, group, bfloat16_scales)
        _launch(rows, problem, [weight])
    return out


def multiply_all(
    rows: Tensor,
    packed: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    sizes: Sequence[int],
    group: int,
    bfloat16_scales: bool,
) -> list[Tensor]:
    """:func:`multiply` by several weights of as many channels in one launch: ``(M, n)`` for each size."""
    outs = [rows.new_empty(rows.shape[0], n) for n in sizes]
    if rows.shape[0]:
        weights = [(p, b, None, y, n) for p, b, y, n in zip(packed, biases, outs, sizes, strict=True)]
        total = sum(p.shape[0] for p in packed)
        _launch(rows, _problem(rows, total, packed[0], group, bfloat16_scales, weights=len(weights)), weights)
    return outs


def multiply_gated(
    rows: Tensor, gate: Tensor, up: Tensor, n: int, group: int, bfloat16_scales: bool
) -> Tensor:
    """``silu(rows @ gate.T) * (rows @ up.T)`` in one launch, rounded once: ``(M, n)``."""
    out = rows.new_empty(rows.shape[0], n)
    if rows.shape[0]:
        problem = _problem(rows, gate.shape[0], gate, group, bfloat16_scales, weights=2, gated=True)
        _launch(rows, problem, [(gate, None, None, out, n), (up, None, None, out, n)])
    return out


#: A weight of a launch: packed, bias, residual, result, rows.
_Operand = tuple[Tensor, "Tensor | None", "Tensor | None", Tensor, int]


def _problem(
    rows: Tensor, row_blocks: int, packed: Tensor, group: int, bfloat16_scales: bool, **fused: Any
) -> Problem:
    most = _launch_tokens(rows.shape[0])
    return Problem(row_blocks, packed.shape[1], most, group, rows.dtype, bfloat16_scales, **fused)


def _launch(rows: Tensor, problem: Problem, weights: Sequence[_Operand]) -> None:
    """Write the results of ``weights``."""
    rows = aligned(rows)
    tokens, k = rows.shape
    launch = stream(problem, rows.device)
    first, packed_weights = 0, b""
    for packed, bias, residual, out, n in weights:
        added = [0 if tensor is None else tensor.data_ptr() for tensor in (bias, residual)]
        packed_weights += _WEIGHT.pack(packed.data_ptr(), *added, out.data_ptr(), first, n)
        first += 0 if problem.gated else packed.shape[0] * layout.STRIPS
    grid, block = (launch.blocks, -(-tokens // 16)), (launch.tiling.warps * 32,)
    sizes = (tokens, problem.rows * layout.STRIPS, problem.columns)
    if launch.hopper:
        x = tensor_map(rows, problem.tokens, _HALF_CHANNELS)
        launch.main.launch(grid, block, (x, packed_weights, *sizes, problem.tokens))
        return
    launch.main.launch(grid, block, (rows.data_ptr(), packed_weights, *sizes, k))
