"""What a quantizer is expected to see: parameters that matrix products read, whether as linears or not.

A module that is called as it is counts as a product: what it does with its parameters is not known.
"""

from __future__ import annotations

import re
from types import BuiltinFunctionType

from torch import fx
from torch._ops import OpOverload

from awqc.graph import Graph
from awqc.scaleflow.op import op_name
from awqc.views import is_parameter, shape

#: Names of ops that multiply matrices, aten's and others'.
_PRODUCT = re.compile(r"(\b|_)linear|bilinear\b|matmul|einsum|mm(\b|_)")


def factors(graph: Graph) -> dict[str, str]:
    """Parameters of two dimensions or more that a matrix product reads, directly or through ops that only
    move them -> the first such product."""
    found = {}
    for node in graph.nodes:
        if node.op == "get_attr" and is_parameter(node) and len(shape(node)) > 1:
            product = _product(node)
            if product is not None:
                found[str(node.target)] = op_name(product)
    return found


def _product(parameter: fx.Node) -> fx.Node | None:
    pending, largest = [parameter], parameter.meta["val"].numel()
    for node in pending:
        for user in node.users:
            opaque = not isinstance(user.target, (OpOverload, BuiltinFunctionType, str))
            if opaque or _PRODUCT.search(op_name(user)):
                return user
            moved = getattr(user.meta.get("val"), "numel", None)
            if moved is not None and moved() <= largest and user.all_input_nodes == [node]:
                pending.append(user)
    return None
