"""Backend ``cpu``: its option, its notes, its refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from awqc.backend import LinearShape
from awqc.backends.cpu import CpuBackend
from awqc.errors import ConfigError
from awqc.kernels import llvm
from awqc.kernels.qlinear_llvm import dot_rows
from awqc.quantized import Scheme, quantize, stack

WEIGHT = quantize(torch.randn(32, 128), Scheme(4, 64))


#: Where awqc's own kernel runs.
OWN = pytest.mark.skipif(llvm.missing() is not None, reason=f"awqc's own CPU kernel {llvm.missing()}")
ROUNDED = "activations are rounded to 16 bits of the largest of at most 256 channels"


@OWN
def test_awqcs_own_kernel_runs_where_it_can() -> None:
    dense, packed = (CpuBackend(prefill).pack(WEIGHT, None, torch.float32) for prefill in ("dense", "packed"))
    assert dense.op is packed.op is torch.ops.awqc.qlinear_llvm.default
    assert torch.equal(dense.tensors["dense"], WEIGHT.dequantize(torch.bfloat16))
    assert dense.notes == (
        ROUNDED,
        f"a bfloat16 copy of the weight serves inputs of more than {dot_rows()} rows",
    )
    assert packed.notes == (ROUNDED,)
    # Per group of 64: a float16 scale and a byte of zero point. Nothing else is kept for the way back.
    sizes = {name: t.nbytes for name, t in packed.tensors.items() if t is not None}
    assert sizes == {"packed": 32 * 128 // 2, "scales": 32 * 2 * 2, "zeros": 32 * 2}
    assert not packed.kept


@OWN
def test_scales_that_it_does_not_hold_are_kept_for_the_way_back() -> None:
    weight = replace(WEIGHT, scales=WEIGHT.scales.double() / 3)
    shape = LinearShape(32, 128, weight.scheme, torch.float32, torch.device("cpu"))
    packed = CpuBackend().pack(weight, None, torch.float32)
    found, _ = CpuBackend().unpack(packed, shape)
    assert torch.equal(found.scales, weight.scales)
    assert packed.tensor("scales").dtype == torch.float32


def test_the_report_says_why_atens_kernel_runs(without_llvm: str) -> None:
    packed = CpuBackend().pack(WEIGHT, None, torch.bfloat16)
    assert packed.op is torch.ops.awqc.qlinear_cpu.default
    assert packed.notes[0] == f"ATen's 4-bit kernel runs it: awqc's own {without_llvm}"


@pytest.mark.usefixtures("without_llvm")
@pytest.mark.parametrize("experts", [None, 3])
def test_the_way_back_from_atens_kernel(experts: int | None) -> None:
    weight = WEIGHT if experts is None else stack([WEIGHT] * experts)
    shape = LinearShape(32, 128, weight.scheme, torch.float32, torch.device("cpu"), experts)
    bias = torch.randn(32) if experts is None else None
    found, same = CpuBackend().unpack(CpuBackend().pack(weight, bias, torch.float32), shape)
    assert same is bias
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(found, name), getattr(weight, name))


def test_dense_prefill_keeps_a_bfloat16_copy_and_says_so(without_llvm: str) -> None:
    packed = CpuBackend().pack(WEIGHT, None, torch.bfloat16)
    assert torch.equal(packed.tensors["dense"], WEIGHT.dequantize(torch.bfloat16))
    assert packed.notes == (
        f"ATen's 4-bit kernel runs it: awqc's own {without_llvm}",
        "scales are rounded to bfloat16",
        "a bfloat16 copy of the weight serves inputs of more than 8 rows",
    )


def test_packed_prefill_keeps_half_a_byte_a_weight(without_llvm: str) -> None:
    packed = CpuBackend(prefill="packed").pack(WEIGHT, None, torch.float16)
    sizes = {name: t.nbytes for name, t in packed.tensors.items() if t is not None}
    # Per group of 64: a bfloat16 scale and zero term.
    assert sizes == {"packed": 32 * 128 // 2, "scales_and_zeros": 32 * 128 // 64 * 4}
    assert packed.notes == (
        f"ATen's 4-bit kernel runs it: awqc's own {without_llvm}",
        "scales are rounded to bfloat16",
        "activations are rounded from torch.float16 to bfloat16",
    )


def test_unknown_prefill() -> None:
    with pytest.raises(ConfigError) as error:
        CpuBackend(prefill="lazy")
    assert str(error.value) == "prefill='lazy': the cpu backend knows 'dense' and 'packed'"


def test_refuses_what_its_kernel_refuses() -> None:
    shape = LinearShape(32, 128, Scheme(8, 64), torch.float32, torch.device("cpu"))
    assert CpuBackend().refuses(shape) == "holds codes of at most 4 bits, not 8"
