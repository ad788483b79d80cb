"""Why a linear has no scale group: the op that stopped the scale of its input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx

from awqc.flow import Flow, Refusal, op_name
from awqc.views import Linear, linear


class Refusals:
    """What the flows of one graph were stopped by, in the order they were run.

    Args:
        views: all linears of the graph.
    """

    def __init__(self, views: Iterable[Linear]) -> None:
        self._inputs = {view.x for view in views}
        self._at_input: dict[fx.Node, tuple[Refusal, frozenset[fx.Node]]] = {}
        self._at_op: dict[str, Refusal] = {}

    def add(self, flow: Flow) -> None:
        """Record a flow that has been run."""
        for refusal in flow.refusals:
            self._at_op.setdefault(refusal.node, refusal)
        for node in flow.values:
            if node in self._inputs and node not in self._at_input:
                refused = flow.refusal(node)
                if refused is not None:
                    self._at_input[node] = refused, frozenset(flow.values)

    def of(self, view: Linear) -> str:
        """The reason why no scale can be undone by the linear ``view``.

        If a flow reached its input, what stopped that flow elsewhere; otherwise the nearest op in front of
        it that no scale passes.
        """
        if view.x in self._at_input:
            refusal, scaled = self._at_input[view.x]
            other = next((u for u in _readers(view) if u in scaled), None)
            if other is None:
                return str(refusal)
            reader = f"{op_name(other)} ({other.name})"
            return f"its weight is also read by {reader}, whose result must not change: {refusal}"
        return self._in_front(view.x)

    def _in_front(self, x: fx.Node) -> str:
        behind = list(_between(x))
        # A linear stops what comes from before it, always; what its own rows met is the better answer.
        for node in sorted(behind, key=lambda n: linear(n) is not None):
            if node.name in self._at_op:
                return str(self._at_op[node.name])
        if x.op == "placeholder":
            return f"its input {x} is an input of the model: nothing before it can absorb a scale"
        return f"{op_name(x)} ({x.name}): no parameter scales its result"


def _between(x: fx.Node) -> Iterator[fx.Node]:
    """Ops that ``x`` is computed by, nearest first, as far as the linears in front of it."""
    pending, seen = [x], {x}
    for node in pending:
        yield node
        if linear(node) is None:
            new = [n for n in node.all_input_nodes if n not in seen and n.op == "call_function"]
            pending += new
            seen.update(new)


def _readers(view: Linear) -> list[fx.Node]:
    """Nodes other than the linear itself that read its weight."""
    weight = view.node.args[1]
    assert isinstance(weight, fx.Node)
    nodes = [weight.args[0], weight] if view.transposed else [weight]
    own = {view.node, weight}
    return [user for node in nodes if isinstance(node, fx.Node) for user in node.users if user not in own]
