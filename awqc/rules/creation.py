"""Tensors made from nothing but a shape, and those known to be zero, which any scale divides."""

from __future__ import annotations

import torch
from torch import fx

from awqc.functional import written
from awqc.rules import Sample, example, rule
from awqc.scaleflow.op import Op
from awqc.scaleflow.scaled import Value
from awqc.views import operand

aten = torch.ops.aten

_X = example(2, 3)
_LAST = {0: torch.arange(3, dtype=torch.int32)}
_ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
_FULL = {
    aten.full.default: 1,
    aten.full_like.default: 1,
    aten.new_full.default: 2,
    aten.scalar_tensor.default: 0,
}
_VIEWS = (
    aten.expand.default,
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.select.int,
    aten.transpose.int,
    aten.permute.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
)


@rule(aten.zeros_like.default, aten.ones_like.default, samples=[Sample((_X,), scale=_LAST)])
@rule(aten.new_zeros.default, aten.new_ones.default, samples=[Sample((_X, [4]), scale=_LAST)])
@rule(aten.full_like.default, samples=[Sample((_X, 2.0), scale=_LAST)])
@rule(aten.new_empty.default, samples=[Sample((_X, [0]), scale=_LAST)])
@rule(aten.new_full.default, samples=[Sample((_X, [4], 2.0), scale=_LAST)])
def from_shape(op: Op) -> Value:
    """Only the dtype and device of the operand matter, and its shape. What is written into the result is for
    the op that writes."""
    op.ignore(op.args[0])
    return None


def is_zero(node: object) -> bool:
    """Whether ``node`` is a tensor of zeros that nothing writes into."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or _is_written(node):
        return False
    if node.target in _ZEROS:
        return True
    if node.target in _FULL:
        return bool(operand(node, _FULL[node.target], "fill_value") == 0)
    return node.target in _VIEWS and is_zero(operand(node, 0))


def _is_written(node: fx.Node) -> bool:
    """Whether ``node`` or a view of it is written into."""
    return any(node in written(user) or (user.target in _VIEWS and _is_written(user)) for user in node.users)
