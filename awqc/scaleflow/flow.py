"""Scale flow: if a parameter is divided by a positive vector, which tensors change, how, who undoes it?

Abstract interpretation over the ATen graph. The abstract value of a tensor is :class:`Scaled`: for each
element the id of the scale channel that divides it (or -1), and a degree: the element is divided by
``s[id] ** degree``. Rules for ops live in ``awqc/rules``, one family a file. An op without a rule poisons
the ids it sees: those channels keep scale 1, so refusal is the default and soundness needs no trust in
the rules that are missing.

A parameter can *join* the flow: a bias is divided along with the tensor it is added to; the weight that
reads a scaled tensor is *multiplied* (degree -1), which makes it a consumer. Because a joined parameter
is a tainted value like any other, its other readers are followed too: a tied embedding that would have to
change poisons the flow all by itself.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from awqc.graph import Graph
from awqc.scaleflow.op import Op, Refusal, RowOp, Rule, op_name
from awqc.scaleflow.producers import producers
from awqc.scaleflow.routing import Families, Routing
from awqc.scaleflow.scaled import Scaled, Value
from awqc.scaleflow.sites import Part, Site, Sites
from awqc.views import operand, shape


@dataclass
class Flow:
    """One run: some tensors are divided by channels, and that is followed to a fixpoint.

    After :meth:`run`, ``alive`` marks the channels that may be scaled, :meth:`parts` says how every involved
    parameter changes, ``values`` how every involved tensor does, and :meth:`refusal` why a channel may not.
    """

    graph: Graph
    sites: Sites
    order: dict[fx.Node, int]
    channels: int = 0
    values: dict[fx.Node, Value] = field(default_factory=dict)
    joined: dict[fx.Node, Site] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    alive: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def run(self, seeds: Mapping[fx.Node, Tensor]) -> Flow:
        """Follow ``seeds``: ids of the shape of each node that is divided to begin with.

        Every node that reads a scaled value is visited again whenever one of its operands changes, so at
        the end each rule has judged the final values.
        """
        from awqc.rules import rule_for

        self.channels = 1 + max(int(Scaled(ids).core().max()) for ids in seeds.values())
        self.families = Families(self.channels)
        self.alive = torch.ones(self.channels, dtype=torch.bool)
        self._cause = torch.full((self.channels,), -1)
        self._queue: list[tuple[int, fx.Node]] = []
        self._queued: set[fx.Node] = set()
        for node, ids in seeds.items():
            site = self.sites.of(node)
            if site is not None:
                self.joined[node] = site
            self._update(node, Scaled(ids))
        budget = 64 * len(self.order)
        while self._queue and bool(self.alive.any()):
            _, node = heapq.heappop(self._queue)
            self._queued.discard(node)
            budget -= 1
            if node.target is operator.getitem:
                pieces = self.values.get(operand(node, 0))
                self._update(node, pieces[operand(node, 1)] if isinstance(pieces, list) else None)
                continue
            if not any(source in self.values for source in node.all_input_nodes):
                self._update(node, None)
                continue
            rule = rule_for(node)
            if rule is None or budget < 0:
                self._refuse_all(node, _no_rule(node) if rule is None else "the flow does not settle")
            else:
                self._update(node, self._apply(node, rule))
        return self

    def _apply(self, node: fx.Node, rule: Rule) -> Value:
        """What ``rule`` says of ``node``; where operands are routed, also which rows its elements are of."""
        from awqc.rules import knows_rows

        found = (self.values.get(source) for source in node.all_input_nodes)
        routings = [v.routing for v in found if isinstance(v, Scaled) and v.routing is not None]
        if not routings or knows_rows(rule):
            return self._checked(rule, Op(node, self))
        one = routings[0]
        if any(routing.key is not one.key for routing in routings):
            self._refuse_all(node, "rows of different routings meet")
            return None
        on_rows = RowOp(node, self)
        moved = rule(on_rows)
        joined = {n: Routing(one.key, rows, one.offsets) for n, rows in on_rows.joined.items()}
        value = self._checked(rule, Op(node, self, joined))
        if on_rows.reason is not None:
            self._refuse_all(node, f"rows that different experts serve are mixed: {on_rows.reason}")
            return None
        if isinstance(value, list):
            rows = moved if isinstance(moved, list) else [None] * len(value)
            return [self._routed(node, v, r, one) for v, r in zip(value, rows, strict=True)]
        return self._routed(node, value, moved if isinstance(moved, Scaled) else None, one)

    def _checked(self, rule: Rule, op: Op) -> Value:
        """What ``rule`` says; an operand that it has not asked about may not be scaled."""
        value = rule(op)
        for source in op.node.all_input_nodes:
            if source in self.values and source not in op.asked:
                reason = f"what a scale of {source} does to the result is not followed"
                self._refuse(self.values[source], Refusal(reason, op.node.name, op_name(op.node)))
        return value

    def _routed(
        self, node: fx.Node, value: Scaled | None, rows: Scaled | None, one: Routing
    ) -> Scaled | None:
        if value is None or not self.families.hold(value.core()):
            return value
        if rows is None:
            self._refuse_all(node, "which expert serves a row is not known any more")
            return None
        return Scaled(value.ids, value.degree, Routing(one.key, rows.ids, one.offsets))

    def parts(self) -> list[Part]:
        """How each parameter changes, refused channels left out."""
        found = []
        for node, site in self.joined.items():
            value = self.values.get(node)
            if isinstance(value, Scaled):
                ids = self.living(value.core())
                if bool((ids >= 0).any()):
                    found.append(Part(site, ids, value.degree))
        return found

    def living(self, ids: Tensor) -> Tensor:
        """``ids`` with refused channels replaced by -1."""
        padded = torch.cat([self.alive, torch.zeros(1, dtype=torch.bool)])
        return torch.where(padded[ids], ids, -1)

    def refusal(self, node: fx.Node) -> Refusal | None:
        """What stopped the first refused channel of the tensor of ``node``; None if all are alive."""
        value = self.values.get(node)
        if not isinstance(value, Scaled):
            return None
        causes = self._cause[self.families.members(value.used())]
        causes = causes[causes >= 0]
        return self.refusals[int(causes[0])] if len(causes) else None

    def poison(self, ids: Tensor, refusal: Refusal) -> None:
        """Refuse the channels ``ids`` that nothing has refused yet, for the reason ``refusal``."""
        ids = self.families.members(ids)
        ids = ids[self.alive[ids]]
        if len(ids):
            self.alive[ids] = False
            self._cause[ids] = len(self.refusals)
            self.refusals.append(refusal)

    def join(self, operand: fx.Node, wanted: Scaled, computed: bool = False) -> bool:
        """Scale the parameters behind ``operand`` so that it becomes ``wanted``; False if none can be."""
        plan = producers(operand, wanted, self.sites, self.families, computed)
        merged = [(site, placed.merged(self.values.get(site.node))) for site, placed in plan or ()]
        if not merged or any(value is None for _, value in merged):
            return False
        for site, value in merged:
            self.joined[site.node] = site
            self._update(site.node, value)
        return True

    def _update(self, node: fx.Node, value: Value) -> None:
        before = self.values.get(node)
        if isinstance(value, Scaled):
            value = value.compacted()
            if not bool((value.core() >= 0).any()):
                value = None
        if isinstance(value, Scaled):
            if value.same(before if isinstance(before, Scaled) else None):
                return
        elif value is None and before is None:
            return
        if value is None:
            self.values.pop(node, None)
        else:
            self.values[node] = value
        for user in node.users:
            if user.op == "output":
                self._refuse(value, Refusal("the model's output would change", user.name, "output"))
            elif user not in self._queued:
                self._queued.add(user)
                heapq.heappush(self._queue, (self.order[user], user))

    def _refuse_all(self, node: fx.Node, reason: str) -> None:
        """Refuse everything that ``node`` reads."""
        refusal = Refusal(reason, node.name, op_name(node))
        for source in node.all_input_nodes:
            self._refuse(self.values.get(source), refusal)

    def _refuse(self, value: Value, refusal: Refusal) -> None:
        for item in value if isinstance(value, list) else [value]:
            if item is not None:
                self.poison(item.used(), refusal)


def _no_rule(node: fx.Node) -> str:
    return f"no scale passes through {op_name(node)}"


def seeds(site: Site) -> Iterable[Tensor]:
    """The ways to give a site channels, ``ids`` of the site's shape: one along each of its axes; of a stack
    of matrices also one along each axis of each matrix."""
    size = shape(site.node)
    if 0 in size:
        return
    axes: list[tuple[int, ...]] = [(axis,) for axis in range(len(size))]
    if len(size) == 3:
        axes += [(0, 1), (0, 2)]
    for chosen in axes:
        if all(size[axis] > 1 for axis in chosen):
            varying = [size[axis] if axis in chosen else 1 for axis in range(len(size))]
            yield torch.arange(torch.Size(varying).numel(), dtype=torch.int32).reshape(varying).expand(size)
