"""Regions of an exported program that only set a mode: their ops are put in the place of the call.

``torch.export`` keeps what runs under ``torch.enable_grad`` or ``torch.autocast`` as a graph of its own. The
first changes no value. The second does not where it turns autocast off, which traces never turn on.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._higher_order_ops.wrap import wrap_with_autocast, wrap_with_set_grad_enabled

from awqc.views import operand


def inline_modes(program: fx.GraphModule) -> None:
    """Inline all such calls in ``program``, in place, also those within others."""
    for node in list(program.graph.nodes):
        position = _body_of(node)
        if position is None:
            continue
        name = operand(node, position)
        body = program.get_submodule(str(name.target))
        assert isinstance(body, fx.GraphModule)
        inline_modes(body)
        given = iter([operand(node, i) for i in range(position + 1, len(node.args))])
        env: dict[fx.Node, Any] = {inner: next(given) for inner in body.graph.find_nodes(op="placeholder")}
        with program.graph.inserting_before(node):
            results: Any = program.graph.graph_copy(body.graph, env)
        for inner, copied in env.items():
            if inner.op == "get_attr":
                copied.target = f"{name.target}.{inner.target}"
        for user in list(node.users):
            user.replace_all_uses_with(results[operand(user, 1)])
            program.graph.erase_node(user)
        program.graph.erase_node(node)
        program.graph.erase_node(name)


def _body_of(node: fx.Node) -> int | None:
    """Which operand of ``node`` is the graph that it runs, if it can be inlined."""
    if node.target is wrap_with_set_grad_enabled:
        return 1
    if node.target is wrap_with_autocast and not operand(node, 2):
        return 4
    return None
