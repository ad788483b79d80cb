"""Work beside the passes: what is done to the whole graph, and with every stage before and after them."""

from __future__ import annotations

from collections.abc import Mapping

from awqc.checkpoints.tensors import LOCKED_MOST
from awqc.graph import Graph
from awqc.memory import FLOAT
from awqc.observers.stages import Stage
from awqc.quantization.schemes import Schemes
from awqc.quantized import packed_bytes
from awqc.views import ExpertLinear
from awqc.work import Unit, Work, matrices_of, quantized_views

#: Copies of the weights that are written or read while a whole graph runs once: one, and on made-up weights
#: those that it takes to make them.
_RUN, _RUN_MADE_UP = 1, 5
#: Ops that it takes to bring a linear, or experts that are stacked, into a checkpoint's layout, and each
#: matrix of them to the host.
_ENCODING, _TAKING = 150, 10


def once(graph: Graph, sizes: Mapping[str, int], made_up: bool) -> dict[str, Work]:
    """What is done once beside tracing: the graph is run against the model on two inputs and against itself
    after a pass has changed it, every fold is proven in float64, and the result is packed and written."""
    weights = sizes["model_before"] // 2
    copies = _RUN_MADE_UP if made_up else _RUN

    def runs(count: int, size: int) -> Work:
        """So many of the whole graph on a few tokens, in numbers of ``size`` bytes."""
        return Work({"streamed": count * copies * size * weights, "calls": count * len(graph.nodes)})

    def loading(size: int) -> Work:
        return Work() if made_up else _loading(sizes, weights, size)

    folding = Work({"streamed": 2 * 2 * FLOAT * weights})
    dense, read_back = sizes["model_after"] - sizes["linears_after"], 2 * sizes["largest"]
    return {
        "start": Work({"starts": 1}),
        "capture": runs(4, FLOAT) + loading(FLOAT),
        "check": runs(2, FLOAT),
        "find-scale-groups": runs(2, 2 * FLOAT) + loading(2 * FLOAT) + folding,
        "lower": Work({"packed": sizes["linears_before"] // 2}),
        "save": Work(
            {
                "written": sizes["model_after"],
                # What is not quantized is read again, what is comes from the journal and goes through the
                # device; the first stage is run on what was saved and on what reads back.
                "paged": dense + sizes["linears_after"] + 2 * read_back,
                "unloaded": sizes["linears_after"],
                "streamed": 10 * weights,
                "calls": _ENCODING * sizes["linears"] + _TAKING * sizes["matrices"],
            }
        ),
    }


def stage_check(stage: Stage, sizes: Mapping[str, int]) -> Work:
    """Its weights are read, and what folds can reach is run on one sample before and after them."""
    work = Work({"calls": 2 * (stage.end - stage.start)})
    for view in (view for observer in stage.observers for view in observer.views):
        weights = matrices_of(view) * view.out_features * view.in_features
        stored = sizes["stored"] * weights // (sizes["model_before"] // 2)
        # Stacks are put together on the host from many tensors; very large ones are not page-locked either.
        paged = isinstance(view, ExpertLinear) or stored > LOCKED_MOST
        work += _loading(sizes, weights, FLOAT, "paged" if paged else "loaded")
    return work


def stage_journal(graph: Graph, stage: Stage) -> Work:
    """Its codes are brought to the host, packed. They are written while the next stage is worked on."""
    views = quantized_views(stage.observers, graph.facts[Schemes])
    packed = sum(matrices_of(v) * packed_bytes(v.out_features, v.in_features, s) for _, v, s in views)
    weights = sum(matrices_of(v) * v.out_features * v.in_features for _, v, _ in views)
    return Work({"unloaded": packed, "streamed": 4 * weights, "calls": 8 * len(views)})


def _loading(sizes: Mapping[str, int], weights: int, size: int, how: Unit = "loaded") -> Work:
    """Bringing ``weights`` from files to the device, in numbers of ``size`` bytes."""
    stored = sizes["stored"] * weights // (sizes["model_before"] // 2)
    return Work({how: stored, "streamed": stored + size * weights})
