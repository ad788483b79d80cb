"""What a quantizer is expected to see: parameters that matrix products read, whether as linears or not."""

from __future__ import annotations

import re

from torch import fx

from awqc.graph import Graph
from awqc.views import is_parameter, shape

#: Names of ops that multiply matrices, aten's and others'.
_PRODUCT = re.compile(r"linear|matmul|einsum|mm(\b|_)")


def factors(graph: Graph) -> dict[str, str]:
    """Parameters of two dimensions or more that a matrix product reads, directly or through ops that only
    move them -> the first such product."""
    found = {}
    for node in graph.nodes:
        if node.op == "get_attr" and is_parameter(node) and len(shape(node)) > 1:
            product = _product(node)
            if product is not None:
                found[str(node.target)] = str(product.target).removesuffix(".default")
    return found


def _product(parameter: fx.Node) -> fx.Node | None:
    pending, largest = [parameter], parameter.meta["val"].numel()
    for node in pending:
        for user in node.users:
            if _PRODUCT.search(str(user.target).removesuffix(".default")):
                return user
            moved = getattr(user.meta.get("val"), "numel", None)
            if moved is not None and moved() <= largest and user.all_input_nodes == [node]:
                pending.append(user)
    return None
