"""The wgmma kernels on the CPU: as their launches would run them, on :class:`.marlin_problem.Problem`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from awqc.kernels.aligned import aligned
from awqc.kernels.marlin_parts import Parts
from tests.kernels.marlin_problem import Problem
from tests.kernels.on_host import Memory, compiled

_ENTRY = """
extern "C" int run(unsigned blocks, int together, const u16* x, int width, u16* y, const u8* packed,
    const u16* bias, float4* partials, u64* flags, int tokens, int n, int row_blocks, int k_blocks,
    int waves) {
  const u64 tag = 77;
  const TensorMap x_map = {x, width, tokens, TOKENS};
  const int token_tiles = (tokens + TOKENS - 1) / TOKENS;
  const auto block = [=] { %s; };
  make_clusters(blocks, 2 * CONSUMERS);
  if (together) return launch_together(blocks, CONSUMERS + 128, block);
  launch({blocks, 1, 1}, CONSUMERS + 128, block);
  return 0;
}
"""


def multiply_on_host(
    file: str,
    call: str,
    macros: Mapping[str, int],
    of: Problem,
    blocks: int,
    *,
    together: bool,
    parts: Parts = Parts(),  # noqa: B008
    waves: int = 0,
) -> Tensor:
    """``of.x @ of.weight.T + of.bias``; flags are found to be cleared, and blocks to end.

    Args:
        file: the kernel's.
        call: of the kernel, of what ``run`` above has.
        blocks: of the grid, which run one after the other, or ``together`` in a process each.
        parts: what they leave for each other, which begins as NaN.
    """
    kernels = compiled(file, _ENTRY % call, "unsigned char", **macros)
    x = aligned(of.x)
    tokens, n = x.shape[0], of.weight.shape[0]
    flags = Memory(kernels, torch.zeros(parts.flags, dtype=torch.int64))
    partials = Memory(kernels, torch.full((parts.sums // 4,), torch.nan))
    out = Memory(kernels, torch.full((tokens, n), torch.nan, dtype=x.dtype))
    kept = [Memory(kernels, tensor) for tensor in (x, of.packed, of.bias)]
    failed = kernels.run(
        *(blocks, together, kept[0].pointer, x.shape[1], out.pointer, kept[1].pointer, kept[2].pointer),
        *(partials.pointer, flags.pointer, tokens, n, *of.packed.shape[:2], waves),
    )
    assert not failed
    assert not flags.read().any()
    return out.read()
