"""The precision of the matrix products that move calibration tokens.

Statistics are summed in float32 whatever moved the tokens. The products themselves may be in bfloat16
where the device has instructions for it: a relative rounding of 2^-9 an operand, against the 2^-4 or so
that quantizing a weight to 4 bits does to the same values. docs/quality.md has the ablation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from awqc.views import expert_linear, linear


def fast_in_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices by instructions of their own."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def propagation_dtype(option: str, dtype: torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """The dtype of products for ``QuantConfig.propagate_dtype`` on a graph of ``dtype``; None is the
    graph's own."""
    if option == "auto":
        return torch.bfloat16 if dtype == torch.float32 and fast_in_bfloat16(device) else None
    chosen: torch.dtype = getattr(torch, option)
    return None if chosen == dtype else chosen


@contextmanager
def gram_products(dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Products of float32 matrices on a GPU may round their operands to TF32 within the block, by 2^-11, if
    what is multiplied comes from products in ``dtype``, which are rounded more; None says that it does not.
    A Gram matrix stays one: both operands are the same values, rounded alike."""
    settings = torch.backends.cuda.matmul
    if dtype is None or device.type != "cuda":
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


@dataclass
class RoundedLinear:
    """``aten.linear`` with operands and result rounded to ``dtype``; its weight is cast once."""

    dtype: torch.dtype
    _weight: Tensor | None = field(default=None, init=False)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._weight is None:
            self._weight = weight.to(self.dtype)
        y = F.linear(x.to(self.dtype), self._weight).to(x.dtype)
        return y if bias is None else y.add_(bias)


@dataclass
class RoundedExperts:
    """The linears of experts, ``op(x, weight, ...)``, rounded to ``dtype`` as :class:`RoundedLinear` does."""

    dtype: torch.dtype
    op: Callable[..., Tensor]
    _weight: Tensor | None = field(default=None, init=False)

    def __call__(self, x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        if self._weight is None:
            self._weight = weight.to(self.dtype)
        return self.op(x.to(self.dtype), self._weight, *rest).to(x.dtype)


def rounded_linears(
    nodes: Iterable[fx.Node], dtype: torch.dtype | None
) -> Mapping[fx.Node, RoundedLinear | RoundedExperts]:
    """What to call for each linear of ``nodes``, those of experts too, while the weights are as they are;
    nothing if ``dtype`` is None."""
    if dtype is None:
        return {}
    calls: dict[fx.Node, RoundedLinear | RoundedExperts] = {}
    for node in nodes:
        if linear(node) is not None:
            calls[node] = RoundedLinear(dtype)
        elif expert_linear(node) is not None and callable(node.target):
            calls[node] = RoundedExperts(dtype, node.target)
    return calls
