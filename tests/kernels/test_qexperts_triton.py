"""``awqc::qexperts_triton``: every way of giving rows, packing, and the choice of a tile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from awqc.kernels.hardware import hardware
from awqc.kernels.planes import pack_groups, pack_planes
from awqc.kernels.qexperts import qexperts
from awqc.kernels.qexperts_triton import TritonExperts, choose
from awqc.kernels.qlinear_triton import interpreted
from awqc.kernels.triton_weight import Weight
from awqc.quantized import QuantizedWeight, Scheme, quantize, stack

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def experts(count: int, n: int, k: int, group_size: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(n + k)
    return stack(
        [quantize(torch.randn(n, k, generator=generator), Scheme(4, group_size)) for _ in range(count)]
    )


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_close(got: Tensor, x: Tensor, offsets: Tensor | None, weight: QuantizedWeight, group: int) -> None:
    """Exact products summed in float32 and rounded once; Triton's interpreter cuts bfloat16 off instead."""
    parts = weight.codes, weight.scales, weight.zeros
    want = qexperts(x.double(), offsets, *parts, group)
    dense = weight.dequantize(torch.float64)
    energy = x.double().norm(dim=-1, keepdim=True) * dense.norm(dim=-1).amax()
    accumulation = 6 * x.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps / 2
    rounding = torch.finfo(got.dtype).eps / (1 if interpreted() and got.dtype == torch.bfloat16 else 2)
    assert ((got.cpu().double() - want).abs() <= 1.01 * rounding * want.abs() + accumulation * energy).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_block_of_rows_for_each_expert(dtype: torch.dtype) -> None:
    weight, x = experts(3, 48, 128, 32), rows(3, 5, 128).to(dtype)
    tensors, constants = TritonExperts.pack(weight.codes, weight.scales, weight.zeros, None, 4, 32)
    operands = (*(None if t is None else t.to(DEVICE) for t in tensors.values()), *constants)
    got = TritonExperts.op(x.to(DEVICE), None, *operands)
    assert got.dtype == dtype
    assert_close(got, x, None, weight, 32)
    # Any strides: (E, T, K) as a batched product has it.
    turned = x.to(DEVICE).transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(TritonExperts.op(turned, None, *operands), got)


@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
def test_offsets_of_any_dtype(kind: torch.dtype) -> None:
    weight, x = experts(3, 48, 128, 32), rows(9, 128).half().to(DEVICE)
    tensors, constants = TritonExperts.pack(weight.codes, weight.scales, weight.zeros, None, 4, 32)
    operands = (*(None if t is None else t.to(DEVICE) for t in tensors.values()), *constants)
    offsets = torch.tensor([2, 2, 7], device=DEVICE)
    want = TritonExperts.op(x, offsets.int(), *operands)
    assert torch.equal(TritonExperts.op(x, offsets.to(kind), *operands), want)


def test_packing_is_that_of_a_linear_for_every_expert() -> None:
    weight = experts(3, 48, 256, 64)
    tensors, constants = TritonExperts.pack(weight.codes, weight.scales, weight.zeros, None, 4, 64)
    assert constants == (48, 64)
    packed, scales = tensors["packed"], tensors["scales"]
    assert packed is not None
    assert scales is not None
    for expert in range(3):
        assert torch.equal(packed[expert], pack_planes(weight.codes[expert], 64))
        assert torch.equal(scales[expert], pack_groups(weight.scales[expert]))


def test_the_configuration_is_stable_between_the_entries() -> None:
    tensors, _ = TritonExperts.pack(
        *(torch.ones(8, 16, c, dtype=torch.uint8) for c in (64, 1, 1)), None, 4, 64
    )
    held = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    weight, at = Weight(**held, n=16, k=64, group_size=64), hardware(DEVICE)
    found = [choose(tokens, weight, at) for tokens in (1, 8, 64, 65, 128, 10**6, 10**7)]
    assert found[0] == found[1] == found[2] != found[3] == found[4]
    assert found[5] == found[6]


@pytest.mark.gpu
def test_a_captured_call_follows_the_router() -> None:
    weight = experts(8, 256, 512, 128)
    tensors, constants = TritonExperts.pack(weight.codes, weight.scales, weight.zeros, None, 4, 128)
    operands = (*(None if t is None else t.to(DEVICE) for t in tensors.values()), *constants)
    x = rows(16, 512).half().to(DEVICE)
    offsets = torch.tensor([2, 4, 6, 8, 10, 12, 14, 16], dtype=torch.int32, device=DEVICE)
    TritonExperts.op(x, offsets, *operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = TritonExperts.op(x, offsets, *operands)
    offsets.copy_(torch.tensor([0, 9, 9, 9, 10, 10, 10, 15]))
    graph.replay()
    assert torch.equal(got, TritonExperts.op(x, offsets, *operands))
    assert_close(got, x.cpu(), offsets.cpu(), weight, 128)
