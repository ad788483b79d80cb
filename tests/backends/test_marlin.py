"""The marlin backend where there is no GPU: refusals, and the way back from its packed form."""

from __future__ import annotations

import pytest
import torch

import awqc.backends.marlin as module
from awqc.backend import LinearShape, get_backend
from awqc.kernels.hardware import assumed, known
from awqc.quantized import QuantizedWeight, Scheme, quantize

CUDA = torch.device("cuda", 0)


def shape_of(weight: QuantizedWeight) -> LinearShape:
    return LinearShape(weight.out_features, weight.in_features, weight.scheme, torch.float16, CUDA)


def test_it_is_preferred_to_the_other_backends() -> None:
    assert get_backend("marlin").priority > max(get_backend(name).priority for name in ("cpu", "reference"))


def test_it_asks_for_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = LinearShape(64, 128, Scheme(), torch.float16, CUDA)
    with assumed(known()["h200"]):
        monkeypatch.setattr(module, "available", lambda: True)
        assert get_backend("marlin").refuses(shape) is None
        monkeypatch.setattr(module, "available", lambda: False)
        assert get_backend("marlin").refuses(shape) == (
            "needs NVRTC, which torch's CUDA builds bring along: pip install nvidia-cuda-nvrtc"
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_come_back_as_they_were(dtype: torch.dtype) -> None:
    weight = quantize(torch.randn(70, 200, generator=torch.Generator().manual_seed(0)), Scheme(3, 64))
    scales = (weight.scales.float() * 1.01).to(dtype)
    weight = QuantizedWeight(weight.codes, scales, weight.zeros, weight.scheme)
    backend = get_backend("marlin")
    packed = backend.pack(weight, None, torch.float16)
    assert packed.notes == (
        ("scales are rounded from torch.float32 to float16",) if dtype == torch.float32 else ()
    )
    unpacked, bias = backend.unpack(packed, shape_of(weight))
    assert bias is None
    assert torch.equal(unpacked.codes, weight.codes)
    assert torch.equal(unpacked.scales, weight.scales)
    assert unpacked.scales.dtype == dtype
    assert torch.equal(unpacked.zeros, weight.zeros)


def test_shapes_without_a_device() -> None:
    """The fake kernel knows the result's shape, dtype and device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight = quantize(torch.randn(70, 128, generator=torch.Generator().manual_seed(0)), Scheme())
    packed = get_backend("marlin").pack(weight, torch.zeros(70), torch.float16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 3, 128, dtype=torch.bfloat16, device="cuda")
        out = packed.op(x, torch.empty(packed.tensor("packed").shape, device="cuda"), None, *packed.constants)
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, 70), torch.bfloat16, "cuda")
