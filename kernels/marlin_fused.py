"""Fused forms of the linear on marlin's packed weights: what surrounds it in a decoder layer, in one launch.

* ``awqc::qlinears_marlin``: several linears that read the same input (query, key and value);
* ``awqc::qlinear_marlin_gated``: ``silu(x @ gate.T) * (x @ up.T)``;
* ``awqc::qlinear_marlin_add``: ``x @ W.T + bias + residual``.

Up to 16 tokens each is one launch of ``marlin_small.cu``, where launches are what decoding waits for; what is
added or multiplied is so in float32, and the result is rounded once. For more tokens they are the linears and
elementwise ops that they stand for. The packed weights are those of ``awqc::qlinear_marlin``, unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from awqc.kernels import marlin_stream
from awqc.kernels.extension import implement_in_python
from awqc.kernels.qlinear import LIBRARY
from awqc.kernels.qlinear_marlin import kernel_inputs, qlinear_marlin, streams

#: Most weights of one launch.
MOST_WEIGHTS = 4
_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    "qlinears_marlin(Tensor x, Tensor[] packed, Tensor[] bias, int[] out_features, int group, "
    "bool bfloat16_scales) -> Tensor[]",
    tags=_TAGS,
)
_GATED = "(Tensor x, Tensor gate, Tensor up, int out_features, int group, bool bfloat16_scales) -> Tensor"
_ADD = (
    "(Tensor x, Tensor packed, Tensor? bias, Tensor residual, int out_features, int group, "
    "bool bfloat16_scales) -> Tensor"
)
LIBRARY.define(f"qlinear_marlin_gated{_GATED}", tags=_TAGS)
LIBRARY.define(f"qlinear_marlin_add{_ADD}", tags=_TAGS)


def qlinears_marlin(
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Sequence[Tensor],
    out_features: Sequence[int],
    group: int,
    bfloat16_scales: bool,
) -> list[Tensor]:
    """``x @ W.T + bias`` for each of at most ``MOST_WEIGHTS`` weights.

    Args:
        x: ``(..., K)``, as for ``awqc::qlinear_marlin``.
        packed, out_features: of each weight.
        bias: of each weight, or none at all.

    Returns:
        ``(..., N)`` for each, contiguous.
    """
    rows, _ = kernel_inputs(x, None)
    biases = [b.to(rows.dtype) for b in bias] if bias else [None] * len(packed)
    if not streams(rows):
        return [
            qlinear_marlin(x, p, b, n, group, bfloat16_scales)
            for p, b, n in zip(packed, biases, out_features, strict=True)
        ]
    found = marlin_stream.multiply_all(rows, packed, biases, out_features, group, bfloat16_scales)
    return [y.to(x.dtype).view(*x.shape[:-1], y.shape[-1]) for y in found]


def qlinear_marlin_gated(
    x: Tensor, gate: Tensor, up: Tensor, out_features: int, group: int, bfloat16_scales: bool
) -> Tensor:
    """``silu(x @ gate.T) * (x @ up.T)``, ``(..., N)``, for two packed weights of as many rows."""
    rows, _ = kernel_inputs(x, None)
    if streams(rows):
        y = marlin_stream.multiply_gated(rows, gate, up, out_features, group, bfloat16_scales)
        return y.to(x.dtype).view(*x.shape[:-1], out_features)
    first, second = (qlinear_marlin(x, w, None, out_features, group, bfloat16_scales) for w in (gate, up))
    return F.silu(first).mul_(second)


def qlinear_marlin_add(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    out_features: int,
    group: int,
    bfloat16_scales: bool,
) -> Tensor:
    """``x @ W.T + bias + residual``: ``(..., N)`` like ``residual``, whose dtype is that of ``x``."""
    rows, bias = kernel_inputs(x, bias)
    if not streams(rows):
        return qlinear_marlin(x, packed, bias, out_features, group, bfloat16_scales).add_(residual)
    added = residual.reshape(-1, out_features).to(rows.dtype).contiguous()
    y = marlin_stream.multiply(rows, packed, bias, out_features, group, bfloat16_scales, added)
    return y.to(x.dtype).view(residual.shape)


LIBRARY.impl("qlinears_marlin", qlinears_marlin, "CUDA")
implement_in_python("qlinear_marlin_gated", _GATED, qlinear_marlin_gated)
implement_in_python("qlinear_marlin_add", _ADD, qlinear_marlin_add)


@torch.library.register_fake("awqc::qlinears_marlin", lib=LIBRARY)
def _(
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Sequence[Tensor],
    out_features: Sequence[int],
    group: int,
    bfloat16_scales: bool,
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], n)) for n in out_features]


@torch.library.register_fake("awqc::qlinear_marlin_gated", lib=LIBRARY)
def _(x: Tensor, gate: Tensor, up: Tensor, out_features: int, group: int, bfloat16_scales: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("awqc::qlinear_marlin_add", lib=LIBRARY)
def _(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    out_features: int,
    group: int,
    bfloat16_scales: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))
