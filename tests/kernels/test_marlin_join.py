"""Partial sums in their order."""

from __future__ import annotations

import pytest
import torch

from awqc.kernels import nvrtc
from awqc.kernels.cuda_launch import read_source
from awqc.kernels.marlin_join import join


@pytest.mark.skipif(not nvrtc.available(), reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("width", [1, 4])
def test_the_kernel_compiles(width: int) -> None:
    source = read_source("marlin_join.cu")
    for split, bfloat16 in ((2, 0), (4, 1), (8, 0)):
        defines = {"BF16": bfloat16, "SPLIT": split, "WIDTH": width}
        assert b"join" in nvrtc.compile_source(source, "sm_90a", defines, name="marlin_join.cu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n", [64, 67])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_added_first_to_last(n: int, dtype: torch.dtype) -> None:
    partials, bias = torch.randn(4, 5, n, device="cuda"), torch.randn(n, device="cuda").to(dtype)
    for vector in (None, bias):
        out = torch.full((5, n), torch.nan, dtype=dtype, device="cuda")
        join(out, partials, vector)
        expected = partials[0] + partials[1] + partials[2] + partials[3]
        assert torch.equal(out, (expected if vector is None else expected + vector.float()).to(dtype))
