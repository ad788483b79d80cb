"""The pipeline: an order that is proven, and passes that are held to their promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from awqc import pipeline as module
from awqc.context import Context
from awqc.errors import PipelineError, VerifyError
from awqc.graph import Graph
from awqc.observers.stages import Stages
from awqc.passes.canonicalize import Canonicalize
from awqc.passes.clip_weights import ClipWeights
from awqc.passes.find_scale_groups import FindScaleGroups
from awqc.passes.fold_constants import FoldConstants
from awqc.passes.fold_scales import FoldScales
from awqc.passes.lower import Lower
from awqc.passes.round_weights import RoundWeights
from awqc.passes.search_scales import SearchScales
from awqc.pipeline import Pass, Pipeline, _Runner, third_party_passes
from awqc.quantization.scales import Scales
from awqc.runtime.lowered import LoweredLinears
from awqc.views import linears
from tests.passes.graphs import ANALYSIS, OBSERVED, Look, Mlp, context_of, graph_of, run, samples

DEFAULT = [
    "canonicalize",
    "scale-inputs",
    "fold-constants",
    "find-scale-groups",
    "insert-observers",
    "check-coverage",
    "calibrate",
    "search-scales",
    "fold-scales",
    "clip-weights",
    "round-weights",
    "drop-unit-scales",
    "quantize-linears",
    "lower",
]


@dataclass(frozen=True)
class Change(Pass):
    """Calls ``change(graph)``, which may break what the class attributes promise."""

    name: ClassVar[str] = "change"

    change: Callable[[Graph], None]

    def run(self, graph: Graph, context: Context) -> None:
        self.change(graph)


class StageChange(Change):
    scope = "stage"


class LossyChange(Change):
    output = "lossy"


def nothing(graph: Graph) -> None: ...


# -- the order ---------------------------------------------------------------------------------------------


def test_the_default_pipeline_is_in_order() -> None:
    pipeline = Pipeline.default()
    assert pipeline.names() == DEFAULT
    pipeline.check_order()


def order_error(pipeline: Pipeline) -> str:
    """What ``check_order`` says, which ``run`` says too, before it runs anything."""
    with pytest.raises(PipelineError) as caught:
        pipeline.check_order()
    touched: list[str] = []
    first = Change(lambda graph: touched.append("run"))
    with pytest.raises(PipelineError, match=r".*"):
        Pipeline((first, *pipeline)).run(graph_of(Mlp(), **samples(1)[0]), context_of(samples(1)))
    assert touched == []
    return str(caught.value)


def test_a_fact_that_comes_too_late() -> None:
    pipeline = Pipeline.default().remove("fold-scales").insert_before("search-scales", FoldScales())
    assert order_error(pipeline) == (
        "'fold-scales' requires Scales, provided by 'search-scales': move it earlier"
    )


def test_a_fact_that_nobody_provides() -> None:
    assert order_error(Pipeline.default().remove("search-scales")) == (
        "'fold-scales' requires Scales, which no pass of this pipeline provides"
    )


def test_a_fact_that_is_stale() -> None:
    pipeline = Pipeline.default().insert_after("fold-scales", FoldScales())
    assert order_error(pipeline) == (
        "'fold-scales' requires Scales, which 'fold-scales' makes stale: move 'fold-scales' before it"
    )


def test_a_pass_by_stage_needs_stages() -> None:
    assert order_error(Pipeline((StageChange(nothing),))) == (
        "'change' requires Stages, which no pass of this pipeline provides"
    )


def test_a_pass_over_the_whole_graph_cannot_stand_among_those_that_run_by_stage() -> None:
    """After it only the last stage's statistics would be left, for all stages."""
    assert order_error(Pipeline.default().insert_before("clip-weights", Change(nothing))) == (
        "'clip-weights' requires Statistics of the stage it runs on, but 'change' runs over the whole "
        "graph in between: move 'change' before or after all passes that run by stage"
    )


def test_passes_by_stage_may_come_twice() -> None:
    again = (*OBSERVED[4:], RoundWeights())
    run(Mlp(), samples(2), *OBSERVED, Change(nothing), *again)


def test_a_fact_that_is_already_there_needs_no_pass() -> None:
    graph, context = graph_of(Mlp(), **samples(1)[0]), context_of(samples(1))
    Pipeline((Canonicalize(), FoldConstants())).run(graph, context)
    Pipeline((FindScaleGroups(),)).run(graph, context)
    with pytest.raises(PipelineError):
        Pipeline((FindScaleGroups(),)).check_order()


