"""Why a linear has no scale group: the op that stopped the scale of its input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import fx

from awqc.scaleflow.flow import Flow
from awqc.scaleflow.op import Refusal, op_name
from awqc.views import ExpertLinear, Linear, expert_linear, linear


class Refusals:
    """What the flows of one graph were stopped by.

    Args:
        views: all linears of the graph.
        order: position of every node.
    """

    def __init__(self, views: Iterable[Linear | ExpertLinear], order: Mapping[fx.Node, int]) -> None:
        self._order = order
        self._views: dict[str, list[Linear | ExpertLinear]] = {}
        for view in views:
            self._views.setdefault(view.parameter, []).append(view)
        self._at_value: dict[fx.Node, tuple[Refusal, frozenset[fx.Node]]] = {}
        self._at_op: dict[str, Refusal] = {}

    def add(self, flow: Flow) -> None:
        """Record a flow that has been run; the first one to meet a node speaks for it."""
        for refusal in flow.refusals:
            self._at_op.setdefault(refusal.node, refusal)
        scaled = frozenset(flow.values) if flow.refusals else frozenset()
        for node in scaled - self._at_value.keys():
            refused = flow.refusal(node)
            if refused is not None:
                self._at_value[node] = refused, scaled

    def of(self, parameter: str) -> str:
        """The reason why no scale can be undone in the weight ``parameter``.

        If a flow reached an input of its linear, what stopped that flow elsewhere; otherwise the last op in
        front of the linear that stopped one.
        """
        views = self._views[parameter]
        for view in views:
            if view.x in self._at_value:
                refusal, scaled = self._at_value[view.x]
                for reader in view.other_readers:
                    if reader in scaled:
                        who = f"{op_name(reader)} ({reader.name})"
                        return f"its weight is also read by {who}, which would change: {refusal}"
                return str(refusal)
        return self._in_front(views[0].x)

    def _in_front(self, x: fx.Node) -> str:
        nodes = sorted(_between(x), key=self._order.__getitem__, reverse=True)
        for node in nodes:
            # What a linear itself stops is its columns, and they are no way to scale its result.
            if node.name in self._at_op and not _is_linear(node):
                return str(self._at_op[node.name])
            if node in self._at_value:
                return str(self._at_value[node][0])
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
        if not _is_linear(node):
            new = [n for n in node.all_input_nodes if n not in seen and n.op == "call_function"]
            pending += new
            seen.update(new)


def _is_linear(node: fx.Node) -> bool:
    return linear(node) is not None or expert_linear(node) is not None
