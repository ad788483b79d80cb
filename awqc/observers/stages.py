"""Where the graph is observed, and the stages that it is cut into at those activations.

A stage begins where an observed activation is about to be read by linears, and ends where the next one is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from awqc.graph import Graph
from awqc.scaleflow.groups import ScaleGroup, ScaleGroups
from awqc.views import ExpertLinear, Linear, expert_linear, linear


@dataclass(frozen=True)
class Observer:
    """An activation ``(..., K)`` that quantizable linears read.

    Args:
        node: what computes it.
        linears: the linears that read it, in execution order.
        group: the scale group whose scale divides it, if any.
        stacks: the linears of experts that read it, each expert its own rows.
    """

    node: fx.Node
    linears: tuple[Linear, ...]
    group: ScaleGroup | None
    stacks: tuple[ExpertLinear, ...] = ()

    @property
    def views(self) -> tuple[Linear | ExpertLinear, ...]:
        """Linears and stacks."""
        return (*self.linears, *self.stacks)

    @property
    def in_features(self) -> int:
        """``K``."""
        return self.views[0].in_features

    @property
    def name(self) -> str:
        """The first linear's name: what the report calls this activation."""
        return self.views[0].name


@dataclass(frozen=True)
class Observers:
    """All observed activations in execution order."""

    observers: tuple[Observer, ...]

    def __iter__(self) -> Iterator[Observer]:
        return iter(self.observers)


@dataclass(frozen=True)
class Stage:
    """Nodes ``[start, end)`` of the graph and the activations that its linears read."""

    index: int
    start: int
    end: int
    observers: tuple[Observer, ...]

    @property
    def linears(self) -> list[Linear]:
        """All linears of the stage, in the order of their observers."""
        return [view for observer in self.observers for view in observer.linears]

    @property
    def stacks(self) -> list[ExpertLinear]:
        """All linears of experts of the stage."""
        return [view for observer in self.observers for view in observer.stacks]

    @property
    def groups(self) -> list[ScaleGroup]:
        """The distinct scale groups of the stage's activations."""
        unique = {id(o.group): o.group for o in self.observers if o.group is not None}
        return list(unique.values())


@dataclass(frozen=True)
class Stages:
    """The stages of a graph in execution order."""

    stages: tuple[Stage, ...]

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)


def place_observers(graph: Graph, kept: Mapping[str, str]) -> Observers:
    """One observer for every distinct activation that linears or stacks not in ``kept`` read."""
    groups = graph.facts[ScaleGroups]
    readers: dict[fx.Node, list[Linear | ExpertLinear]] = {}
    seen = set(kept)
    for node in graph.nodes:
        view = linear(node) or expert_linear(node)
        if view is not None and view.parameter not in seen:
            seen.add(view.parameter)
            read = view.input if isinstance(view, Linear) else view.x
            readers.setdefault(read, []).append(view)
    return Observers(
        tuple(
            Observer(
                node,
                tuple(view for view in views if isinstance(view, Linear)),
                groups.of(views[0].parameter),
                tuple(view for view in views if isinstance(view, ExpertLinear)),
            )
            for node, views in readers.items()
        )
    )


def split_stages(graph: Graph, observers: Observers) -> Stages:
    """Cut the graph where a stage's first linear runs; inputs of one group belong to one stage."""
    order = graph.order()
    by_group: dict[int, list[Observer]] = {}
    for observer in observers:
        key = id(observer.group) if observer.group is not None else id(observer)
        by_group.setdefault(key, []).append(observer)
    starts = sorted(
        (min(order[view.node] for o in members for view in o.views), members) for members in by_group.values()
    )
    ends = [start for start, _ in starts[1:]] + [order[graph.output]]
    return Stages(
        tuple(
            Stage(i, start, end, tuple(members))
            for i, ((start, members), end) in enumerate(zip(starts, ends, strict=True))
        )
    )
