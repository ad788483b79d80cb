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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from awqc.graph import Graph
from awqc.sites import Part, Site, Sites
from awqc.views import CONSTANT, is_transpose, operand, shape

#: Index tensors larger than this are not built to invert a movement of a parameter.
_LARGEST_INVERSE = 1 << 22


@dataclass(frozen=True)
class Scaled:
    """An abstract tensor.

    Args:
        ids: integer tensor of the concrete tensor's shape; dimensions along which nothing changes have
            stride 0, so it stays small. -1 where the element is not scaled.
        degree: the power of the scale that divides the element.
    """

    ids: Tensor
    degree: float = 1.0

    def core(self) -> Tensor:
        """The ids with every constant dimension reduced to size 1."""
        core = self.ids
        for dim, stride in enumerate(core.stride()):
            if stride == 0 and core.shape[dim] > 1:
                core = core.narrow(dim, 0, 1)
        return core

    def used(self) -> Tensor:
        """The distinct ids."""
        ids = torch.unique(self.core())
        return ids[ids >= 0]

    def constant_along(self, dim: int) -> bool:
        """Whether all elements along ``dim`` have the same id."""
        ids = self.ids
        if ids.shape[dim] <= 1 or ids.stride(dim) == 0:
            return True
        core = self.core()
        return bool((core == core.narrow(dim, 0, 1)).all())

    def same(self, other: Scaled | None) -> bool:
        """Whether ``other`` says the same of a tensor of the same shape."""
        return (
            other is not None
            and self.degree == other.degree
            and self.ids.shape == other.ids.shape
            and torch.equal(*torch.broadcast_tensors(self.core(), other.core()))
        )


def compact(ids: Tensor) -> Tensor:
    """The same ids with stride 0 along every dimension in which they do not change."""
    core = Scaled(ids).core()
    for dim, size in enumerate(core.shape):
        if size > 1:
            first = core.narrow(dim, 0, 1)
            if bool((core == first).all()):
                core = first
    return core.expand(ids.shape)


Value = Scaled | list["Scaled | None"] | None
Rule = Callable[["Op"], Value]


@dataclass(frozen=True)
class Refusal:
    """Why a channel cannot be scaled: the op that stops it and what it does."""

    reason: str
    node: str
    op: str

    def __str__(self) -> str:
        return f"{self.op} ({self.node}): {self.reason}"


class Op:
    """What a rule sees of one node: its operands' abstract values, and the verbs of the flow."""

    def __init__(self, node: fx.Node, flow: Flow) -> None:
        self.node = node
        self._flow = flow

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of the node."""
        return self.node.args

    def arg(self, index: int, name: str | None = None, default: Any = None) -> Any:
        """Argument ``index``, also when passed by ``name``; ``default`` when left out."""
        return operand(self.node, index, name, default)

    def value(self, operand: Any) -> Scaled | None:
        """Abstract value of an operand node; None when it is not scaled (or not a tensor)."""
        found = self._flow.values.get(operand) if isinstance(operand, fx.Node) else None
        return found if isinstance(found, Scaled) else None

    def values(self, operand: Any) -> Value:
        """Like :meth:`value` for operands that are lists of tensors."""
        return self._flow.values.get(operand) if isinstance(operand, fx.Node) else None

    def constant(self, operand: Any) -> Tensor | None:
        """The value of an operand that is written in the forward, such as a list of indices; else None."""
        if isinstance(operand, fx.Node) and operand.op == "get_attr" and operand.meta.get("role") == CONSTANT:
            return self._flow.graph.weights[str(operand.target)]
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the node's result."""
        return shape(self.node)

    def poison(self, value: Scaled | None, reason: str, where: Tensor | None = None) -> None:
        """Refuse to scale the channels of ``value`` (only those at the mask ``where``)."""
        if value is not None:
            ids = value.used() if where is None else torch.unique(value.ids[where])
            self._flow.poison(ids[ids >= 0], Refusal(reason, self.node.name, op_name(self.node)))

    def join(self, operand: Any, ids: Tensor, degree: float) -> bool:
        """Scale the parameter behind ``operand`` along: ``ids`` has the operand's shape. False if the
        operand is not a parameter (or a movement of one)."""
        return isinstance(operand, fx.Node) and self._flow.join(operand, Scaled(ids, degree))


