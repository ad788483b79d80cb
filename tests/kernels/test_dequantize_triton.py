"""The dense weight out of planes: the same numbers as the reference's, rounded once."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from awqc.kernels.qlinear_triton import TritonGemm, dense
from awqc.kernels.triton_weight import Weight
from awqc.quantized import Scheme, quantize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(16, 256, 128), (50, 300, 128), (7, 33, -1), (33, 384, 96), (20, 64, 16)]
)
def test_equals_the_reference(n: int, k: int, group_size: int, dtype: torch.dtype) -> None:
    weight = quantize(
        torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)), Scheme(4, group_size)
    )
    tensors, _ = TritonGemm.pack(
        weight.codes.to(DEVICE), weight.scales.to(DEVICE), weight.zeros.to(DEVICE), None, 4, group_size
    )
    operands = {name: t for name, t in tensors.items() if t is not None}
    got = dense(Weight(**operands, n=n, k=k, group_size=group_size), dtype)
    assert torch.equal(got.cpu(), weight.dequantize(dtype))
