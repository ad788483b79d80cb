"""``awqc::qlinear_marlin``: the linear on a quantized weight on NVIDIA tensor cores, Ampere and later.

One packed weight (:mod:`awqc.kernels.marlin_layout`) serves every number of tokens M:

* small M: ``marlin_small.cu`` streams the packed weight once for every 16 tokens, bound by memory;
* large M: the weight is written out dense (``marlin_dequantize.cu``) and the matrix product is cuBLAS's.

Sums are taken in float32, in an order that the shape alone decides: the same input gives the same bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from awqc.kernels import marlin_layout as layout
from awqc.kernels.cuda_launch import CudaKernel, kernel
from awqc.kernels.qlinear import LIBRARY
from awqc.kernels.registry import register_kernel

#: Most tokens for which the packed weight is streamed.
STREAMED_TOKENS = 64
#: Bytes of shared memory at the start of a streaming block that hold its barriers.
_BARRIERS = 512
#: Bytes of weights that a block has in flight, where two pieces a warp are fewer.
_RING_BYTES = 72 << 10
#: Bytes of a token's activations that go with a piece of weights: 128 channels, and 16 to keep banks apart.
_X_BYTES = 2 * layout.CHANNELS + 16
#: Rows of a strip.
_STRIP_ROWS = layout.ROWS // layout.STRIPS

LIBRARY.define(
    "qlinear_marlin(Tensor x, Tensor packed, Tensor? bias, int out_features, int group, "
    "bool bfloat16_scales) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


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
        ring = self.warps * self.depth * (self.strips * layout.strip_bytes(group) + tokens * _X_BYTES)
        rows = self.strips * _STRIP_ROWS
        parts = self.warps * tokens * (rows + 4) * 4
        per_rank = -(-tokens * rows // (32 * self.split)) * 32
        gathered = self.split * self.rounds * per_rank * 4 if self.split > 1 else 0
        return _BARRIERS + (max(ring, parts) if self.rounds == 1 else ring + parts) + gathered

    def occupied_bytes(self, tokens: int, group: int, limit: int) -> int:
        """What a block asks for: more than half of what there is. Two to a processor, where the next launch
        begins beside this one, would leave other processors without work."""
        return max(self.shared_bytes(tokens, group), limit // 2 + 2048)


@dataclass(frozen=True)
class Stream:
    """The launch of ``marlin_small.cu`` for one shape.

    Args:
        main: sums over a share of the rows and of the input channels.
        join: sums over the shares of the channels, where these are not a cluster.
        tiling: how the weight is cut.
        blocks: of the grid.
    """

    main: CudaKernel
    join: CudaKernel | None
    tiling: Tiling
    blocks: int


def tile(rows: int, columns: int, tokens: int, group: int, processors: int, limit: int) -> Tiling:
    """How to cut a weight of ``rows`` by ``columns`` blocks for ``tokens`` tokens, at most 16.

    Measured on an H200 (docs/kernels.md): every multiprocessor takes one share of the rows and all channels,
    unless more tokens than that make the activations, which every share reads, weigh as much as the weights;
    then two join over a longer share. Sums of many rows leave registers for eight warps, of few for sixteen.

    Args:
        processors: multiprocessors of the device.
        limit: bytes of shared memory that a block may have.
    """
    strips = rows * layout.STRIPS
    share = -(-strips // processors)
    split = 2 if tokens >= 8 and share <= 4 and columns >= 64 else 1
    share = -(-strips // (processors // split))
    token_tiles = -(-tokens // 8)
    rounds = -(-share // 8)
    at_once = -(-share // rounds)
    warps = 16 if at_once * token_tiles <= 4 and split == 1 else 8
    piece = warps * at_once * layout.strip_bytes(group)
    for depth in range(max(2, _RING_BYTES // piece), 0, -1):
        tiling = Tiling(warps=warps, strips=at_once, rounds=rounds, split=split, depth=min(depth, 4))
        if tiling.shared_bytes(tokens, group) <= limit:
            return tiling
    # Many tokens, small groups, little shared memory: fewer rows at a time.
    return Tiling(warps=4, strips=2, rounds=-(-share // 2), split=split, depth=2)


def has_bulk_copies(device: torch.device) -> bool:
    """Whether the device has what the Hopper paths are made of: bulk copies, clusters, dependent launches."""
    return torch.cuda.get_device_capability(device)[0] == 9


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
    properties = torch.cuda.get_device_properties(device)
    hopper = has_bulk_copies(device)
    limit = properties.shared_memory_per_block_optin
    tiling = tile(rows, columns, tokens, group, properties.multi_processor_count, limit)
    defines: dict[str, int | str] = {
        "BF16": int(dtype == torch.bfloat16),
        "SCALE_BF16": int(bfloat16_scales),
        "GROUP": group,
        "TOKENS": 8 if tokens <= 8 else 16,
        "WARPS": tiling.warps,
        "STRIPS": tiling.strips,
        "ROUNDS": tiling.rounds,
        "SPLIT": tiling.split,
        "DEPTH": tiling.depth,
        "HOPPER": int(hopper),
    }
    main = kernel(
        "marlin_small.cu",
        "small",
        "PPPPPiiiii",
        device,
        shared=tiling.occupied_bytes(tokens, group, limit),
        cluster=tiling.split if hopper else 1,
        dependent=hopper,
        **defines,
    )
    join = None
    if tiling.split > 1 and not hopper:
        join = kernel("marlin_small.cu", "join", "PPPii", device, **defines)
    return Stream(main, join, tiling, tiling.blocks(rows * layout.STRIPS))


def qlinear_marlin(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, group: int, bfloat16_scales: bool
) -> Tensor:
    """``x @ W.T + bias`` for ``x`` ``(..., K)`` of any floating dtype and strides; ``(..., N)`` like ``x``.

    Activations that are neither float16 nor bfloat16 are rounded to bfloat16.

    Args:
        packed: ``(ceil(N / 64), ceil(K / 128), 4, bytes)`` uint8, of :func:`awqc.kernels.marlin_layout.pack`.
        bias: ``(N,)`` floating, or None.
        out_features: N.
        group: channels that share a scale within a block: 32, 64 or 128.
        bfloat16_scales: whether packed scales are bfloat16 rather than float16.
    """
    dtype = x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    rows = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
    if bias is not None:
        bias = bias.to(dtype)
    tokens = rows.shape[0]
    if tokens <= STREAMED_TOKENS:
        out = _streamed(rows, packed, bias, out_features, group, bfloat16_scales)
    else:
        weight = dequantize(packed, out_features, x.shape[-1], group, bfloat16_scales, dtype)
        out = F.linear(rows, weight, bias)
    return out.to(x.dtype).view(*x.shape[:-1], out_features)


def _streamed(
    rows: Tensor, packed: Tensor, bias: Tensor | None, n: int, group: int, bfloat16_scales: bool
) -> Tensor:
    # Activations are copied 16 bytes at a time.
    if rows.shape[1] % 8:
        rows = F.pad(rows, (0, -rows.shape[1] % 8))
    if rows.data_ptr() % 16:
        rows = rows.clone()
    tokens, k = rows.shape
    out = rows.new_empty(tokens, n)
    if not tokens:
        return out
    # Launches change with powers of two only.
    most = min(1 << (tokens - 1).bit_length(), 16)
    launch = stream(packed.shape[0], packed.shape[1], most, group, rows.dtype, bfloat16_scales, rows.device)
    own_bias = 0 if bias is None else bias.data_ptr()
    partials = 0
    if launch.join is not None:
        sums = torch.empty(launch.tiling.split, tokens, n, dtype=torch.float32, device=rows.device)
        partials = sums.data_ptr()
    launch.main.launch(
        (launch.blocks, -(-tokens // 16)),
        (launch.tiling.warps * 32,),
        (
            *(out.data_ptr(), rows.data_ptr(), packed.data_ptr(), own_bias, partials),
            *(tokens, n, k, packed.shape[0] * layout.STRIPS, packed.shape[1]),
        ),
    )
    if launch.join is not None:
        launch.join.launch(
            (-(-tokens * n // 256),), (256,), (out.data_ptr(), partials, own_bias, tokens * n, n)
        )
    return out


def dequantize(
    packed: Tensor, n: int, k: int, group: int, bfloat16_scales: bool, dtype: torch.dtype
) -> Tensor:
    """The packed weight as ``(n, k)`` in ``dtype``, float16 or bfloat16, rounded once."""
    out = torch.empty(n, k, dtype=dtype, device=packed.device)
    defines = {"BF16": int(dtype == torch.bfloat16), "SCALE_BF16": int(bfloat16_scales), "GROUP": group}
    run = kernel("marlin_dequantize.cu", "dequantize", "PPiii", packed.device, **defines)
    grid = (packed.shape[1], packed.shape[0])
    run.launch(grid, (128,), (out.data_ptr(), packed.data_ptr(), n, k, packed.shape[1]))
    return out


LIBRARY.impl("qlinear_marlin", qlinear_marlin, "CUDA")


@torch.library.register_fake("awqc::qlinear_marlin", lib=LIBRARY)
def _(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, group: int, bfloat16_scales: bool
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@register_kernel("qlinear")
class Marlin:
    """The tensor-core kernels: their limits, and the packed form both ways."""

    op: ClassVar[torch._ops.OpOverload] = torch.ops.awqc.qlinear_marlin.default

    @staticmethod
    def legal(
        n: int, k: int, bits: int, group_size: int, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Why this kernel cannot run a weight ``(n, k)``, in one line; None if it can."""
        if device.type != "cuda" or torch.version.hip is not None:
            return f"runs on NVIDIA GPUs, not on {device}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"multiplies float16 or bfloat16 activations, not {dtype}"
        if bits > 4:
            return f"holds codes of at most 4 bits, not {bits}"
        if layout.kernel_group(group_size, k) is None:
            return (
                f"needs groups of 32, 64, a multiple of 128, or all input channels, not {group_size} of {k}"
            )
        if torch.cuda.get_device_capability(device) < (8, 0):
            found = ".".join(map(str, torch.cuda.get_device_capability(device)))
            return f"needs compute capability 8.0 or higher, not {found}"
        return None

    @staticmethod
    def pack(
        codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, bits: int, group_size: int
    ) -> tuple[dict[str, Tensor | None], tuple[int, int, bool]]:
        """The op's tensors by argument name, and its constants.

        Args:
            codes: ``(N, K)`` uint8 below ``2 ** bits``.
            scales, zeros: ``(N, G)``; scales that are neither float16 nor bfloat16 are rounded to float16.
            bias: ``(N,)`` or None.
            bits: at most 4.
            group_size: of the codes.
        """
        if scales.dtype not in (torch.float16, torch.bfloat16):
            scales = scales.to(torch.float16)
        group = layout.kernel_group(group_size, codes.shape[1])
        assert group is not None, "pack() is for legal shapes"
        tensors = {"packed": layout.pack(codes, scales, zeros, group_size), "bias": bias}
        return tensors, (codes.shape[0], group, scales.dtype == torch.bfloat16)
