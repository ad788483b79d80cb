"""The kernel for many tokens and few rows, without a GPU: when it is taken, and that it compiles."""

from __future__ import annotations

import pytest
import torch

from awqc.kernels import nvrtc
from awqc.kernels.cuda_launch import read_source
from awqc.kernels.marlin_pair import PairTiling, multiply, tile
from awqc.kernels.marlin_wide import TILE_TOKENS
from tests.kernels.marlin_problem import problem

LIMIT = 227 << 10


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "tile_tokens"),
    [
        (64, 32, 32, 32),
        (64, 32, 128, 128),
        (16, 32, 128, 32),
        (64, 32, 256, None),  # more blocks than processors
        (16, 32, 32, None),  # too few
        (64, 112, 64, None),  # long rows
        (64, 1, 64, None),  # nothing to share
    ],
)
def test_it_is_taken_where_its_blocks_are_as_many_as_the_processors(
    rows: int, columns: int, tokens: int, tile_tokens: int | None
) -> None:
    tiling = tile(rows, columns, tokens, 128, 132, LIMIT)
    assert (tiling and tiling.tokens) == tile_tokens


@pytest.mark.parametrize("group", [32, 64, 128])
def test_every_tiling_fits(group: int) -> None:
    for rows in (16, 32, 60, 64):
        for tokens in (17, 64, 128, 300, 512):
            tiling = tile(rows, 32, tokens, group, 132, LIMIT)
            if tiling is not None:
                assert tiling.shared_bytes(group) <= LIMIT
                assert tiling.stages >= 2
                assert 99 <= tiling.blocks(rows, tokens) <= 132


@pytest.mark.skipif(not nvrtc.available(), reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("bfloat16", [0, 1])
@pytest.mark.parametrize("tokens", TILE_TOKENS)
def test_the_kernel_compiles_without_spills_and_waits(tokens: int, bfloat16: int) -> None:
    for group in (32, 64, 128):
        defines = {
            "BF16": bfloat16,
            "SCALE_BF16": int(group == 64),
            "GROUP": group,
            "TOKENS": tokens,
            "STAGES": 4,
        }
        options = ["--gpu-architecture=sm_90a", "--std=c++17", "--ptxas-options=-v"]
        options += [f"-D{key}={value}" for key, value in defines.items()]
        _, log = nvrtc.compile_with_log(read_source("marlin_pair.cu"), options, "marlin_pair.cu")
        assert "Potential Performance Loss" not in log
        assert "0 bytes spill stores" in log


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", TILE_TOKENS)
@pytest.mark.parametrize(
    ("n", "k", "m", "group"), [(4096, 4096, 128, 128), (200, 1160, 70, 32), (65, 300, 33, 64)]
)
def test_products(n: int, k: int, m: int, group: int, tokens: int, dtype: torch.dtype) -> None:
    """Against float64, with a bias and scales that differ much; the same bits every time."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    of = problem(n, k, m, group, dtype, device="cuda")
    found = [multiply(PairTiling(tokens, 3), of.x, of.packed, of.bias, n, group, False) for _ in range(4)]
    assert all(torch.equal(other, found[0]) for other in found)
    of.near(found[0])
