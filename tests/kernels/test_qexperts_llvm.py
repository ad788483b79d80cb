"""``awqc::qexperts_llvm``: each expert is run as a linear of its own would be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awqc.kernels import llvm
from awqc.kernels.qexperts_llvm import LlvmInt4Experts
from awqc.kernels.qlinear_llvm import LlvmInt4, dot_rows
from awqc.quantized import QuantizedWeight, Scheme, quantize, stack

pytestmark = pytest.mark.skipif(llvm.missing() is not None, reason=f"awqc's own CPU kernel {llvm.missing()}")
EXPERTS, N, K = 3, 40, 144


def weights(scheme: Scheme) -> list[QuantizedWeight]:
    generator = torch.Generator().manual_seed(scheme.bits)
    return [quantize(torch.randn(N, K, generator=generator), scheme) for _ in range(EXPERTS)]


def parts(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    return weight.codes, weight.scales, weight.zeros


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_expert_is_a_linear_of_its_own(dense: bool, dtype: torch.dtype) -> None:
    """Bit for bit, with few rows (dot products), many (dense, if there is a copy) and none."""
    alone = weights(Scheme(4, 32))
    tensors, constants = LlvmInt4Experts.pack(*parts(stack(alone)), None, 4, 32, dense=dense)
    counts = [dot_rows(), 0, dot_rows() + 1]
    offsets = torch.tensor(counts).cumsum(0)
    x = torch.randn(sum(counts), K, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = LlvmInt4Experts.op(x, offsets, *tensors.values(), *constants)
    assert got.dtype == dtype
    for weight, rows, found in zip(alone, x.split(counts), got.split(counts), strict=True):
        packed, also = LlvmInt4.pack(*parts(weight), None, 4, 32, dense=dense)
        assert torch.equal(found, LlvmInt4.op(rows, *packed.values(), *also))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_unpacking_gives_everything_back(bits: int) -> None:
    whole = stack(weights(Scheme(bits, 64)))
    tensors, _ = LlvmInt4Experts.pack(*parts(whole), None, bits, 64, dense=False)
    found = LlvmInt4Experts.unpack(tensors["packed"], tensors["scales"], tensors["zeros"], N, K, 64)
    for got, want in zip(found, parts(whole), strict=True):
        assert torch.equal(got, want)
    assert tensors["dense"] is None
