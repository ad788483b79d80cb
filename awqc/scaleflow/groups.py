"""Scale groups: which linears share an input scale, who absorbs it, and why the others have none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from awqc.graph import Graph
from awqc.scaleflow.divisors import Divisor
from awqc.scaleflow.flow import Flow, seeds
from awqc.scaleflow.op import Refusal
from awqc.scaleflow.refusals import Refusals
from awqc.scaleflow.routing import Families
from awqc.scaleflow.scaled import Scaled, unexpanded
from awqc.scaleflow.sites import Part, Sites, find_sites, fold
from awqc.views import ExpertLinear, Linear, expert_linears, linears
from awqc.weights import Weights


@dataclass(frozen=True)
class ScaleGroup:
    """A scale vector that can be folded without changing the model's function.

    Args:
        name: the name of the parameter the flow started from.
        channels: length of the scale vector; channels that were refused stay at scale 1.
        alive: ``(channels,)`` bool, which channels may differ from 1.
        producers: parts with positive degree: divided.
        consumers: parts with negative degree: multiplied. All readers, quantized or not.
        linears: parameter names of the linears among the consumers, those of experts too.
        values: abstract value of every tensor in between, by node.
        families: what ids stand for where the channel depends on the expert.
        refused: what stopped the channels that are not alive.
    """

    name: str
    channels: int
    alive: Tensor
    producers: tuple[Part, ...]
    consumers: tuple[Part, ...]
    linears: tuple[str, ...]
    values: Mapping[fx.Node, Scaled] = field(repr=False)
    families: Families = field(repr=False)
    refused: tuple[Refusal, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """Producers, then consumers."""
        return self.producers + self.consumers

    def at_input(self, node: fx.Node) -> tuple[Tensor, float]:
        """Channel ids ``(K,)`` and degree of the activation ``node`` (..., K), refused ones -1."""
        value = self.values[node]
        return self._living(value.ids[(0,) * (value.ids.ndim - 1)]), value.degree

    def at_experts(self, view: ExpertLinear) -> tuple[Tensor, float]:
        """Channel ids ``(E, K)`` and degree of the input of each expert, refused ones -1."""
        value = self.values[view.x]
        if value.ids.ndim == 3:  # a block (T, K) for each
            return self._living(value.ids[:, 0]), value.degree
        return self._living(self.families.table(value.ids[0], view.count)), value.degree

    def divisor(self, node: fx.Node, scales: Tensor) -> Divisor | None:
        """What divides the tensor of ``node`` when the group is folded with ``scales`` ``(channels,)``; None
        if nothing does."""
        value = self.values.get(node)
        if value is None:
            return None
        core = value.core()
        if value.routing is None or not self.families.hold(core):
            return Divisor(self._divided(core, scales, value.degree))
        # Ids repeat: what each stands for at each expert is looked up once, not for every row.
        distinct, kinds = core.unique(return_inverse=True)
        table = self._divided(self.families.table(distinct, self.families.largest), scales, value.degree)
        rows = unexpanded(value.routing.rows).to(scales.device)
        return Divisor(table, replace(value.routing, rows=rows), kinds.to(scales.device))

    def _divided(self, ids: Tensor, scales: Tensor, degree: float) -> Tensor:
        padded = torch.cat([scales, scales.new_ones(1)])  # id -1 picks the last element
        return padded[self._living(ids).to(scales.device)] ** degree

    def _living(self, ids: Tensor) -> Tensor:
        padded = torch.cat([self.alive, torch.zeros(1, dtype=torch.bool)])
        return torch.where(padded[ids.long()], ids, -1).long()

    def fold(self, scales: Tensor, weights: Weights) -> None:
        """Fold ``scales`` ``(channels,)`` into every parameter of the group."""
        for part in self.parts:
            fold(part, scales, weights)


@dataclass
class ScaleGroups:
    """All groups of a graph.

    Args:
        groups: at most one for each linear.
        refusals: parameter name of every other linear -> why no scale reaches it.
    """

    groups: list[ScaleGroup]
    refusals: dict[str, str]

    def __iter__(self) -> Iterator[ScaleGroup]:
        return iter(self.groups)

    def of(self, parameter: str) -> ScaleGroup | None:
        """The group whose scale the linear with this weight undoes."""
        return next((g for g in self.groups if parameter in g.linears), None)


def find_groups(graph: Graph) -> ScaleGroups:
    """Follow every site of the graph; keep the flows that end in linears.

    Where several flows reach one linear, the one that reaches most linears wins, then the one that keeps
    most channels, then the first in the order of the graph.
    """
    # Ids are small and read all the time: they stay on the CPU, also under a user's `with torch.device(...)`.
    elsewhere = torch.get_default_device().type != "cpu"
    # Threads gain nothing on them, and wait for each other where others use the processors.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.device("cpu") if elsewhere else nullcontext():
            return _find_groups(graph)
    finally:
        torch.set_num_threads(threads)


def _find_groups(graph: Graph) -> ScaleGroups:
    sites = graph.facts.get(Sites)
    if sites is None:
        sites = find_sites(graph)
    order = graph.order()
    views: list[Linear | ExpertLinear] = [*linears(graph), *expert_linears(graph)]
    by_name = {view.parameter: view for view in views}
    found: list[ScaleGroup] = []
    refusals = Refusals(views, order)
    for node in graph.nodes:
        site = sites.of(node)
        if site is None or not node.meta["val"].is_floating_point():
            continue
        for seed in seeds(site):
            flow = Flow(graph, sites, order).run({node: seed})
            group = _group(flow, site.parameter, views)
            if group is not None:
                found.append(group)
            refusals.add(flow)
    chosen = _choose(found, order)
    taken = {name for group in chosen for name in group.linears}
    return ScaleGroups(chosen, {name: refusals.of(name) for name in by_name if name not in taken})


def _group(flow: Flow, name: str, views: Iterable[Linear | ExpertLinear]) -> ScaleGroup | None:
    parts = flow.parts()
    consumers = tuple(p for p in parts if p.degree < 0)
    read = {view.parameter for view in views if view.x in flow.values}
    names = tuple(p.parameter for p in consumers if p.parameter in read)
    if not names:
        return None
    values = {n: v for n, v in flow.values.items() if isinstance(v, Scaled)}
    producers = tuple(p for p in parts if p.degree > 0)
    return ScaleGroup(
        name,
        flow.channels,
        flow.alive,
        producers,
        consumers,
        names,
        values,
        flow.families,
        tuple(flow.refusals),
    )


def _choose(found: list[ScaleGroup], order: Mapping[fx.Node, int]) -> list[ScaleGroup]:
    chosen: list[ScaleGroup] = []
    taken: set[str] = set()
    for group in sorted(found, key=lambda g: (-len(g.linears), -int(g.alive.sum()))):
        if taken.isdisjoint(group.linears):
            chosen.append(group)
            taken.update(group.linears)
    first = {id(g): min(order[reader] for p in g.consumers for reader in p.site.node.users) for g in chosen}
    return sorted(chosen, key=lambda g: first[id(g)])


def random_scales(group: ScaleGroup, generator: torch.Generator) -> Tensor:
    """Scales log-uniform in [1/4, 4], float64; refused channels 1."""
    scales = torch.exp2(torch.rand(group.channels, generator=generator, dtype=torch.float64) * 4 - 2)
    return torch.where(group.alive, scales, 1.0)