def op_name(node: fx.Node) -> str:
    """``aten.silu`` and the like."""
    target = node.target
    packet = getattr(target, "overloadpacket", None)
    return str(packet) if packet is not None else getattr(target, "__name__", str(target))


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
                self._update(node, rule(Op(node, self)))
        return self

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
        causes = self._cause[value.used()]
        causes = causes[causes >= 0]
        return self.refusals[int(causes[0])] if len(causes) else None

    def poison(self, ids: Tensor, refusal: Refusal) -> None:
        """Refuse the channels ``ids`` that nothing has refused yet, for the reason ``refusal``."""
        ids = ids[self.alive[ids]]
        if len(ids):
            self.alive[ids] = False
            self._cause[ids] = len(self.refusals)
            self.refusals.append(refusal)

    def join(self, operand: fx.Node, wanted: Scaled) -> bool:
        """Scale the parameter behind ``operand`` so that it becomes ``wanted``; False if it cannot."""
        found = self._site_of(operand)
        if found is None:
            return False
        site, placed = found[0], found[1](wanted)
        if placed is None:
            return False
        before = self.values.get(site.node)
        if isinstance(before, Scaled):
            return placed.same(before)
        self.joined[site.node] = site
        self._update(site.node, placed)
        return True

    def _site_of(self, node: fx.Node) -> tuple[Site, Callable[[Scaled], Scaled | None]] | None:
        """The site that ``node`` is a movement of, and how ids of ``node`` become ids of the site."""
        site = self.sites.of(node)
        if site is not None:
            return site, lambda wanted: Scaled(compact(wanted.ids), wanted.degree)
        chain = [node]
        while self.sites.of(chain[-1]) is None:
            source = operand(chain[-1], 0) if chain[-1].op == "call_function" else None
            if not isinstance(source, fx.Node) or not _moves_only(chain[-1]):
                return None
            chain.append(source)
        site = self.sites.of(chain.pop())
        assert site is not None
        return site, lambda wanted: _invert(site, chain, wanted)

    def _update(self, node: fx.Node, value: Value) -> None:
        before = self.values.get(node)
        if isinstance(value, Scaled):
            value = Scaled(compact(value.ids), value.degree)
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
        refusal = Refusal(reason, node.name, op_name(node))
        for source in node.all_input_nodes:
            self._refuse(self.values.get(source), refusal)

    def _refuse(self, value: Value, refusal: Refusal) -> None:
        for item in value if isinstance(value, list) else [value]:
            if item is not None:
                self.poison(item.used(), refusal)


def _no_rule(node: fx.Node) -> str:
    return f"no scale passes through {op_name(node)}"


def _moves_only(node: fx.Node) -> bool:
    from awqc.rules.movement import is_movement

    return is_movement(node)


def _invert(site: Site, chain: list[fx.Node], wanted: Scaled) -> Scaled | None:
    """Ids of the site such that the movements of ``chain`` (outermost first) turn them into ``wanted``."""
    if all(is_transpose(node) for node in chain):
        return Scaled(compact(wanted.ids.mT if len(chain) % 2 else wanted.ids), wanted.degree)
    size = shape(site.node)
    count = int(torch.Size(size).numel())
    if count > _LARGEST_INVERSE or wanted.ids.numel() > _LARGEST_INVERSE:
        return None
    index = torch.arange(count).reshape(size)
    for node in reversed(chain):
        index = node.target(index, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    ids = torch.full((count,), -1, dtype=wanted.ids.dtype)
    ids[index.flatten()] = wanted.ids.flatten()
    if not torch.equal(ids[index], wanted.ids):
        return None  # one element of the parameter would need two scales
    return Scaled(compact(ids.reshape(size)), wanted.degree)


def seeds(site: Site) -> Iterable[Tensor]:
    """The ways to give a site channels: one along each of its axes, ``ids`` of the site's shape."""
    size = shape(site.node)
    for axis, length in enumerate(size):
        if length > 1:
            index = torch.arange(length, dtype=torch.int32).reshape(
                [-1 if a == axis else 1 for a in range(len(size))]
            )
            yield index.expand(size)
