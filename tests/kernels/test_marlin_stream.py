"""The kernel for few tokens, without a GPU: its tilings, and that it compiles for all targets."""

from __future__ import annotations

import pytest

from awqc.kernels import nvrtc
from awqc.kernels.cuda_launch import read_source
from awqc.kernels.marlin_stream import tile, tile_tokens

#: Shared memory that a block may have on compute capability 8.0, 8.9 and 9.0, in bytes.
LIMITS = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90a": 227 << 10}


@pytest.mark.parametrize("limit", LIMITS.values())
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 3, 16, 64, 100, 224, 448, 2004])
def test_every_tiling_fits_and_covers_the_weight(rows: int, group: int, limit: int) -> None:
    for columns in (1, 7, 32, 224):
        for tokens in (1, 2, 4, 8, 16):
            tiling = tile(rows, columns, tokens, group, 132, limit)
            assert tiling.shared_bytes(tokens, group) <= tiling.occupied_bytes(tokens, group, limit) <= limit
            # 1024 bytes of barriers, 8 each.
            assert tiling.warps * tiling.depth <= 128
            shares = tiling.blocks(rows * 4) // tiling.split
            assert shares * tiling.strips * tiling.rounds >= rows * 4
            assert (shares - 1) * tiling.strips * tiling.rounds < rows * 4


@pytest.mark.parametrize(("rows", "columns"), [(64, 32), (224, 32), (64, 112), (128, 224), (96, 32)])
def test_up_to_eight_tokens_are_cut_alike(rows: int, columns: int) -> None:
    """The choice is stable: a token more or less changes nothing but what is copied."""
    assert len({tile(rows, columns, tokens, 128, 132, LIMITS["sm_90a"]) for tokens in (1, 2, 4, 8)}) == 1


@pytest.mark.skipif(not nvrtc.available(), reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("bfloat16", [0, 1])
def test_the_kernel_compiles(arch: str, bfloat16: int) -> None:
    for tokens, group in ((8, 128), (16, 32)):
        tiling = tile(224, 32, tokens, group, 132, LIMITS[arch])
        defines: dict[str, int | str] = {
            "BF16": bfloat16,
            "SCALE_BF16": 1 - bfloat16,
            "GROUP": group,
            "TOKENS": tile_tokens(tokens),
            "WARPS": tiling.warps,
            "STRIPS": tiling.strips,
            "ROUNDS": tiling.rounds,
            "SPLIT": 2,
            "DEPTH": tiling.depth,
            "HOPPER": int(arch == "sm_90a"),
        }
        source = read_source("marlin_small.cu")
        assert b"small" in nvrtc.compile_source(source, arch, defines, name="marlin_small.cu")
