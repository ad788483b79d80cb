"""What kernels say they launch is what they launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from awqc.kernels import extension
from awqc.kernels.cuda_launch import CudaKernel
from awqc.kernels.hardware import hardware
from awqc.kernels.launch import launches
from awqc.kernels.registry import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", ["ExLlama", "Marlin"])
@pytest.mark.parametrize("tokens", [1, 3, 16, 40, 128, 600, 2000])
def test_descriptions(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, device = kernels("qlinear")[name], torch.device("cuda", 0)
    n, k, dtype = 1536, 2048, torch.float16
    if name == "Marlin" and extension.loaded() is not None:
        pytest.skip("the compiled host side launches unseen: AWQC_EXTENSION=0 leaves it out")
    if reason := kernel.legal(n, k, 4, 128, dtype, device):
        pytest.skip(reason)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
    scales = torch.full((n, k // 128), 0.01, dtype=dtype, device=device)
    tensors, constants = kernel.pack(codes, scales, torch.full_like(scales, 8).byte(), None, 4, 128)
    x = torch.randn(tokens, k, dtype=dtype, device=device)
    seen: list[tuple[Any, Any, int]] = []
    launch = CudaKernel.launch

    def recorded(self: CudaKernel, grid: Any, block: Any, args: Any) -> None:
        seen.append((tuple(grid), tuple(block), self.shared))
        launch(self, grid, block, args)

    monkeypatch.setattr(CudaKernel, "launch", recorded)
    y = kernel.op(x, *tensors.values(), *constants)
    said = launches(kernel.op, hardware(device), [x, *tensors.values(), *constants], y)
    assert [(one.grid, one.block, one.shared) for one in said if one.code is not None] == seen
