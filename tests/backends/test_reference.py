"""Backend ``reference``: it refuses nothing that is a linear."""

from __future__ import annotations

import torch

from awqc.backend import LinearShape, get_backend
from awqc.quantized import Scheme, quantize


def shape(dtype: torch.dtype, device: str = "cpu") -> LinearShape:
    return LinearShape(7, 33, Scheme(5, 10), dtype, torch.device(device))


def test_refuses_integer_activations_only() -> None:
    reference = get_backend("reference")
    assert reference.refuses(shape(torch.float64)) is None
    assert reference.refuses(shape(torch.float16, "meta")) is None
    reason = "multiplies floating-point activations, not torch.int8"
    assert reference.refuses(shape(torch.int8)) == reason


def test_holds_the_canonical_tensors_themselves() -> None:
    weight, bias = quantize(torch.randn(7, 33), Scheme(5, 10)), torch.randn(7)
    packed = get_backend("reference").pack(weight, bias, torch.float32)
    assert packed.tensors["codes"] is weight.codes
    assert packed.tensors["bias"] is bias
    assert packed.notes == ()
