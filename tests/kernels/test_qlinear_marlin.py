"""``awqc::qlinear_marlin`` without a GPU: what it refuses, and that its sources compile for all targets."""

from __future__ import annotations

import itertools

import pytest
import torch

from awqc.kernels import nvrtc
from awqc.kernels.cuda_launch import read_source
from awqc.kernels.hardware import Hardware, assumed
from awqc.kernels.qlinear_marlin import Marlin


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


def test_old_devices_are_refused() -> None:
    with assumed(Hardware("old", "cuda", 40, capability=(7, 5))):
        reason = Marlin.legal(64, 256, 4, 128, torch.float16, torch.device("cuda", 0))
    assert reason == "needs compute capability 8.0 or higher, not 7.5"


@pytest.mark.skipif(not nvrtc.available(), reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
def test_the_dequantizing_kernel_compiles(arch: str) -> None:
    source = read_source("marlin_dequantize.cu")
    for group, bfloat16, scales in itertools.product((32, 64, 128), (0, 1), (0, 1)):
        defines = {"BF16": bfloat16, "SCALE_BF16": scales, "GROUP": group}
        assert b"dequantize" in nvrtc.compile_source(source, arch, defines, name="marlin_dequantize.cu")
