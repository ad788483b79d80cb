"""``awqc::qlinear``: a linear on a quantized weight, and its reference, which defines the result.

    y = x @ W.T + bias,   W[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g],   g = k // group_size

The reference dequantizes and multiplies in float32 (float64 for float64 ``x``) whatever the dtype of
``x``, and rounds once, at the end: it is what every kernel is measured against, so it is accurate first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from awqc.kernels.hardware import Hardware
from awqc.kernels.launch import Launch, describes, nbytes

LIBRARY = torch.library.Library("awqc", "FRAGMENT")
LIBRARY.define(
    "qlinear(Tensor x, Tensor codes, Tensor scales, Tensor zeros, Tensor? bias, int group_size) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def group_channels(group_size: int, in_features: int) -> int:
    """Channels in a group of a row of ``in_features``: -1 stands for the whole row."""
    return in_features if group_size == -1 else min(group_size, in_features)


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight ``(N, K)`` in ``dtype``, which is also the dtype of the arithmetic.

    Args:
        codes: ``(N, K)`` uint8.
        scales, zeros: ``(N, G)``; the last group is the shorter one when ``group_size`` does not divide K.
        group_size: input channels that share a scale; -1 for the whole row.
    """
    k = codes.shape[1]
    group = group_channels(group_size, k)
    # to() copies, so the arithmetic may be done in place: one (N, K) temporary instead of three.
    weight = F.pad(codes, (0, -k % group)).unflatten(1, (-1, group)).to(dtype, copy=True)
    weight.sub_(zeros.to(dtype).unsqueeze(-1)).mul_(scales.to(dtype).unsqueeze(-1))
    return weight.flatten(1)[:, :k]


def qlinear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """The linear above on ``x`` ``(..., K)``; returns ``(..., N)`` in the dtype of ``x``.

    Args:
        x: any floating dtype, any strides.
        codes: ``(N, K)`` uint8, one code to a byte whatever its width.
        scales: ``(N, G)`` floating.
        zeros: ``(N, G)`` integer or floating.
        bias: ``(N,)`` floating, or None.
        group_size: input channels that share a scale; -1 for the whole row.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = dequantize(codes, scales, zeros, group_size, dtype)
    return F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)


LIBRARY.impl("qlinear", qlinear, "CompositeExplicitAutograd")


@describes(torch.ops.awqc.qlinear.default)
def describe(
    at: Hardware,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    group_size: int,
) -> list[Launch]:
    """What :func:`qlinear` does: the weight in the dtype of the arithmetic, then the product."""
    dense = codes.numel() * torch.promote_types(x.dtype, torch.float32).itemsize
    out = x.numel() // x.shape[-1] * codes.shape[0] * x.itemsize
    return [
        Launch("dequantize", nbytes(codes, scales, zeros), dense),
        Launch("aten.linear", nbytes(x, bias) + dense, out),
    ]


@torch.library.register_fake("awqc::qlinear", lib=LIBRARY)
def _(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))