def test_a_pass_that_does_not_keep_its_word() -> None:
    class Liar(Look):
        name = "liar"
        scope = "graph"
        provides = (Scales,)

    with pytest.raises(PipelineError) as caught:
        run(Mlp(), samples(1), Liar(lambda g, c: None))
    assert str(caught.value) == "'liar' declares that it provides Scales but did not"


def test_a_fact_that_a_pass_drops_behind_the_pipeline_s_back() -> None:
    drop = Change(lambda graph: graph.facts.drop(Stages))
    with pytest.raises(PipelineError) as caught:
        run(Mlp(), samples(1), *ANALYSIS, drop, *OBSERVED[4:])
    assert str(caught.value) == ("'calibrate' requires Stages, which the pass before it did not leave")


def test_consumed_facts_are_gone() -> None:
    graph, _ = run(Mlp(), samples(2), *OBSERVED, SearchScales(), FoldScales())
    assert Scales not in graph.facts


# -- editing -----------------------------------------------------------------------------------------------


def test_editing_gives_a_new_pipeline() -> None:
    default, new = Pipeline.default(), Change(nothing)
    i = DEFAULT.index("clip-weights")
    assert default.insert_before("clip-weights", new).names() == [*DEFAULT[:i], "change", *DEFAULT[i:]]
    assert default.insert_after("clip-weights", new).names() == [
        *DEFAULT[: i + 1],
        "change",
        *DEFAULT[i + 1 :],
    ]
    assert default.replace("clip-weights", new).names() == [*DEFAULT[:i], "change", *DEFAULT[i + 1 :]]
    assert default.remove("clip-weights").names() == [*DEFAULT[:i], *DEFAULT[i + 1 :]]
    assert default.names() == DEFAULT


def test_options_of_a_pass() -> None:
    pipeline = Pipeline.default().with_options("clip-weights", shrinks=(1.0,))
    assert pipeline.passes[DEFAULT.index("clip-weights")] == ClipWeights(shrinks=(1.0,))
    assert Pipeline.default().with_options("lower", backend="cpu").passes[-1] == Lower("cpu")


def test_an_option_that_a_pass_does_not_have() -> None:
    with pytest.raises(PipelineError) as caught:
        Pipeline.default().with_options("clip-weights", ladder=(1.0,))
    assert str(caught.value).startswith("pass 'clip-weights' has no such option: ")
    assert "'ladder'" in str(caught.value)


@pytest.mark.parametrize("method", ["insert_before", "insert_after", "replace", "remove", "with_options"])
def test_a_pass_that_is_not_there(method: str) -> None:
    arguments = (Change(nothing),) if method in ("insert_before", "insert_after", "replace") else ()
    with pytest.raises(PipelineError) as caught:
        getattr(Pipeline.default(), method)("clip", *arguments)
    assert str(caught.value) == f"no pass is called 'clip': there are {', '.join(DEFAULT)}"


# -- promises ----------------------------------------------------------------------------------------------


def double(name: str) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        graph.weights[name] = graph.weights[name] * 2

    return change


def test_a_pass_that_lies_about_being_equal_is_caught() -> None:
    with pytest.raises(VerifyError) as caught:
        run(Mlp(), samples(1), Canonicalize(), Change(double("down.weight")))
    message = str(caught.value)
    assert message.startswith(
        "pass 'change' promises an equal function but changed output 0 of the graph by "
    )
    (batch,) = samples(1)
    twice = Mlp()
    with torch.no_grad():
        twice.down.weight *= 2
        want, found = Mlp()(batch["x"]), twice(batch["x"])
    size = float((found - want).norm() / want.norm())
    assert f" by {size:.1e} (relative; rounding explains " in message


def test_a_pass_that_says_it_is_lossy_may_be() -> None:
    graph, _ = run(Mlp(), samples(1), Canonicalize(), LossyChange(double("down.weight")))
    assert torch.equal(graph.weights["down.weight"], 2 * Mlp().down.weight)


def test_rounding_is_no_lie() -> None:
    def nudge(graph: Graph) -> None:
        graph.weights["down.weight"] = graph.weights["down.weight"] * (1 + torch.finfo(torch.float32).eps)

    run(Mlp(), samples(1), Canonicalize(), Change(nudge))


def test_a_stage_pass_that_lies_is_caught_in_its_stage() -> None:
    with pytest.raises(VerifyError) as caught:
        run(Mlp(), samples(2), *ANALYSIS, StageChange(double("up.weight")))
    message = str(caught.value)
    assert message.startswith(
        "pass 'change' promises an equal function but changed tensor 'linear' by 9.9e-01"
    )
    assert message.endswith("; leave it out with AWQC_SKIP=change to go on")


