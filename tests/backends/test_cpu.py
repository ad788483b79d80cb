"""Backend ``cpu``: its option, its notes, its refusals."""

from __future__ import annotations

import pytest
import torch

from awqc.backend import LinearShape
from awqc.backends.cpu import CpuBackend
from awqc.errors import ConfigError
from awqc.quantized import Scheme, quantize

WEIGHT = quantize(torch.randn(32, 128), Scheme(4, 64))


def test_dense_prefill_keeps_a_bfloat16_copy_and_says_so() -> None:
    packed = CpuBackend().pack(WEIGHT, None, torch.bfloat16)
    assert torch.equal(packed.tensors["dense"], WEIGHT.dequantize(torch.bfloat16))
    assert packed.notes == (
        "scales are rounded to bfloat16",
        "a bfloat16 copy of the weight serves inputs of more than 8 rows",
    )


def test_packed_prefill_keeps_half_a_byte_a_weight() -> None:
    packed = CpuBackend(prefill="packed").pack(WEIGHT, None, torch.float16)
    sizes = {name: t.nbytes for name, t in packed.tensors.items() if t is not None}
    # Per group of 64: a bfloat16 scale and zero term.
    assert sizes == {"packed": 32 * 128 // 2, "scales_and_zeros": 32 * 128 // 64 * 4}
    assert packed.notes == (
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
