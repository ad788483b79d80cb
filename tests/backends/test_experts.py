"""What backends owe to the experts of a mixture: the exact way back, and a reason where they have no op."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from awqc.backend import LinearShape, backends
from awqc.backends.reference import ReferenceBackend
from awqc.quantized import QuantizedWeight, Scheme, quantize, stack
from awqc.runtime.lowering import lower_linear

CPU = torch.device("cpu")
#: Where experts run here, with the first dtype that each backend takes there.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ABLE = {
    name: dtypes[0]
    for name, backend in backends().items()
    if backend.runs_experts
    and (
        dtypes := [
            dtype
            for dtype in (torch.float32, torch.float16)
            if backend().refuses(LinearShape(48, 128, Scheme(4, 32), dtype, DEVICE, 3)) is None
        ]
    )
}


def experts(scheme: Scheme, n: int = 48, k: int = 128) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(scheme.bits)
    return stack([quantize(torch.randn(n, k, generator=generator), scheme) for _ in range(3)])


@pytest.mark.parametrize("name", ABLE)
@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, 64), Scheme(4, -1, zero_point=False)], ids=str)
def test_the_way_back_is_exact(name: str, scheme: Scheme) -> None:
    weight = experts(scheme)
    lowered = lower_linear(weight, None, ABLE[name], DEVICE, name)
    assert lowered.backend.name == name
    found, bias = lowered.backend.unpack(lowered.packed, lowered.shape)
    assert bias is None
    assert torch.equal(found.codes.cpu(), weight.codes)
    assert torch.equal(found.scales.cpu(), weight.scales)
    assert torch.equal(found.zeros.cpu(), weight.zeros)
    assert lowered.shape == LinearShape(48, 128, scheme, ABLE[name], DEVICE, 3)


@pytest.mark.parametrize("name", ABLE)
def test_rows_by_expert(name: str) -> None:
    weight, offsets = experts(Scheme(4, 32)), torch.tensor([10, 11, 14])
    x = torch.randn(14, 128, generator=torch.Generator().manual_seed(0)).to(ABLE[name])
    packed = lower_linear(weight, None, ABLE[name], DEVICE, name).packed
    got = (
        packed.op(x.to(DEVICE), offsets.to(DEVICE), *packed.tensors.values(), *packed.constants).cpu().float()
    )
    dense, x = weight.dequantize(), x.float()
    parts = x[:10] @ dense[0].T, x[10:11] @ dense[1].T, x[11:] @ dense[2].T
    # Operands, scales and results may be rounded to bfloat16, each once.
    assert (got - torch.cat(parts)).norm() <= 4 * torch.finfo(torch.bfloat16).eps / 2 * got.norm()


@pytest.mark.parametrize("name", ["marlin", "exllama"])
def test_experts_of_a_backend_without_a_kernel_for_them_say_what_runs(name: str) -> None:
    packed = backends()[name]().pack(experts(Scheme(4, 32)), None, torch.float16)
    assert packed.op is backends()["triton"]().pack(experts(Scheme(4, 32)), None, torch.float16).op
    assert packed.notes == ("the linears of experts run on the Triton kernel",)


def test_a_backend_without_an_op_for_experts_is_replaced_by_the_reference() -> None:
    class Dense(ReferenceBackend):
        name: ClassVar[str] = "dense-only"
        runs_experts: ClassVar[bool] = False

    lowered = lower_linear(experts(Scheme(4, 32)), None, torch.float32, CPU, Dense())
    assert lowered.backend.name == "reference"
    assert lowered.refused == {"dense-only": "has no op for the experts of a mixture"}
