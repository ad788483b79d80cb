"""ONNX translations of torch ops that torch's exporter does not know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401  defines transformers::grouped_mm_fallback
from onnxscript import opset18 as op

INT64 = 7


def grouped_mm(x: Any, weight: Any, offsets: Any, bias: Any = None, out_dtype: Any = None) -> Any:
    """One ``MatMul`` for each expert on its share of the rows.

    Args:
        x: ``(S, K)`` sorted by expert.
        weight: ``(E, K, N)``.
        offsets: ``(E,)`` end of each expert's rows.
        bias, out_dtype: not used by forwards of transformers.
    """
    assert bias is None
    assert out_dtype is None
    first = op.Constant(value_ints=[0])
    products = [
        op.MatMul(rows, op.Squeeze(op.Slice(weight, [e], [e + 1], first), first))
        for e, rows in enumerate(_shares(x, offsets, weight.shape[0]))
    ]
    return op.Concat(*products, axis=0)


def _shares(x: Any, offsets: Any, experts: int) -> Iterator[Any]:
    ends = op.Cast(offsets, to=INT64)
    start = op.Constant(value_ints=[0])
    for e in range(experts):
        end = op.Slice(ends, [e], [e + 1])
        yield op.Slice(x, start, end, op.Constant(value_ints=[0]))
        start = end


#: torch op -> function of ONNX operators.
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten._grouped_mm.default: grouped_mm,
    torch.ops.transformers.grouped_mm_fallback.default: grouped_mm,
}
