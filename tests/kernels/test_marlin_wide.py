"""The kernel for many tokens, without a GPU: its tilings, and that it compiles as it is meant to."""

from __future__ import annotations

import pytest

from awqc.kernels import nvrtc
from awqc.kernels.cuda_launch import read_source
from awqc.kernels.marlin_wide import TILE_TOKENS, tile

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
    for group, split, scales in ((32, 1, 1), (64, 2, 0), (128, 4, 1), (128, 8, 0)):
        defines = {"BF16": bfloat16, "SCALE_BF16": scales, "TOKENS": tokens, "SPLIT": split, "STAGES": 3}
        options = [*flags, f"-DGROUP={group}", *(f"-D{key}={value}" for key, value in defines.items())]
        _, log = nvrtc.compile_with_log(read_source("marlin_wide.cu"), options, "marlin_wide.cu")
        assert "Potential Performance Loss" not in log
        assert "0 bytes spill stores" in log
