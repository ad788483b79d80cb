"""Passes and the pipeline that proves their order, runs them, and checks what they promise.

A pass is a frozen dataclass whose fields are its options. It declares the facts that it ``requires``,
``provides`` and ``consumes`` (makes stale), and whether the graph's function is ``"equal"`` or
``"lossy"`` afterwards. The order is proven from the declarations before anything runs; after each pass
the graph is verified, and a pass that promised ``"equal"`` is held to it by running the graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import ClassVar, Literal

from awqc.context import Context
from awqc.errors import PipelineError, VerifyError
from awqc.flags import Flags
from awqc.graph import Graph
from awqc.memory import Kind
from awqc.needs import check_fits
from awqc.observers.activations import Activations
from awqc.observers.stages import Observer, Stage, Stages
from awqc.observers.statistics import Statistics
from awqc.quantization.scales import FoldedScales
from awqc.retries import Retries
from awqc.text import diff_text
from awqc.verify import StageCheck, check_equal
from awqc.work import Work


@dataclass(frozen=True)
class Pass(ABC):
    """One transformation or analysis of a graph.

    Class attributes:
        name: what the pipeline, the report and the command line call it.
        scope: ``"graph"`` runs once over the whole graph; ``"stage"`` runs for each stage in turn, with
            ``context.stage`` set, before the stage's tokens move on.
        requires: facts that must be there.
        provides: facts that it adds.
        consumes: facts that are stale afterwards and are dropped.
        output: ``"equal"`` if the model's function is unchanged (checked), ``"lossy"`` if not.
        repeatable: whether it may be run again after it has stopped halfway, out of memory. A pass that has
            changed nothing by then always may.
    """

    name: ClassVar[str]
    scope: ClassVar[Literal["graph", "stage"]] = "graph"
    requires: ClassVar[tuple[type, ...]] = ()
    provides: ClassVar[tuple[type, ...]] = ()
    consumes: ClassVar[tuple[type, ...]] = ()
    output: ClassVar[Literal["equal", "lossy"]] = "equal"
    repeatable: ClassVar[bool] = False

    @abstractmethod
    def run(self, graph: Graph, context: Context) -> None:
        """Do it: change ``graph``, its weights or its facts; report rows to ``context.report``."""

    def work(
        self, graph: Graph, observers: Sequence[Observer], samples: int, kind: Kind = "full"
    ) -> Work | None:
        """What :meth:`run` will do to a stage with these ``observers``, for plans; None if it is not known.

        Args:
            graph: with shapes alone; its weights may not be read. What the stage needs of memory is among
                its facts, as :class:`awqc.needs.StageNeeds`.
            samples: calibration sequences of the shape that the graph has.
            kind: how the statistics of the stage are held.
        """
        return None


@dataclass(frozen=True)
class Pipeline:
    """An ordered sequence of passes; every editing method returns a new pipeline."""

    passes: tuple[Pass, ...]

    @staticmethod
    def default() -> Pipeline:
        """The pipeline of :func:`awqc.compile`; see ``awqc/driver.py`` for the order."""
        from awqc.driver import default_pipeline

        return default_pipeline()

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def names(self) -> list[str]:
        """Names of the passes in order."""
        return [p.name for p in self.passes]

    def insert_before(self, name: str, new: Pass) -> Pipeline:
        """``new`` right before the pass called ``name``."""
        i = self._index(name)
        return Pipeline((*self.passes[:i], new, *self.passes[i:]))

    def insert_after(self, name: str, new: Pass) -> Pipeline:
        """``new`` right after the pass called ``name``."""
        i = self._index(name) + 1
        return Pipeline((*self.passes[:i], new, *self.passes[i:]))

    def replace(self, name: str, new: Pass) -> Pipeline:
        """``new`` in the place of the pass called ``name``."""
        i = self._index(name)
        return Pipeline((*self.passes[:i], new, *self.passes[i + 1 :]))

    def remove(self, name: str) -> Pipeline:
        """Everything but the pass called ``name``."""
        i = self._index(name)
        return Pipeline((*self.passes[:i], *self.passes[i + 1 :]))

    def with_options(self, name: str, **options: object) -> Pipeline:
        """The pass called ``name`` with some of its fields replaced.

        Raises:
            PipelineError: if the pass has no such option.
        """
        current = self.passes[self._index(name)]
        try:
            return self.replace(name, replace(current, **options))
        except TypeError as error:
            raise PipelineError(f"pass {name!r} has no such option: {error}") from error

    def check_order(self, given: Sequence[type] = ()) -> None:
        """Prove that every pass finds the facts it requires.

        Raises:
            PipelineError: naming the pass, the fact, and the pass that provides it too late or not at all.
        """
        there, of_stage, interrupted = set(given), set[type](), dict[type, str]()
        for i, current in enumerate(self.passes):
            if current.scope == "graph":
                interrupted |= dict.fromkeys(of_stage, current.name)
                of_stage.clear()
            for fact in _required(current):
                if fact not in there:
                    raise PipelineError(self._missing(i, fact))
                if current.scope == "stage" and fact in interrupted:
                    raise PipelineError(
                        f"{current.name!r} requires {fact.__name__} of the stage it runs on, but "
                        f"{interrupted[fact]!r} runs over the whole graph in between: move "
                        f"{interrupted[fact]!r} before or after all passes that run by stage"
                    )
            there -= set(current.consumes)
            there |= set(current.provides)
            if current.scope == "stage":
                of_stage |= set(current.provides)
                interrupted = {fact: name for fact, name in interrupted.items() if fact not in of_stage}

    def run(self, graph: Graph, context: Context, flags: Flags | None = None) -> None:
        """Run all passes on ``graph``.

        Raises:
            PipelineError: if the order is wrong (before anything runs).
            VerifyError: if a pass breaks the graph or a promise.
        """
        flags = flags or Flags.from_environment()
        pipeline = Pipeline(tuple(p for p in self.passes if p.name not in flags.skip))
        _check_names(flags, self.names())
        pipeline.check_order(sorted(graph.facts.kinds(), key=str))
        runner = _Runner(graph, context, flags)
        passes = list(pipeline.passes)
        while passes:
            if passes[0].scope == "graph":
                runner.run_on_graph(passes.pop(0))
                continue
            staged = [p for p in _leading(passes)]
            del passes[: len(staged)]
            runner.run_on_stages(staged, passes)

    def _index(self, name: str) -> int:
        if name not in self.names():
            raise PipelineError(f"no pass is called {name!r}: there are {', '.join(self.names())}")
        return self.names().index(name)

    def _missing(self, index: int, fact: type) -> str:
        name, wanted = self.passes[index].name, fact.__name__
        before = [p.name for p in self.passes[:index] if fact in p.consumes]
        if before:
            return f"{name!r} requires {wanted}, which {before[-1]!r} makes stale: move {name!r} before it"
        later = [p.name for p in self.passes[index + 1 :] if fact in p.provides]
        if later:
            return f"{name!r} requires {wanted}, provided by {later[0]!r}: move it earlier"
        return f"{name!r} requires {wanted}, which no pass of this pipeline provides"


def _required(current: Pass) -> tuple[type, ...]:
    """What ``current`` finds when it runs; a pass that runs by stage needs stages."""
    return current.requires if current.scope == "graph" else (Stages, *current.requires)


def _check_there(graph: Graph, current: Pass) -> None:
    for fact in _required(current):
        if fact not in graph.facts:
            raise PipelineError(
                f"{current.name!r} requires {fact.__name__}, which the pass before it did not leave"
            )


def third_party_passes() -> dict[str, type[Pass]]:
    """Passes of installed packages, by the name of their ``awqc.passes`` entry point."""
    return {entry.name: entry.load() for entry in entry_points(group="awqc.passes")}


def _leading(passes: Sequence[Pass]) -> Iterator[Pass]:
    for current in passes:
        if current.scope != "stage":
            return
        yield current


def _leave_facts(staged: Sequence[Pass], later: Sequence[Pass]) -> bool:
    """Whether a later pass needs what the last stage has left in the facts; scales come from a journal."""
    left = {fact for p in staged for fact in p.provides} - {FoldedScales}
    return any(fact in left for p in later for fact in p.requires)


def _check_names(flags: Flags, names: list[str]) -> None:
    for name in {*flags.skip, *flags.dump}:
        if name not in names and name != "all":
            raise PipelineError(f"no pass is called {name!r}: there are {', '.join(names)}")


class _Runner:
    """Runs passes one by one with verification, checks, timing and dumps."""

    def __init__(self, graph: Graph, context: Context, flags: Flags) -> None:
        self.graph, self.context, self.flags = graph, context, flags
        self._report, self._retries = context.report, Retries(graph, context)
        self._copied: tuple[tuple[int, int], Graph] | None = None

    def run_on_graph(self, current: Pass) -> None:
        equal = current.output == "equal" and self.flags.check
        text = self.graph.text() if self.flags.wants(current.name) else ""
        before, state = self._copy() if equal else None, self._state()
        self._timed(current)
        self.graph.verify()
        if before is not None and self._state() != state:
            with self._report.timed("check"):
                self._check(current, before)
        elif self._state() != state:
            self.context.probe = None
        if text:
            self.flags.write(current.name, self.graph.text(), diff_text(text, self.graph.text()))

    def _check(self, current: Pass, before: Graph) -> None:
        """Compare the graph with what it was: on the probe, or itself where the probe cannot follow."""
        probe = self.context.probe
        if probe is not None and not current.requires:
            small = probe.graph.copy()
            current.run(probe.graph, self.context)
            if probe.mirrors(self.graph):
                check_equal(current.name, small, probe.graph, probe.batch)
                return
        self.context.probe = None
        if self.context.batches:
            check_equal(current.name, before, self.graph, self.context.batches[0])

    def _copy(self) -> Graph:
        """The graph as it is, on nodes of its own: the same copy as long as nothing changes."""
        if self._copied is None or self._copied[0] != self._state():
            self._copied = self._state(), self.graph.copy()
        return self._copied[1]

    def _state(self) -> tuple[int, int]:
        return self.graph.version, self.graph.weights.version

    def run_on_stages(self, passes: list[Pass], later: list[Pass]) -> None:
        self.context.probe = self._copied = None  # from here on weights change, and are checked by stage
        _check_there(self.graph, passes[0])
        stages, context = self.graph.facts[Stages], self.context
        own = len(context.ranks.mine(context.batches))
        check_fits(self.graph, own, context.limit, context.config)
        journal = self.context.journal
        finished = 0
        if journal is not None:
            journal.attach(self.graph)
            finished = min(journal.left, len(stages.stages))
            if finished == len(stages.stages) and _leave_facts(passes, later):
                finished -= 1  # the last is run again for what it knows
        activations: Activations | None = None
        try:
            for number, stage in enumerate(self.context.progress.track(stages.stages, "calibrating")):
                if activations is None and finished < len(stages.stages):
                    activations = self._activations(stages)
                if journal is not None and number < finished:
                    journal.replay(stage, self.graph, activations)
                    continue
                assert activations is not None
                self._read_ahead(stages, number)
                self._run_on_stage(stage, passes, activations)
                if journal is not None:
                    with self._report.timed("journal"):
                        journal.commit(stage, activations)
        finally:
            if activations is not None:
                activations.samples.close()
        if journal is not None:
            with self._report.timed("journal"):
                journal.finish()
        self.context.stage = None
        self.graph.facts.drop(Activations)
        for current in passes:
            if self.flags.wants(current.name):
                self.flags.write(current.name, self.graph.text(), "")  # no nodes have changed

    def _read_ahead(self, stages: Stages, number: int) -> None:
        """Let the weights of the next stages be read while this one is worked on: of two, since the next may
        have few and the one after it a layer's experts. On a CPU they would take of the same memory."""
        ahead = 1 if self.graph.weights.device.type == "cpu" else 2
        following = stages.stages[number + 1 : number + 1 + ahead]
        views = [v for s in following for o in s.observers for v in o.views]
        self.graph.weights.prefetch(view.parameter for view in views)

    def _activations(self, stages: Stages) -> Activations:
        with self._report.timed("run-tokens"):
            activations = Activations(self.graph, stages, self.context)
            self.graph.weights.release()
        self.graph.facts[Activations] = activations
        return activations

    def _run_on_stage(self, stage: Stage, passes: list[Pass], activations: Activations) -> None:
        self.context.stage = stage
        with self._report.timed("check"):
            check = StageCheck(self.graph, stage, activations) if self.flags.check else None
        propagate_float = self.context.config.propagate == "float"
        for current in passes:
            if current.output == "lossy" and propagate_float:
                self._advance(activations, stage)
            version = self.graph.version
            if check is not None and current.output == "equal":
                with self._report.timed("check"):
                    check.before()
            self._timed(current)
            if self.graph.version != version:
                raise VerifyError(
                    f"{current.name!r} is a stage pass and changed the graph's nodes: use scope='graph'"
                )
            if check is not None and current.output == "equal":
                with self._report.timed("check"):
                    check.after(current.name)
        if stage is not self.graph.facts[Stages].stages[-1]:
            self.graph.facts.drop(Statistics)  # the largest of all, and of this stage
        self._advance(activations, stage)
        self.graph.weights.release()

    def _advance(self, activations: Activations, stage: Stage) -> None:
        with self._report.timed("run-tokens"):
            if self.context.journal is not None:
                self.context.journal.moving()
            activations.advance(stage)

    def _timed(self, current: Pass) -> None:
        _check_there(self.graph, current)
        with self._report.timed(current.name):
            self._retries.run(current)
        for fact in current.consumes:
            if fact not in current.provides:
                self.graph.facts.drop(fact)
        for fact in current.provides:
            if fact not in self.graph.facts:
                raise PipelineError(f"{current.name!r} declares that it provides {fact.__name__} but did not")
