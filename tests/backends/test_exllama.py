"""Backend ``exllama``: its refusals, and the way back without a device."""

from __future__ import annotations

import torch

from awqc.backend import LinearShape
from awqc.backends.exllama import ExLlamaBackend
from awqc.quantized import Scheme, quantize


def test_refuses_what_its_kernel_refuses() -> None:
    shape = LinearShape(32, 128, Scheme(4, 64), torch.float16, torch.device("cpu"))
    assert ExLlamaBackend().refuses(shape) == "runs on cuda, not on cpu"


def test_packing_and_back_need_no_device() -> None:
    weight, bias = quantize(torch.randn(70, 300), Scheme(3, 64)), torch.randn(70)
    packed = ExLlamaBackend().pack(weight, bias, torch.float16)
    shape = LinearShape(70, 300, weight.scheme, torch.float16, torch.device("cuda"))
    unpacked, same = ExLlamaBackend().unpack(packed, shape)
    assert same is bias
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(unpacked, name), getattr(weight, name))