def test_a_stage_pass_may_not_rewire() -> None:
    def rewire(graph: Graph) -> None:
        graph.changed()

    with pytest.raises(VerifyError) as caught:
        run(Mlp(), samples(1), *ANALYSIS, StageChange(rewire))
    assert str(caught.value) == ("'change' is a stage pass and changed the graph's nodes: use scope='graph'")


def without_shape(graph: Graph) -> None:
    next(linears(graph)).node.meta.pop("val")


def second_node(graph: Graph) -> None:
    attr = graph.parameters()["up.weight"]
    with graph.fx.inserting_before(attr):
        graph.fx.create_node("get_attr", "up.weight", name="again").meta = dict(attr.meta)


def unknown_weight(graph: Graph) -> None:
    graph.parameters()["up.weight"].target = "up.missing"


def use_before_definition(graph: Graph) -> None:
    first, second = linears(graph)
    first.node.append(second.input)
    first.input.prepend(first.node)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_shape, "node linear carries no shape: set meta['val'] where it is created"),
        (second_node, "parameter 'up.weight' appears as two nodes, again and up_weight"),
        (unknown_weight, "node up_weight refers to 'up.missing', which no weight is known for"),
    ],
)
def test_a_pass_that_breaks_the_graph(change: Callable[[Graph], None], message: str) -> None:
    with pytest.raises(VerifyError) as caught:
        run(Mlp(), samples(1), Canonicalize(), LossyChange(change))
    assert str(caught.value) == message


def test_a_graph_that_is_no_graph_any_more() -> None:
    with pytest.raises(VerifyError, match=r"^the graph is malformed: "):
        run(Mlp(), samples(1), Canonicalize(), LossyChange(use_before_definition))


def test_every_pass_is_timed() -> None:
    _, context = run(Mlp(), samples(2), *OBSERVED, RoundWeights(), Change(nothing))
    assert {"canonicalize", "calibrate", "round-weights", "change"} <= set(context.report.seconds)
    assert all(seconds >= 0 for seconds in context.report.seconds.values())


def test_stage_passes_run_stage_by_stage() -> None:
    seen: list[tuple[str, int]] = []

    class Other(Look):
        name = "other"

    def note(name: str) -> Callable[[Graph, Context], None]:
        return lambda graph, context: seen.append((name, context.stage.index if context.stage else -1))

    _, context = run(Mlp(), samples(2), *ANALYSIS, Look(note("look")), Other(note("other")))
    assert seen == [("look", 0), ("other", 0), ("look", 1), ("other", 1)]
    assert context.stage is None


def test_an_error_in_a_pass_comes_out_as_it_is() -> None:
    class Mistake(Exception): ...

    def fail(graph: Graph) -> None:
        raise Mistake("not awqc's")

    with pytest.raises(Mistake, match="not awqc's"):
        run(Mlp(), samples(1), Change(fail))


# -- third parties -----------------------------------------------------------------------------------------


def test_passes_of_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name = "change"

        def load(self) -> type[Pass]:
            return Change

    asked: list[str] = []

    def entry_points(group: str) -> list[Entry]:
        asked.append(group)
        return [Entry()]

    monkeypatch.setattr(module, "entry_points", entry_points)
    assert third_party_passes() == {"change": Change}
    assert asked == ["awqc.passes"]


def test_a_pass_of_one_s_own_in_the_default_pipeline() -> None:
    """Between awqc's passes it sees their facts, and changes what the later ones do."""
    from awqc.quantization.schemes import Schemes

    def eight_bits(graph: Graph, context: Context) -> None:
        schemes = graph.facts[Schemes]
        schemes["down.weight"] = type(schemes["down.weight"])(8, 16)

    pipeline = (
        Pipeline.default()
        .insert_before("calibrate", Look(eight_bits))
        .with_options("lower", backend="reference")
    )
    graph, context = graph_of(Mlp(), **samples(2)[0]), context_of(samples(2))
    pipeline.run(graph, context)
    lowered = graph.facts[LoweredLinears]
    assert {name: m.scheme.bits for name, m in lowered.items()} == {"up": 4, "down": 8}
    assert context.report.linears["down.weight"].scheme == "W8 g16 asym"


@pytest.mark.parametrize(("device", "expected"), [("cpu", ["b"]), ("cuda", ["b", "c"])])
def test_weights_of_the_next_stages_are_read_ahead(device: str, expected: list[str]) -> None:
    read: list[str] = []
    runner: Any = object.__new__(_Runner)
    runner.graph = SimpleNamespace(weights=SimpleNamespace(device=torch.device(device), prefetch=read.extend))
    stages: Any = SimpleNamespace(
        stages=[
            SimpleNamespace(observers=[SimpleNamespace(views=[SimpleNamespace(parameter=name)])])
            for name in "abcd"
        ]
    )
    runner._read_ahead(stages, 0)
    assert read == expected
