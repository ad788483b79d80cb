"""Why a linear has no scale group: the op that stopped the scale of its input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import fx

from awqc.flow import Flow, Refusal, op_name
from awqc.views import Linear, linear


class Refusals:
    """What the flows of one graph were stopped by.

    Args:
        views: all linears of the graph.
        order: position of every node.
    """

    def __init__(self, views: Iterable[Linear], order: Mapping[fx.Node, int]) -> None:
        self._order = order
        self._views: dict[str, list[Linear]] = {}
        for view in views:
            self._views.setdefault(view.parameter, []).append(view)
        self._inputs = {view.x for found in self._views.values() for view in found}
        self._at_input: dict[fx.Node, tuple[Refusal, frozenset[fx.Node]]] = {}
        self._at_op: dict[str, Refusal] = {}

    def add(self, flow: Flow) -> None:
        """Record a flow that has been run; the first one to meet a node speaks for it."""
        for refusal in flow.refusals:
            self._at_op.setdefault(refusal.node, refusal)
        for node in flow.values:
            if node in self._inputs and node not in self._at_input:
                refused = flow.refusal(node)
                if refused is not None:
                    self._at_input[node] = refused, frozenset(flow.values)

    def of(self, parameter: str) -> str:
        """The reason why no scale can be undone in the weight ``parameter``.

        If a flow reached an input of its linear, what stopped that flow elsewhere; otherwise the last op in
        front of the linear that stopped one.
        """
        views = self._views[parameter]
        for view in views:
            if view.x in self._at_input:
                refusal, scaled = self._at_input[view.x]
                for reader in view.other_readers:
                    if reader in scaled:
                        who = f"{op_name(reader)} ({reader.name})"
                        return f"its weight is also read by {who}, which would change: {refusal}"
                return str(refusal)
        return self._in_front(views[0].x)

    def _in_front(self, x: fx.Node) -> str:
        # What the rows of the linear in front met is a better answer than what its columns and bias did.
        nodes = sorted(_between(x), key=lambda n: (linear(n) is not None, -self._order[n]))
        for node in nodes:
            if node.name in self._at_op:
                return str(self._at_op[node.name])
        if x.op == "placeholder":
            return f"its input {x} is an input of the model: nothing before it can absorb a scale"
        return f"{op_name(x)} ({x.name}): no parameter scales its result"


def _between(x: fx.Node) -> Iterator[fx.Node]:
    """Ops that ``x`` is computed by, as far as the linears in front of it."""
    pending, seen = [x], {x}
    for node in pending:
        yield node
        if linear(node) is None:
            new = [n for n in node.all_input_nodes if n not in seen and n.op == "call_function"]
            pending += new
            seen.update(new)
