"""The kernel for many tokens, without a GPU: its tilings, and that it compiles as it is meant to."""

from __future__ import annotations

import pytest
import torch

from awqc.kernels import marlin_layout as layout
from awqc.kernels import marlin_wide, nvrtc
from awqc.kernels.cuda_launch import read_source
from awqc.kernels.marlin_wide import TILE_TOKENS, WideTiling, tile
from awqc.kernels.qlinear import dequantize

LIMIT = 227 << 10


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 3, 16, 64, 224, 2004])
def test_every_tiling_fits(rows: int, group: int) -> None:
    for columns in (1, 3, 32, 224):
        for tokens in (17, 32, 64, 100, 128, 256, 300, 4096):
            tiling = tile(rows, columns, tokens, group, 132, LIMIT)
            assert tiling.tokens in TILE_TOKENS
            assert tiling.shared_bytes(group) <= LIMIT
            assert tiling.split <= columns
            assert tiling.stages >= 2
            if tiling.split > 1:
                assert tiling.blocks(rows, tokens) <= 132


@pytest.mark.skipif(not nvrtc.available(), reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("bfloat16", [0, 1])
@pytest.mark.parametrize("tokens", TILE_TOKENS)
def test_the_kernel_compiles_without_spills_and_waits(tokens: int, bfloat16: int) -> None:
    """The compiler says so when it has to wait for each matrix product, or to keep registers in memory."""
    flags = ["--gpu-architecture=sm_90a", "--std=c++17", "--ptxas-options=-v"]

    def compiles(group: int, split: int, scales: int, row_blocks: int) -> None:
        defines = {"BF16": bfloat16, "SCALE_BF16": scales, "TOKENS": tokens, "SPLIT": split, "STAGES": 3}
        defines |= {"GROUP": group, "ROW_BLOCKS": row_blocks}
        options = [*flags, *(f"-D{key}={value}" for key, value in defines.items())]
        _, log = nvrtc.compile_with_log(read_source("marlin_wide.cu"), options, "marlin_wide.cu")
        assert "Potential Performance Loss" not in log
        assert "0 bytes spill stores" in log

    for group, split, scales in ((32, 1, 1), (64, 2, 0), (128, 4, 1), (128, 8, 0)):
        for row_blocks in (2, 4) if tokens <= 64 else (2,):
            compiles(group, split, scales, row_blocks)


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "expected"),
    [
        (128, 224, 32, (4, 4)),
        (128, 224, 64, (4, 4)),
        (128, 224, 128, (2, 2)),
        (64, 112, 32, (2, 4)),
        (224, 32, 64, (2, 1)),
    ],
)
def test_how_products_are_cut(rows: int, columns: int, tokens: int, expected: tuple[int, int]) -> None:
    tiling = tile(rows, columns, tokens, 128, 132, LIMIT)
    assert (tiling.row_blocks, tiling.split) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", TILE_TOKENS)
@pytest.mark.parametrize(
    ("n", "k", "m", "split"),
    [
        (4096, 4096, 512, 2),
        (200, 520, 70, 4),
        (200, 1160, 70, 1),
        (128, 256, 300, 2),
        (300, 256, 90, 1),
        (1000, 14336, 33, 8),  # more blocks than there are parts of a tile of 32 tokens
    ],
)
def test_more_rows_change_no_bit(
    n: int, k: int, m: int, split: int, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of a sum are added first to last, whoever adds them; the same bits every time."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(n, -(-k // 64), device="cuda") * 0.02 + 0.01).half()
    packed = layout.pack(codes, scales, torch.full_like(scales, 7).byte(), 64)
    x, bias = torch.randn(m, k, device="cuda").to(dtype), torch.randn(n, device="cuda").to(dtype)
    found = []
    for row_blocks in (2, 4) if tokens <= 64 else (2,):
        tiling = next(
            fitting
            for stages in (5, 4, 3, 2)
            if (fitting := WideTiling(tokens, split, stages, row_blocks)).shared_bytes(64) <= LIMIT
        )
        monkeypatch.setattr(marlin_wide, "tile", lambda *_, tiling=tiling: tiling)
        marlin_wide.wide.cache_clear()
        found += [marlin_wide.multiply(x, packed, bias, n, 64, False) for _ in range(3)]
    marlin_wide.wide.cache_clear()
    assert all(torch.equal(other, found[0]) for other in found)
    weight = dequantize(codes, scales, torch.full_like(scales, 7), 64, torch.float64)
    want = x.double() @ weight.t() + bias.double()
    assert (found[0].double() - want).norm() < torch.finfo(dtype).eps * want.norm()
