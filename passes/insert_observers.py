"""Decide what is observed: every activation that a linear to be quantized reads.

Also decides, and reports, which linears are kept in float: those the user named, those that route tokens
to experts (a small error there is a different expert), and the one that computes the model's output (its
error is not averaged by anything after it) unless asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from awqc.config import QuantConfig
from awqc.context import Context
from awqc.errors import ConfigError
from awqc.graph import Graph
from awqc.observers.dispatch import routers
from awqc.observers.stages import Observers, Stages, place_observers, split_stages
from awqc.pipeline import Pass
from awqc.quantization.schemes import Schemes
from awqc.replaceable import MoreThanLinear
from awqc.report import GroupRow, LinearRow
from awqc.scaleflow.groups import ScaleGroups
from awqc.views import ExpertLinear, Linear, expert_linear, linear


@dataclass(frozen=True)
class InsertObservers(Pass):
    """Observers, stages and the scheme of every linear.

    Raises:
        ConfigError: if no linear is left to quantize, or ``group_size`` divides the width of none.
    """

    name: ClassVar[str] = "insert-observers"
    requires: ClassVar[tuple[type, ...]] = (ScaleGroups,)
    provides: ClassVar[tuple[type, ...]] = (Observers, Stages, Schemes)

    def run(self, graph: Graph, context: Context) -> None:
        views: dict[str, Linear | ExpertLinear] = {
            view.parameter: view for node in graph.nodes if (view := linear(node) or expert_linear(node))
        }
        groups, config, decides = graph.facts[ScaleGroups], context.config, routers(graph)
        kept = {p: why for p, view in views.items() if (why := _why_kept(view, config, decides)) is not None}
        for parameter, kind in (graph.facts.get(MoreThanLinear) or {}).items():
            if parameter in views:
                kept.setdefault(parameter, f"it belongs to a {kind}, which does more than a linear with it")
        _check_any_left(views, kept)
        _check_group_size([v for p, v in views.items() if p not in kept], config)
        graph.facts[Schemes] = Schemes({p: config.scheme for p in views if p not in kept})
        graph.facts[Observers] = place_observers(graph, kept)
        graph.facts[Stages] = split_stages(graph, graph.facts[Observers])
        for parameter, view in views.items():
            group = groups.of(parameter)
            context.report.linears[parameter] = LinearRow(
                view.name,
                view.out_features,
                view.in_features,
                "kept" if parameter in kept else "quantized",
                kept.get(parameter, ""),
                scheme="" if parameter in kept else str(config.scheme),
                group=group.name if group else None,
                no_group=groups.refusals.get(parameter, ""),
                expert_count=view.count if isinstance(view, ExpertLinear) else None,
            )
        for group in groups:
            names = [views[p].name for p in group.linears]
            context.report.groups[group.name] = GroupRow(
                group.name, names, group.channels, int(group.alive.sum())
            )


def _why_kept(view: Linear | ExpertLinear, config: QuantConfig, decides: Mapping[str, str]) -> str | None:
    pattern = config.keeps(view.name)
    if pattern is not None:
        return f"matches keep pattern {pattern!r}"
    if view.parameter in decides:
        return f"decides which experts of {decides[view.parameter]} a token goes to"
    if view.out_features == 1:
        return "has a single output: nothing to gain"
    if not config.quantize_head and _is_output(view.node):
        return "computes the model's output (quantize_head=True quantizes it)"
    if isinstance(view, Linear) and not view.parameter.endswith(".weight"):
        return "its weight is a parameter of its own, not that of a module that could be replaced"
    if view.other_readers:
        return f"its weight is also read by {view.other_readers[0].name}, so it must stay in float"
    return None


def _is_output(node: fx.Node) -> bool:
    """Whether an output of the model is computed from ``node`` alone, by ops that are no linears."""
    while not any(user.op == "output" for user in node.users):
        following = next(iter(node.users), None)
        if following is None or len(node.users) > 1 or linear(following) or expert_linear(following):
            return False
        if any(n is not node and n.op != "get_attr" for n in following.all_input_nodes):
            return False
        node = following
    return True


def _check_any_left(views: Mapping[str, Linear | ExpertLinear], kept: Mapping[str, str]) -> None:
    if not views:
        raise ConfigError("nothing to quantize: the graph holds no linear over a parameter")
    if len(kept) == len(views):
        parameter, why = next(iter(kept.items()))
        raise ConfigError(
            f"nothing to quantize: all {len(views)} linears stay in float, such as "
            f"{views[parameter].name!r}: {why}"
        )


def _check_group_size(views: list[Linear | ExpertLinear], config: QuantConfig) -> None:
    size = config.group_size
    widths = sorted({view.in_features for view in views})
    if size != -1 and widths and not any(width % size == 0 for width in widths):
        fits = [str(g) for g in (32, 64, 128, 256) if any(w % g == 0 for w in widths)]
        raise ConfigError(
            f"group_size={size} divides the input width of none of the {len(views)} linears "
            f"({', '.join(map(str, widths))}): use {', '.join([*fits, '-1 (whole rows)'])}"
        )
