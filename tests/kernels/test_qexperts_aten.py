"""``awqc::qexperts_cpu``: each expert is run as a linear of its own would be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awqc.kernels.qexperts_aten import AtenInt4Experts
from awqc.kernels.qlinear_aten import INT4_ROWS, AtenInt4
from awqc.quantized import QuantizedWeight, Scheme, quantize, stack

EXPERTS, N, K = 3, 80, 128


def weights(scheme: Scheme) -> list[QuantizedWeight]:
    generator = torch.Generator().manual_seed(scheme.bits)
    return [quantize(torch.randn(N, K, generator=generator), scheme) for _ in range(EXPERTS)]


def parts(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    return weight.codes, weight.scales, weight.zeros


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_expert_is_a_linear_of_its_own(dense: bool, dtype: torch.dtype) -> None:
    """Bit for bit, with few rows (4-bit kernel), many (dense, if there is a copy) and none."""
    alone = weights(Scheme(4, 32))
    tensors, constants = AtenInt4Experts.pack(*parts(stack(alone)), None, 4, 32, dense=dense)
    counts = [INT4_ROWS, 0, INT4_ROWS + 1]
    offsets = torch.tensor(counts).cumsum(0)
    x = torch.randn(sum(counts), K, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = AtenInt4Experts.op(x, offsets, *tensors.values(), *constants)
    assert got.dtype == dtype
    for weight, rows, found in zip(alone, x.split(counts), got.split(counts), strict=True):
        packed, also = AtenInt4.pack(*parts(weight), None, 4, 32, dense=dense)
        assert torch.equal(found, AtenInt4.op(rows, *packed.values(), *also))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_unpacking_gives_the_codes_back(bits: int) -> None:
    """Also where the rows of an expert do not fill the blocks in which the CPU orders codes."""
    whole = stack(weights(Scheme(bits, 64)))
    tensors, _ = AtenInt4Experts.pack(*parts(whole), None, bits, 64, dense=False)
    packed = tensors["packed"]
    assert packed is not None
    assert tuple(packed.shape) == (EXPERTS, N, K // 2)
    assert torch.equal(AtenInt4Experts.unpack(packed, bits), whole.codes)
    assert tensors["dense"] is None
