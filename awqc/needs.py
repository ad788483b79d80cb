"""What a compile needs of memory, by stage, from the shapes in its graph: for plans, and to stop one that
cannot end before it begins.

The formulas are those by which the compile itself decides (:mod:`awqc.memory`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from awqc.config import QuantConfig
from awqc.errors import ConfigError
from awqc.functional import bases
from awqc.graph import Graph
from awqc.memory import (
    FLOAT,
    Kind,
    MemoryLimit,
    activations_place,
    choose_kind,
    observing_bytes,
    rounded_at_once,
    stage_bytes,
    weight_bytes,
)
from awqc.observers.dependence import dependent_on, weight_only
from awqc.observers.stages import Stage, Stages
from awqc.views import expert_linear, linear

#: Bytes for each weight while tokens move through it: in float32, in 16 bits, and its code.
_MOVING = FLOAT + 2 + 1


@dataclass(frozen=True)
class StageNeeds:
    """Bytes on the compute device, unless said otherwise.

    Args:
        name: the first linear of the stage.
        kind: how statistics are held.
        at_once: elements that compensated rounding handles at once.
        activations: of all samples, where the stage begins.
        offloaded: of Gram matrices on the host.
        passes: the most that a pass over the stage needs, activations and statistics included.
        moving: what it takes to move one sample after the other to the next stage.
        together: whether products take all experts at once, as on a GPU.
    """

    name: str
    kind: Kind
    at_once: int
    activations: int
    offloaded: int
    passes: int
    moving: int
    together: bool = False

    @property
    def peak(self) -> int:
        """The most at any time."""
        return max(self.passes, self.moving)


@dataclass(frozen=True)
class Needs:
    """Bytes that calibration needs on the compute device.

    Args:
        stages: in their order.
        place: where activations are kept between stages.
        narrowest: bytes of all activations where least is live.
    """

    stages: list[StageNeeds]
    place: Literal["device", "host", "disk"]
    narrowest: int

    @property
    def largest(self) -> StageNeeds:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.peak)


def stage_needs(
    graph: Graph,
    samples: int,
    limit: MemoryLimit,
    device: torch.device,
    group: int = 128,
    compensated: bool = True,
) -> Needs:
    """What each stage of ``graph``, which holds shapes alone, will need.

    Args:
        samples: calibration sequences that one process moves.
        limit, device: of the compile.
        group: input channels that share a scale.
        compensated: whether weights are rounded with error compensation.
    """
    live = _Liveness(graph)
    stages = list(graph.facts[Stages])
    at = [samples * live.between(stage.start) for stage in stages]
    narrowest = min(at)
    place, allowed = activations_place(narrowest, limit, device)
    found, held, again = [], at[0], 0
    for number, stage in enumerate(stages):
        # What is too wide is computed anew from where it is narrower.
        if number and held < at[number] > allowed:
            again += _moving(live, stages[number - 1])
        else:
            held, again = at[number], 0
        resident = held if place == "device" else 2 * held // max(samples, 1)
        kind = choose_kind(stage.observers, limit, device, group, compensated, resident)
        at_once = rounded_at_once(stage.observers, kind, limit, device, group, resident)
        passes = stage_bytes(stage.observers, kind, group, compensated, resident, at_once)
        passes = max(passes, resident + again + observing_bytes(stage.observers, kind, group))
        offloaded = observing_bytes(stage.observers, "full", group) if kind == "offloaded" else 0
        last = number == len(stages) - 1  # nothing is quantized behind it, so nothing moves there
        moving = resident + again + (0 if last else _moving(live, stage))
        name = stage.observers[0].name
        together = device.type == "cuda"
        found.append(StageNeeds(name, kind, at_once, resident, offloaded, passes, moving, together))
    return Needs(found, place, narrowest)


def _moving(live: _Liveness, stage: Stage) -> int:
    """Everything that one sample computes in ``stage``, and its weights, which are cast once for all."""
    nodes = live.nodes[stage.start : stage.end]
    views = [view for node in nodes if (view := linear(node) or expert_linear(node)) is not None]
    computed = sum(live.size[node] for node in nodes if node in live.size)
    return computed + weight_bytes(views) * _MOVING // FLOAT


def check_fits(graph: Graph, samples: int, limit: MemoryLimit, config: QuantConfig) -> None:
    """Stop a compile that cannot end before it begins.

    Args:
        samples: calibration sequences that one process moves.
        limit: that the user has stated; without one, what the device has is the limit.

    Raises:
        ConfigError: naming the stage that needs too much, and the option that would make it fit.
    """
    device = graph.weights.device
    stated, there = limit.device is not None, limit if limit.device is not None else available(device)
    least = stage_needs(graph, samples, there, device, config.group_size)
    worst, room = least.largest, there.device or 0
    where = f"{worst.name!r} needs {_size(worst.peak)} on {device}"
    if worst.peak > room:
        fewer = ""
        if least.place == "device" and worst.activations > worst.peak - room:
            share = 1 - (worst.peak - room) / worst.activations
            fewer = f", or at most {max(1, int(samples * share))} samples (max_calib_samples)"
        more = f"give max_memory='{_size(worst.peak, up=True)}' or more" if stated else "use a larger device"
        said = "max_memory allows" if stated else "there are"
        raise ConfigError(
            f"the stage of {where} even with sampled statistics and {said} {_size(room)}: {more}{fewer}"
        )
    if stated or device.type != "cpu":
        return  # a GPU that runs out of memory says so, and the stage is done again with less
    whole = stage_needs(graph, samples, limit, device, config.group_size).largest
    if whole.peak > room:
        raise ConfigError(
            f"the stage of {whole.name!r} needs {_size(whole.peak)} of memory and {_size(room)} are there: "
            f"give max_memory='{_size(room)}', and it is done with less"
        )


def available(device: torch.device) -> MemoryLimit:
    """What a device has to offer: of a GPU all, of the host what is free."""
    host = int(psutil.virtual_memory().available)
    if device.type != "cuda":
        return MemoryLimit(host, host)
    return MemoryLimit(torch.cuda.get_device_properties(device).total_memory, host)


def _size(count: int, up: bool = False) -> str:
    """Bytes as ``max_memory`` takes them, with two digits after the point, rounded ``up`` if asked for."""
    unit, name = (10**9, "GB") if count >= 10**9 else (10**6, "MB")
    return f"{(math.ceil if up else round)(100 * count / unit) / 100:g}{name}"


class _Liveness:
    """Which values of one sample are there at a time; a view is the memory of what it is a view of."""

    def __init__(self, graph: Graph) -> None:
        self.nodes: Sequence[fx.Node] = graph.nodes
        order, base = graph.order(), bases(graph)
        varying = dependent_on(graph, lambda node: node.op == "placeholder") - weight_only(graph)
        counted = [n for n in self.nodes if n in varying and n.op in ("placeholder", "call_function")]
        #: Bytes of each value that has memory of its own.
        self.size = {n: _bytes(n.meta.get("val")) for n in counted if base[n] is n}
        last = dict.fromkeys(self.size, -1)
        for node in counted:
            owner = base[node]
            if owner in last:
                last[owner] = max([last[owner], *(order[user] for user in node.users)])
        changes = [0] * (len(self.nodes) + 2)
        for node, size in self.size.items():
            changes[order[node] + 1] += size
            changes[max(last[node], order[node]) + 1] -= size
        self._live = list(accumulate(changes))

    def between(self, position: int) -> int:
        """Bytes that nodes from ``position`` on read, or nodes behind them."""
        return self._live[position]


def _bytes(value: Any) -> int:
    return sum(t.nbytes for t in tree_flatten(value)[0] if isinstance(t, Tensor))
