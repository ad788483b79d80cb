"""Random weights and activations for tests of the kernels on :mod:`awqc.kernels.marlin_layout`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awqc.kernels import marlin_layout as layout
from awqc.kernels.qlinear import dequantize


@dataclass(frozen=True)
class Problem:
    """Activations ``(M, K)``, the packed weight, a bias or None, and the weight in float64 ``(N, K)``."""

    x: Tensor
    packed: Tensor
    bias: Tensor | None
    weight: Tensor

    def near(self, found: Tensor) -> None:
        """``found`` is the product: weights and results are rounded once each, and sums are float32."""
        bias = 0.0 if self.bias is None else self.bias.double()
        want = self.x.double() @ self.weight.t() + bias
        eps, sums = torch.finfo(self.x.dtype).eps / 2, self.weight.shape[1] ** 0.5 * 2.0**-24
        energy = (self.x.double().square() @ self.weight.square().t()).sqrt()
        rounded = want.abs() + (0.0 if self.bias is None else self.bias.double().abs())
        bound = (8 * eps + 80 * sums) * energy + 2 * eps * rounded
        assert ((found.double() - want).abs() <= bound).all()


def problem(
    n: int,
    k: int,
    m: int,
    group: int,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    bias: bool = True,
) -> Problem:
    """Scales differ much, or are zero."""
    generator = torch.Generator().manual_seed(n + k)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator)

    codes = (uniform(n, k) * 16).byte()
    scales = uniform(n, -(-k // group)) * 0.02 + 0.01
    scales = (scales * 2.0 ** (uniform(*scales.shape) * 12 - 6).round()).half()
    scales[uniform(*scales.shape) < 0.1] = 0
    zeros = (uniform(*scales.shape) * 17).byte()
    codes, scales, zeros = codes.to(device), scales.to(device), zeros.to(device)
    return Problem(
        torch.randn(m, k, generator=generator).to(device, dtype),
        layout.pack(codes, scales, zeros, group),
        torch.randn(n, generator=generator).to(device, dtype) if bias else None,
        dequantize(codes, scales, zeros, group, torch.float64),
    )
