"""Backend ``triton``: its refusals and what it keeps."""

from __future__ import annotations

import pytest
import torch

from awqc.backend import LinearShape
from awqc.backends.triton import TritonBackend
from awqc.quantized import Scheme, quantize

CUDA = torch.device("cuda")


def test_refuses_what_its_kernel_refuses() -> None:
    pytest.importorskip("triton")
    shape = LinearShape(32, 128, Scheme(8, 64), torch.float16, CUDA)
    assert TritonBackend().refuses(shape) == "holds codes of at most 4 bits, not 8"


def test_keeps_half_a_byte_a_code_and_three_bytes_a_group() -> None:
    weight = quantize(torch.randn(256, 512), Scheme(4, 64))
    packed = TritonBackend().pack(weight, None, torch.float16)
    sizes = {name: t.nbytes for name, t in packed.tensors.items() if t is not None}
    groups = 256 * 512 // 64
    assert sizes == {"packed": 256 * 512 // 2, "scales": 2 * groups, "zeros": groups}
    assert packed.kept == {}
    assert packed.notes == ()
