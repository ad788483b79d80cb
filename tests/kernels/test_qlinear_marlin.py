"""``awqc::qlinear_marlin`` without a GPU: limits, tilings, and that the sources compile for all targets."""

from __future__ import annotations

import pytest
import torch

from awqc.kernels import nvrtc
from awqc.kernels.cuda_launch import read_source
from awqc.kernels.qlinear_marlin import Marlin, tile

#: Shared memory that a block may have on compute capability 8.0, 8.9 and 9.0, in bytes.
LIMITS = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90a": 227 << 10}
needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cpu")}, "runs on NVIDIA GPUs, not on cpu"),
        ({"dtype": torch.float32}, "multiplies float16 or bfloat16 activations, not torch.float32"),
        ({"bits": 5}, "holds codes of at most 4 bits, not 5"),
        (
            {"group_size": 48},
            "needs groups of 32, 64, a multiple of 128, or all input channels, not 48 of 256",
        ),
    ],
)
def test_refusals(change: dict[str, object], reason: str) -> None:
    arguments = {
        "n": 64,
        "k": 256,
        "bits": 4,
        "group_size": 128,
        "dtype": torch.float16,
        "device": torch.device("cuda", 0),
    }
    assert Marlin.legal(**{**arguments, **change}) == reason  # type: ignore[arg-type]


def test_old_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    reason = Marlin.legal(64, 256, 4, 128, torch.float16, torch.device("cuda", 0))
    assert reason == "needs compute capability 8.0 or higher, not 7.5"


@pytest.mark.parametrize("limit", LIMITS.values())
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 3, 16, 64, 100, 224, 448, 2004])
def test_every_tiling_fits_and_covers_the_weight(rows: int, group: int, limit: int) -> None:
    for columns in (1, 7, 32, 224):
        for tokens in (1, 2, 4, 8, 16):
            tiling = tile(rows, columns, tokens, group, 132, limit)
            assert tiling.shared_bytes(tokens, group) <= tiling.occupied_bytes(tokens, group, limit) <= limit
            # 512 bytes of barriers, 8 each.
            assert tiling.warps * tiling.depth <= 64
            shares = tiling.blocks(rows * 4) // tiling.split
            assert shares * tiling.strips * tiling.rounds >= rows * 4
            assert (shares - 1) * tiling.strips * tiling.rounds < rows * 4


def test_one_tiling_serves_neighbouring_numbers_of_tokens() -> None:
    """Kernel choice is stable: between powers of two nothing changes, and shapes of cubes do not jump."""
    tilings = [tile(64, 32, tokens, 128, 132, LIMITS["sm_90a"]) for tokens in (1, 2, 4, 8)]
    assert len(set(tilings)) == 1


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
@pytest.mark.parametrize("bfloat16", [0, 1])
def test_the_streaming_kernel_compiles(arch: str, bfloat16: int) -> None:
    for tokens, group in ((8, 128), (16, 32)):
        tiling = tile(224, 32, tokens, group, 132, LIMITS[arch])
        defines: dict[str, int | str] = {
            "BF16": bfloat16,
            "SCALE_BF16": 1 - bfloat16,
            "GROUP": group,
            "TOKENS": tokens,
            "WARPS": tiling.warps,
            "STRIPS": tiling.strips,
            "ROUNDS": tiling.rounds,
            "SPLIT": 2,
            "DEPTH": tiling.depth,
            "HOPPER": int(arch == "sm_90a"),
        }
        assert b"small" in nvrtc.compile_source(
            read_source("marlin_small.cu"), arch, defines, name="marlin_small.cu"
        )


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
def test_the_dequantizing_kernel_compiles(arch: str) -> None:
    source = read_source("marlin_dequantize.cu")
    for group in (32, 64, 128):
        defines = {"BF16": 1, "SCALE_BF16": 0, "GROUP": group}
        assert b"dequantize" in nvrtc.compile_source(source, arch, defines, name="marlin_dequantize.cu")
