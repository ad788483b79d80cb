"""The kernel for few tokens, without a GPU: its tilings, and that it compiles for all targets."""

from __future__ import annotations

import itertools

import pytest
import torch

from awqc.kernels import nvrtc
from awqc.kernels.cuda_launch import read_source
from awqc.kernels.hardware import Hardware
from awqc.kernels.marlin_stream import Problem, tile, tile_tokens

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


CAPABILITIES = {"sm_80": (8, 0), "sm_89": (8, 9), "sm_90a": (9, 0)}
#: Multiprocessors of the devices of each architecture that the limits are of.
PROCESSORS = {"sm_80": 108, "sm_89": 128, "sm_90a": 132}


def variants(arch: str) -> list[dict[str, int | str]]:
    """Macros of all tilings that weights of usual sizes are cut into; dtypes and groups go round."""
    sizes = itertools.product((64, 1024, 4096, 8192, 14336, 128256), (128, 4096, 28672), (1, 8, 16))
    dtypes = itertools.cycle(itertools.product((torch.float16, torch.bfloat16), (False, True)))
    groups = itertools.cycle((128, 64, 128, 32, 128))
    forms = itertools.cycle([{}, {}, {"weights": 2, "gated": True}, {}, {"weights": 3}])
    at = Hardware(arch, "cuda", PROCESSORS[arch], CAPABILITIES[arch], LIMITS[arch])
    found: dict[object, dict[str, int | str]] = {}
    for (n, k, tokens), group, form in zip(sizes, groups, forms, strict=False):
        dtype, bfloat16_scales = next(dtypes)
        problem = Problem(-(-n // 64), -(-k // 128), tokens, group, dtype, bfloat16_scales, **form)
        tiling = problem.tiling(at)
        macros = {**problem.macros(tiling, at.has_bulk_copies), "TURNED": len(found) % 2}
        found.setdefault((tiling, tile_tokens(tokens), problem.gated), macros)
    return list(found.values())


@pytest.mark.skipif(not nvrtc.available(), reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("arch", LIMITS)
def test_the_kernel_compiles_in_every_tiling_and_spares_no_registers(arch: str) -> None:
    source = read_source("marlin_small.cu")
    for defines in variants(arch):
        flags = [f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v"]
        flags += [f"-D{key}={value}" for key, value in defines.items()]
        cubin, log = nvrtc.compile_with_log(source, flags, "marlin_small.cu")
        assert b"small" in cubin
        # One block has a processor to itself, so the compiler need not save registers: it spills at 255 only.
        assert "0 bytes spill stores" in log or "Used 255 registers" in log, defines
