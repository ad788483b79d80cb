"""Weights in planes for tests of the Triton kernels."""

from __future__ import annotations

import torch

from awqc.kernels.qexperts_triton import TritonExperts
from awqc.kernels.qlinear_triton import TritonGemm
from awqc.kernels.triton_weight import Weight


def weight_of(
    n: int,
    k: int,
    group_size: int = 128,
    scales: torch.dtype = torch.float16,
    device: str = "meta",
    experts: int | None = None,
) -> Weight:
    """A packed random weight ``(n, k)``, or a stack of ``experts`` of them; on ``meta`` without memory."""
    lead = () if experts is None else (experts,)
    groups = 1 if group_size == -1 else -(-k // group_size)
    codes = torch.randint(0, 16, (*lead, n, k), dtype=torch.uint8, device=device)
    scale = (torch.rand(*lead, n, groups, device=device) + 0.5).to(scales)
    zeros = torch.randint(0, 16, scale.shape, dtype=torch.uint8, device=device)
    kernel = TritonGemm if experts is None else TritonExperts
    tensors, _ = kernel.pack(codes, scale, zeros, None, 4, group_size)
    held = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return Weight(**held, n=n, k=k, group_size=group_size)
