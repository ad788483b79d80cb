"""How tokens come to experts: the linears that decide it, and the tensor that holds their decision."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx

from awqc.graph import Graph
from awqc.program import Env
from awqc.views import ExpertLinear, expert_linears, linear, operand, shape

aten = torch.ops.aten

#: Ops with two results, of which the second says where the first is.
_SELECTIONS = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.max.dim, aten.min.dim)
#: Values of nodes from the values that are known.
Evaluate = Callable[[list[fx.Node], Env], Env]


def routers(graph: Graph) -> dict[str, str]:
    """Parameters of linears that decide which expert serves a token -> name of the experts' linears.

    They are the last linears on the way to the rows' offsets. Where every expert reads a block of rows of
    its own there are no offsets; there, those that give each token one number for every expert.
    """
    found: dict[str, str] = {}
    for view in expert_linears(graph):
        for node in _between(view.offsets or view.x):
            decides = linear(node)
            if decides is not None and (view.offsets is not None or decides.out_features == view.count):
                found.setdefault(decides.parameter, view.name)
    return found


def choice(view: ExpertLinear) -> fx.Node | None:
    """The tensor ``(..., k)`` of experts that each token goes to, from which the rows of ``view`` follow: the
    numbers of the best by scores. None if there is no such tensor, or several."""
    if view.offsets is None:
        return None
    found, pending, seen = [], [view.offsets], {view.offsets}
    for node in pending:
        if _selects(node):
            found.append(node)
        elif linear(node) is None:
            new = [n for n in node.all_input_nodes if n not in seen and n.op == "call_function"]
            pending += new
            seen.update(new)
    return found[0] if len(found) == 1 else None


class Rerouting:
    """The inputs of all experts when every token goes to each of them.

    The graph is a program for ``k`` experts a token: it is run as often as it takes to name every expert,
    from the choice of experts onwards.

    Args:
        view: the linears of the experts.
        chosen: their :func:`choice`.
    """

    def __init__(self, view: ExpertLinear, chosen: fx.Node) -> None:
        self.view, self.chosen = view, chosen
        assert view.offsets is not None
        self.wanted = [view.x, view.offsets]
        self._after = _after(chosen)
        #: What has to be known to compute the inputs from another choice.
        self.needs: set[fx.Node] = set()
        pending = list(self.wanted)
        for node in pending:
            if node in self._after:
                pending += [n for n in node.all_input_nodes if n not in pending]
            elif node is not chosen and node.op != "get_attr":
                self.needs.add(node)

    def rows(self, sample: Env, evaluate: Evaluate) -> Iterator[Tensor]:
        """Of every expert its rows ``(tokens, K)`` of one sample, whose live values are ``sample``."""
        known = {node: value for node, value in sample.items() if node not in self._after}
        size, device = shape(self.chosen), self.chosen.meta["val"].device
        for first in range(0, self.view.count, size[-1]):
            experts = torch.arange(first, first + size[-1], device=device) % self.view.count
            values = evaluate(self.wanted, {**known, self.chosen: experts.expand(size).clone()})
            rows = self.view.rows(*(values[node] for node in self.wanted))
            # The last round names some experts again.
            yield from rows[first : min(first + size[-1], self.view.count)]


def _after(node: fx.Node) -> set[fx.Node]:
    """Everything computed from ``node``."""
    pending, found = [node], set[fx.Node]()
    for current in pending:
        new = [user for user in current.users if user not in found]
        pending += new
        found.update(new)
    return found


def _between(start: fx.Node) -> Iterator[fx.Node]:
    """``start`` and what it is computed from, as far as the linears in front of it."""
    pending, seen = [start], {start}
    for node in pending:
        yield node
        if linear(node) is None:
            new = [n for n in node.all_input_nodes if n not in seen and n.op == "call_function"]
            pending += new
            seen.update(new)


def _selects(node: fx.Node) -> bool:
    """Whether ``node`` holds where the best of some scores are, not which of some numbers are the best."""
    source = operand(node, 0)
    value = node.meta.get("val")
    if not isinstance(source, fx.Node) or not isinstance(value, Tensor) or value.dtype != torch.int64:
        return False
    selection = source if source.target in _SELECTIONS else node
    scores = operand(selection, 0).meta.get("val")
    selects = selection is source or node.target in (aten.argmax.default, aten.argsort.default)
    return selects and isinstance(scores, Tensor) and scores.is_floating_point()
