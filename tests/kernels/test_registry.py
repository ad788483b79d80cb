"""The kernel registry, and what every registered kernel owes to ``awqc::qlinear``."""

from __future__ import annotations

import pytest
import torch

from awqc.kernels import registry
from awqc.kernels.qlinear import qlinear
from awqc.quantized import Scheme, quantize


def test_kernels_are_found_by_the_name_of_the_op() -> None:
    assert "AtenInt4" in registry.kernels("qlinear")
    assert registry.kernels("no_such_op") == {}


def test_a_registered_class_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_KERNELS", {})

    @registry.register_kernel("some_op")
    class Mine: ...

    assert registry.kernels("some_op") == {"Mine": Mine}


@pytest.mark.parametrize("name", registry.kernels("qlinear"))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 128])
def test_every_legal_kernel_agrees_with_the_reference(name: str, bits: int, group_size: int) -> None:
    kernel = registry.kernels("qlinear")[name]
    n, k, dtype = 64, 256, torch.bfloat16
    if reason := kernel.legal(n, k, bits, group_size, dtype, torch.device("cpu")):
        assert "\n" not in reason
        return
    generator = torch.Generator().manual_seed(bits)
    weight = quantize(torch.randn(n, k, generator=generator), Scheme(bits, group_size))
    bias = torch.randn(n, generator=generator).to(dtype)
    x = torch.randn(5, k, generator=generator).to(dtype)
    canonical = (weight.codes, weight.scales, weight.zeros, bias)
    tensors, constants = kernel.pack(*canonical, bits, group_size)
    got = kernel.op(x, *tensors.values(), *constants).double()
    want = qlinear(x.double(), *canonical, group_size)
    # x, scales, weights and output are each rounded to bfloat16 at most once.
    assert (got - want).norm() <= 4 * torch.finfo(dtype).eps / 2 * want.norm()
