"""Calibration: tokens move through the graph stage by stage, each op once, and leave statistics behind.

A stage begins where an observed activation is about to be read by linears, and ends where the next one
is. When a stage begins, the inputs of its linears are at hand for every sample, computed by the already
quantized (or, as an option, the float) stages before it. Its linears are quantized from those statistics;
only then do the tokens move on through the new weights. Nothing is ever run twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from awqc.calibration.together import members
from awqc.context import Context
from awqc.errors import ConfigError, NonFiniteError
from awqc.functional import rewrites
from awqc.graph import Graph
from awqc.memory import activations_place, choose_kind, rounded_at_once
from awqc.observers.dependence import dependent_on, weight_only
from awqc.observers.dispatch import Rerouting, choice
from awqc.observers.expert_statistics import ExpertStatistics
from awqc.observers.input_statistics import InputStatistics, split_experts, split_sample
from awqc.observers.products import gram_products, propagation_dtype, rounded_linears
from awqc.observers.samples import Samples
from awqc.observers.stages import Observer, Stage, Stages
from awqc.observers.statistics import Statistics
from awqc.program import Env, Program, execute
from awqc.scaleflow.divisors import Divisor
from awqc.scaleflow.groups import ScaleGroup
from awqc.scaleflow.op import op_name
from awqc.views import ExpertLinear, shape
from awqc.weights import Weights


@dataclass
class Activations:
    """The calibration samples on their way through the graph: live values at the current stage.

    Args:
        graph: the graph they move through.
        stages: its stages.
        context: holds the calibration batches.
    """

    graph: Graph
    stages: Stages
    context: Context
    samples: Samples = field(init=False)
    #: every value of the first sample that a later check may need
    history: Env = field(default_factory=dict)
    #: What was done to the samples since somebody last cleared it: (name of a group, scales) where they were
    #: divided, and ("", None) where they moved on.
    events: list[tuple[str, Tensor | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._nodes = self.graph.nodes
        self._order = self.graph.order()
        self._rewrites = rewrites(self.graph)
        #: nodes that weights alone determine: computed anew wherever they are read
        self.weight_only = weight_only(self.graph)
        self._static: Env = {}
        weights = self.graph.weights
        self._dtype = propagation_dtype(self.context.config.propagate_dtype, weights.dtype, weights.device)
        if self._dtype is not None:
            self.context.report.note("calibration", f"tokens move through products in {self._dtype}")
            if weights.device.type == "cuda":
                self.context.report.note("calibration", "Gram matrices are sums of products in TF32")
        count, ranks = len(self.context.batches), self.context.ranks
        if count < ranks.count:
            raise ConfigError(
                f"{ranks.count} processes and {count} calibration samples: each process needs one, so start "
                "fewer"
            )
        #: Where the samples have come to, and the position that their values are of: it lies behind where
        #: what is live there would take too much memory. Then it is computed anew when it is needed.
        self._position = self._held = 0
        self._rerouted = self._rerouting() if self.context.config.calibrate_all_experts else {}
        self._run_static()
        mine, limit = ranks.mine(self.context.batches), self.context.limit
        place, self._allowed = activations_place(self._narrowest(), limit, weights.device)
        if place != "device":
            self.context.report.note("calibration", f"activations are kept on the {place} between stages")
        self.samples = Samples(len(mine), weights.device, place, self.context.scratch)
        for index, batch in enumerate(mine):
            self.samples[index] = {n: batch[str(n.target)].to(weights.device) for n in self.graph.inputs}
        self._move(self.stages.stages[0].start if self.stages.stages else 0)

    @property
    def resident(self) -> int:
        """Bytes of samples on the device."""
        held, ranks = self._bytes(self._held), self.context.ranks
        own = -(-len(self.context.batches) // ranks.count)
        return held if self.samples.place == "device" else 2 * held // own

    def advance(self, stage: Stage) -> None:
        """Run ``stage`` on every sample with the current weights; a second call does nothing."""
        if self.are_at(stage):
            self.events.append(("", None))
            self._move(stage.end if stage is not self.stages.stages[-1] else stage.start)

    def are_at(self, stage: Stage) -> bool:
        """Whether the samples have come to ``stage`` and no further."""
        return self._position == stage.start

    def observe(self, stage: Stage) -> Statistics:
        """Statistics of the stage's activations over all samples.

        Raises:
            NonFiniteError: if one of them is NaN or Inf; names the first op that made it so.
        """
        device, config = self.graph.weights.device, self.context.config
        group, limit = config.group_size, self.context.limit
        kind = choose_kind(stage.observers, limit, device, group, True, self.resident)
        at_once = rounded_at_once(stage.observers, kind, limit, device, group, self.resident)
        statistics = Statistics(kind, at_once)
        for observer in stage.observers:
            tokens = math.prod(shape(observer.node)[:-1]) * len(self.context.batches)
            if observer.linears:
                width = observer.linears[0].in_features
                statistics[observer.node] = InputStatistics.empty(width, device, kind, group, tokens)
            if observer.stacks:
                view, least = observer.stacks[0], config.min_expert_tokens
                by_expert = ExpertStatistics(view, least, device, kind, group, tokens)
                statistics.by_expert[observer.node] = by_expert
        routed = [s.view for s in statistics.by_expert.values() if s.view not in self._rerouted]
        dispatched = [node for view in routed for node in (view.x, view.offsets) if node is not None]
        ranks, count = self.context.ranks, len(self.context.batches)
        wanted = [*statistics, *dispatched]
        program: Program | None = None
        for start in range(0, count, ranks.count):
            # One sample of each process; at the end some have none left.
            sample = self.samples[start // ranks.count] if start + ranks.rank < count else None
            values: Env = {}
            if sample is not None:
                values = {**self._static, **sample}
                # What is known of one sample is known of all.
                program = program or self._program(wanted, values, self._calls_behind(wanted))
                program.run(values, self.graph.weights)
            self._add(statistics, values, sample, start)
        for observer in stage.observers:
            with self._products():
                finished = statistics.finish(observer.node, ranks)
            for found in finished:
                # A NaN or Inf anywhere makes these sums non-finite.
                total = found.mean_abs.sum() + found.gram.diagonal().sum() + found.held_out.diagonal().sum()
                if not bool(torch.isfinite(total)):
                    self._raise_non_finite(observer)
        if kind == "offloaded":
            statistics.offload()
        self.graph.weights.release()  # of stages before, where activations were computed anew
        return statistics

    def _add(self, statistics: Statistics, values: Env, sample: Env | None, first: int) -> None:
        """Account for one sample of each process, those from number ``first`` on; None where this process has
        none left."""
        ranks, count = self.context.ranks, len(self.context.batches)
        for node, found in statistics.items():
            width = found.mean_abs.shape[0]
            x = found.mean_abs.new_empty(0, width) if sample is None else values[node].reshape(-1, width)
            for index, each in enumerate(ranks.gather(x), first):
                for rows, held_out in split_sample(each, index, count) if index < count else ():
                    with self._products():
                        found.add(rows, held_out, ranks)
        for by_expert in statistics.by_expert.values():
            own = None if sample is None else self._expert_rows(by_expert.view, values, sample)
            for index, (x, counts) in enumerate(self._gathered(own, by_expert.view), first):
                for rows, those, held_out in split_experts(x, counts, index, count) if index < count else ():
                    with self._products():
                        by_expert.add(rows, those, held_out, ranks)

    def _products(self) -> AbstractContextManager[None]:
        """The precision of those that add up Gram matrices; nothing else is computed within."""
        return gram_products(self._dtype, self.graph.weights.device)

    def _gathered(
        self, own: tuple[Tensor, list[int]] | None, view: ExpertLinear
    ) -> list[tuple[Tensor, list[int]]]:
        """The rows by expert of every process, none of one that has none left."""
        ranks = self.context.ranks
        nothing = torch.empty(0, view.in_features, device=self.graph.weights.device)
        x, counts = own or (nothing, [0] * view.count)
        return list(zip(ranks.gather(x), ranks.agree("", counts), strict=True))

    def _calls_behind(self, wanted: Iterable[fx.Node]) -> Mapping[fx.Node, Callable[..., Any]]:
        """What to call for linears whose results are not held, though the samples have passed them."""
        if self._held == self._position:
            return {}
        return rounded_linears(self._missing(wanted, {**self._static, **self.samples[0]}), self._dtype)

    def _expert_rows(self, view: ExpertLinear, values: Env, sample: Env) -> tuple[Tensor, list[int]]:
        """Rows ``(S, K)`` of a sample, sorted by expert, and how many each has."""
        if view.offsets is not None and view not in self._rerouted:
            ends = values[view.offsets].tolist()
            return values[view.x][: ends[-1]], [end - start for start, end in pairwise([0, *ends])]
        if view in self._rerouted:
            parts = list(self._rerouted[view].rows(sample, self.evaluate))
        else:
            # An expert's block has a row for every token; those it does not serve are zero.
            parts = [x[x.any(-1)] for x in values[view.x]]
        return torch.cat(parts), [len(part) for part in parts]

    def fold(self, group: ScaleGroup, scales: Tensor) -> None:
        """Follow the fold of ``scales`` into ``group``: values computed before it are divided alike."""
        self.events.append((group.name, scales))
        divisors: dict[fx.Node, Divisor | None] = {}
        for index, sample in enumerate(self.samples):
            if _divide(sample, group, scales, divisors):
                self.samples[index] = sample
        _divide(self.history, group, scales, divisors)

    def evaluate(
        self,
        wanted: Iterable[fx.Node],
        known: Env,
        weights: Weights | None = None,
    ) -> Env:
        """Values of ``wanted``, computed from ``known`` and the current weights (or ``weights``) where
        they are missing."""
        wanted = list(wanted)
        env = {**self._static, **known}
        self._program(wanted, env).run(env, weights or self.graph.weights)
        return {node: env[node] for node in wanted}

    def _program(
        self,
        wanted: Iterable[fx.Node],
        known: Env,
        calls: Mapping[fx.Node, Callable[..., Any]] = MappingProxyType({}),
    ) -> Program:
        """What computes ``wanted`` from ``known``, which stays."""
        return Program(self._missing(wanted, known), [*wanted, *known], calls)

    def _missing(self, wanted: Iterable[fx.Node], env: Env) -> list[fx.Node]:
        """Nodes to run, in order, so that every wanted value exists."""
        needed: set[fx.Node] = set()
        queue: list[fx.Node] = list(wanted)
        again: set[fx.Node] = set()
        while queue:
            node = queue.pop()
            if (node in env and node not in again) or node in needed or node.op != "call_function":
                continue
            needed.add(node)
            queue.extend(node.all_input_nodes)
            # What is made anew has to be written anew, also by ops whose results are known.
            again.update(self._rewrites.get(node, ()))
            queue.extend(self._rewrites.get(node, ()))
        return sorted(needed, key=self._order.__getitem__)

    def _run_static(self) -> None:
        """Masks, positions, rotations: the same for every sample, so computed once and shared."""
        varying = dependent_on(self.graph, lambda n: n.op == "placeholder")
        nodes = [n for n in self._nodes if n.op == "call_function" and n not in varying | self.weight_only]
        execute(nodes, self._static, self.graph.weights)

    def _rerouting(self) -> dict[ExpertLinear, Rerouting]:
        found = {}
        for view in (view for stage in self.stages for view in stage.stacks):
            chosen = choice(view)
            if chosen is not None:
                found[view] = Rerouting(view, chosen)
            else:
                self.context.report.note(
                    "calibrate", f"{view.name}: no tensor says which experts a token goes to: routed as ever"
                )
        return found

    def _move(self, end: int) -> None:
        start, self._position = self._held, end
        if self._held and self._bytes(self._held) < self._bytes(end) > self._allowed:
            self.context.report.note("calibration", "wide activations are computed twice to save memory")
            return
        self._held = end
        run = [
            n
            for n in self._nodes[start:end]
            if n.op == "call_function" and n not in self._static and n not in self.weight_only
        ]
        before = {operand for n in run for operand in n.all_input_nodes if operand in self.weight_only}
        run = sorted({*run, *self._missing(before, {})}, key=self._order.__getitem__)
        keep = self._live(end)
        calls = rounded_linears(run, self._dtype)
        first, others = Program(run, None, calls), Program(run, keep, calls)
        for index, sample in enumerate(self.samples):
            env = {**self._static, **sample}
            (others if index else first).run(env, self.graph.weights)
            if index == 0:
                self.history.update({n: env[n] for n in (*sample, *run) if n not in self.weight_only})
            self.samples[index] = {n: env[n] for n in keep if n not in self._static}
        self._prune_history(end)

    def _bytes(self, position: int) -> int:
        """Of everything live at ``position``, for all samples."""
        live = [n.meta["val"] for n in self._live(position) if n not in self._static]
        one = sum(t.nbytes for value in live for t in tree_flatten(value)[0] if isinstance(t, Tensor))
        # The same in every process, whichever has one more.
        return one * -(-len(self.context.batches) // self.context.ranks.count)

    def _narrowest(self) -> int:
        """Bytes where least is live between two stages."""
        return min((self._bytes(stage.start) for stage in self.stages), default=0)

    def _live(self, position: int) -> list[fx.Node]:
        order, pinned = self._order, self._pinned(position)
        return [
            n
            for n in self._nodes[:position]
            if n.op in ("call_function", "placeholder")
            and n not in self.weight_only
            and (n in pinned or any(order[u] >= position for u in n.users))
        ]

    def _pinned(self, position: int) -> set[fx.Node]:
        """What stages from ``position`` on need to know though no op reads it any more."""
        stages = [stage for stage in self.stages if stage.start >= position]
        values = [value for stage in stages for group in stage.groups for value in group.values.values()]
        pinned = {value.routing.key for value in values if value.routing is not None}
        for view in (view for stage in stages for view in stage.stacks if view in self._rerouted):
            pinned |= self._rerouted[view].needs
        return pinned

    def _prune_history(self, position: int) -> None:
        """Keep what a check of a later stage can need: from the first value that a group scales on."""
        horizon = min(
            (
                self._order[n]
                for s in self.stages
                if s.start >= position
                for g in s.groups
                for n in g.values
                if n not in self.weight_only and n.op == "call_function"
            ),
            default=len(self._order),
        )
        pinned = self._pinned(position)
        self.history = {
            n: v
            for n, v in self.history.items()
            if n in pinned or any(self._order[u] >= horizon for u in n.users)
        }

    def _raise_non_finite(self, observer: Observer) -> None:
        observed = observer.node
        found: list[fx.Node] = []

        def watch(node: fx.Node, value: object) -> None:
            if not found and isinstance(value, Tensor) and value.is_floating_point():
                # -Inf is how masks say "never": a fault only where a linear would read it.
                bad = value.isnan() | (value == float("inf"))
                if node is observed:
                    bad |= value.isinf()
                if bool(bad.any()):
                    found.append(node)

        weights = self.graph.weights.like(self.graph.weights.dtype)
        weights.streamed = True  # from the first layer on, though all may not fit
        for index, batch in enumerate(self.context.batches):
            env: Env = {n: batch[str(n.target)].to(weights.device) for n in self.graph.inputs}
            upto = self._nodes[: self._order[observed] + 1]
            execute(upto, env, weights, keep=[observed], tap=watch)
            if found:
                node = found[0]
                which = " or ".join(map(str, members(index, self.context.rows)))
                raise NonFiniteError(
                    f"calibration sample {which} makes {observed.name!r}, the input of {observer.name!r}, "
                    f"NaN or Inf; the first op to do so is {op_name(node)} ({node.name}): check the weights "
                    "it reads, or leave the sample out"
                )
        raise NonFiniteError(
            f"the values of {observed.name!r}, the input of {observer.name!r}, are too large to square in "
            "float32: check the weights before it"
        )


def _divide(env: Env, group: ScaleGroup, scales: Tensor, divisors: dict[fx.Node, Divisor | None]) -> bool:
    """Divide the values in ``env`` that ``scales`` divide; whether there are any.

    Args:
        divisors: of nodes, the same in every sample; filled here.
    """
    found = False
    for node in [node for node in env if node in group.values]:
        if node not in divisors:
            divisors[node] = group.divisor(node, scales)
        divisor = divisors[node]
        if divisor is not None:
            env[node], found = env[node] / divisor.at(env).to(env[node].dtype), True
    return found
