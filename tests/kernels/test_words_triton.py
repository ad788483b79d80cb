"""Codes out of words, under the interpreter and in NVIDIA's packed instructions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from awqc.kernels.jit.words_triton import differences  # noqa: E402
from awqc.kernels.qlinear_triton import target  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@triton.jit
def write_differences(words_ptr, zeros_ptr, out_ptr, ptx: tl.constexpr):
    row, column = tl.arange(0, 16), tl.arange(0, 32)
    index = row[:, None] * 32 + column[None, :]
    zeros = tl.load(zeros_ptr + row)
    planes = differences(tl.load(words_ptr + index), zeros[:, None], out_ptr.dtype.element_ty, ptx)
    for plane in tl.static_range(4):
        tl.store(out_ptr + plane * 512 + index, planes[plane])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_code_less_every_zero_point_is_exact(device: str, dtype: torch.dtype) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton interprets nothing where there is a GPU")
    codes = torch.arange(2048).view(4, 16, 32) % 16
    words = sum(codes[plane] << 4 * plane for plane in range(4))
    assert isinstance(words, Tensor)
    zeros = torch.arange(16, dtype=torch.uint8)
    out = torch.empty(4, 16, 32, dtype=dtype, device=device)
    write_differences[(1,)](
        words.to(torch.int16).to(device), zeros.to(device), out, ptx=target(torch.device(device)).ptx
    )
    assert torch.equal(out.cpu().int(), (codes - zeros[:, None]).int())
