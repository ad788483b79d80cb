"""What a compile will do and take: from config and shapes alone, no weight is read.

The graph is captured at the shape of the calibration sequences, and the pipeline's own passes find groups,
refusals and stages. Time is the work that passes state for each stage, at the rates measured here.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import fx, nn

from awqc.backend import Backend
from awqc.calibration import sequence_limit, token_batch
from awqc.calibration.together import rows_together
from awqc.capture import capture
from awqc.capture.ladder import EXPORT
from awqc.capture.roots import arguments_of, text_part
from awqc.checkpoints.shards import MAX_SHARD_BYTES
from awqc.config import QuantConfig
from awqc.context import Context
from awqc.driver import default_pipeline
from awqc.errors import CaptureError, ConfigError
from awqc.flags import Flags
from awqc.graph import Graph
from awqc.made_up import HELD, stand_ins
from awqc.memory import SHARD_SHARE, MemoryLimit, memory_limit
from awqc.needs import Needs, StageNeeds, check_fits, stage_needs
from awqc.observers.dependence import dependent_on
from awqc.observers.products import propagation_dtype
from awqc.observers.stages import Stage, Stages
from awqc.pipeline import Pass, Pipeline
from awqc.planning.around import once, stage_check, stage_journal
from awqc.planning.rates import Rates, measure
from awqc.preparation import PROBE_TOKENS
from awqc.quantization.schemes import Schemes
from awqc.quantized import packed_bytes
from awqc.report import Report
from awqc.storage.source import aliases, from_module, named_tensors, skeleton
from awqc.weights import Weights
from awqc.work import Work, matrices_of, quantized_views, run, weights_read

#: Bytes for each element of the largest weight while whole graphs are checked on made-up ones, in float64.
_STREAMED = 8
#: Bytes for each element of the largest tensor when what was written is read back and compared: in the 16
#: bits that it comes from, and where the CPU computes in float32.
_READ_BACK = {"cpu": 2 + 4, "cuda": 2}


@dataclass(frozen=True)
class StagePlan:
    """One stage of a compile.

    Args:
        name: the first linear of the stage.
        matrices: how many are quantized in it; those of experts count each.
        parameters: weights in them.
        width: input channels of its widest linear.
        statistics: how Gram matrices are held: ``full``, ``offloaded`` or ``sampled``.
        memory: bytes on the compute device at the peak of the stage.
        seconds: by pass.
    """

    name: str
    matrices: int
    parameters: int
    width: int
    statistics: str
    memory: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """What a compile will do and take.

    Args:
        report: decisions and reasons so far: linears, groups, coverage, notes.
        samples, seq_len: of the calibration.
        device: where it computes.
        stages: in their order.
        seconds: by pass, in their order; what no stage does (capture, reading, saving) too, and under
            ``start`` what is done once: to import the model's code, to open the device, and the first call of
            everything, which a compile spends in any pass.
        memory: bytes at the peak of the process: of the ``host``, and of the ``device`` where that is a GPU.
        disk: bytes of the output, and beside it of the journal and of what is kept on disk meanwhile.
        refusal: why the compile would be refused; empty if it would not be.
        sizes: bytes of the checkpoint that is read (``stored``), of linears and model in 16 bits and as they
            are written, as in :class:`awqc.Report`; elements of the ``largest`` tensor; and of what is
            quantized ``linears``, stacks of experts among them, and ``matrices``.
        rates: measured on this device.
        notes: what the estimate does not hold.
    """

    report: Report
    samples: int
    seq_len: int
    device: str
    stages: list[StagePlan]
    seconds: dict[str, float]
    memory: dict[str, int]
    disk: dict[str, int]
    refusal: str
    sizes: dict[str, int]
    rates: Rates
    notes: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return self.samples * self.seq_len

    @property
    def total_seconds(self) -> float:
        """From the command to the saved checkpoint."""
        return sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"tokens": self.tokens, "total_seconds": self.total_seconds}


def plan(
    model: nn.Module | str | Path,
    *,
    backend: str | Backend = "auto",
    config: QuantConfig | None = None,
    pipeline: Pipeline | None = None,
    max_calib_samples: int = 128,
    max_calib_seq_len: int = 512,
    root: str | None = None,
    device: str | torch.device = "cpu",
    max_memory: int | str | Mapping[int | str, int | str] | None = None,
    rates: Rates | None = None,
) -> Plan:
    """What :func:`awqc.compile` will do to ``model`` and what it will take, before any weight is read.

    Args:
        model: a directory with ``config.json``, weights or not; or a module, also one on ``meta``.
        backend, config, pipeline, max_calib_samples, max_calib_seq_len, root, device, max_memory: as for
            :func:`awqc.compile_to`.
        rates: of another plan on this machine; measured by default.

    Raises:
        CaptureError: if the model cannot be captured.
        ConfigError: if nothing would be quantized, or its config does not say what it reads.
    """
    config, device = config or QuantConfig(), torch.device(device)
    limit = memory_limit(max_memory, device)
    pipeline = pipeline or default_pipeline()
    began = time.perf_counter()
    module = model if isinstance(model, nn.Module) else skeleton(Path(model))
    opened = time.perf_counter() - began  # mostly its code, which is imported
    longest = sequence_limit(module.config) if hasattr(module, "config") else None
    seq_len = min(max_calib_seq_len, longest or max_calib_seq_len)
    report, started, before = Report(config=config.as_dict()), time.perf_counter(), _resident()
    several = seq_len > 2 * PROBE_TOKENS  # as a compile has it
    rows = rows_together(max_calib_samples, seq_len, module, limit) if several else 1
    graph, rows = _captured(module, rows, seq_len, root)
    batches = max_calib_samples // rows
    captured, captured_bytes = time.perf_counter(), max(_resident() - before, 0)
    _before_calibration(pipeline).run(graph, Context(config, report=report), Flags(check=False))
    if Stages not in graph.facts:
        raise ConfigError("this pipeline calibrates nothing: there is no compile to plan")
    # A compile captures a second time, at a few tokens, for its checks.
    seconds = Counter(
        {
            "start": opened,
            "capture": 2 * (captured - started),
            "find-scale-groups": time.perf_counter() - captured,
        }
    )
    base = _resident() + captured_bytes  # a compile captures twice
    rates = rates or measure(device, config.scheme, config.propagate_dtype, backend)
    if device.type != "cpu":  # what it takes of the host, libraries and kernels, is there when it has worked
        base = _resident() + captured_bytes
    made_up = stand_ins(from_module(module), limit, device) is not None
    sizes = {"stored": _stored(model)} | _sizes(module, graph, report)
    needs = stage_needs(graph, batches, limit, device, config.group_size)
    seconds.update({name: rates.seconds(work) for name, work in once(graph, sizes, made_up).items()})
    rounded = propagation_dtype(config.propagate_dtype, torch.float32, device) is not None
    staged = [each for each in pipeline if each.scope == "stage"]
    stages = []
    of_stage = iter(needs.stages)
    for stage, nodes in _segments(graph):
        one, cast = run(nodes, rounded), weights_read(nodes)
        moving = {"run-tokens": batches * rates.seconds(one) + rates.seconds(cast)}
        if stage is not None:
            need = graph.facts[StageNeeds] = next(of_stage)
            works = {each.name: each.work(graph, stage.observers, batches, need.kind) for each in staged}
            works["check"] = stage_check(stage, sizes)
            works["journal"] = stage_journal(graph, stage)
            moving = {name: rates.seconds(work) for name, work in works.items() if work is not None} | moving
            stages.append(_stage_plan(graph, stage, need, moving))
        seconds.update(moving)
    # Files are read ahead, and hashed, while all else is done.
    seconds.update({"read": max(rates.seconds(Work({"read": sizes["stored"]})) - seconds.total(), 0.0)})
    unknown = [each.name for each in staged if type(each).work is Pass.work]
    notes = [f"{name} does not say what it will do: its time is not in the estimate" for name in unknown]
    try:
        check_fits(graph, batches, limit, config)
        refusal = ""
    except ConfigError as error:
        refusal = str(error)
    return Plan(
        report,
        max_calib_samples,
        seq_len,
        str(device),
        stages,
        dict(seconds),
        _memory(base, _checks(module, made_up), needs, sizes, limit, device),
        _disk(needs, sizes),
        refusal,
        sizes,
        rates,
        notes,
    )


def _captured(module: nn.Module, rows: int, seq_len: int, root: str | None) -> tuple[Graph, int]:
    """The graph for so many sequences at once, or for one where the model takes no more."""
    source = from_module(module)
    root = text_part(module) if root is None else root
    batch = token_batch(torch.zeros(rows, seq_len, dtype=torch.int64), module)
    weights = Weights(source.names(), source.read, None, "cpu", aliases(module))
    (given,) = arguments_of(source, root, [batch], weights)
    rung = EXPORT if rows > 1 else None
    try:
        return capture(source, given, torch.float32, root=root, purpose="analyze", rung=rung), rows
    except CaptureError:
        if rows == 1:
            raise
    return _captured(module, 1, seq_len, root)


def _before_calibration(pipeline: Pipeline) -> Pipeline:
    """The passes in front of the first that runs by stage, without the proof: that runs weights."""
    first = next((i for i, each in enumerate(pipeline) if each.scope == "stage"), len(pipeline.passes))
    found = Pipeline(pipeline.passes[:first])
    for each in found:
        if hasattr(each, "proof"):
            found = found.with_options(each.name, proof=False)
    return found


def _segments(graph: Graph) -> list[tuple[Stage | None, list[fx.Node]]]:
    """Each stage with the nodes that calibration tokens move through when it is done; first, without a stage,
    those before all of them."""
    varying = dependent_on(graph, lambda node: node.op == "placeholder")
    stages, nodes = list(graph.facts[Stages]), graph.nodes
    found: list[tuple[Stage | None, list[fx.Node]]] = [(None, nodes[: stages[0].start])]
    # Nothing is quantized behind the last stage, so nothing moves there.
    found += [(stage, nodes[stage.start : stage.end]) for stage in stages[:-1]]
    found += [(stages[-1], [])]
    return [(stage, [node for node in part if node in varying]) for stage, part in found]


def _stage_plan(graph: Graph, stage: Stage, needs: StageNeeds, seconds: dict[str, float]) -> StagePlan:
    views = [view for _, view, _ in quantized_views(stage.observers, graph.facts[Schemes])]
    counts = [matrices_of(view) for view in views]
    return StagePlan(
        stage.observers[0].name,
        sum(counts),
        sum(c * v.out_features * v.in_features for c, v in zip(counts, views, strict=True)),
        max(view.in_features for view in views),
        needs.kind,
        needs.peak,
        seconds,
    )


def _sizes(module: nn.Module, graph: Graph, report: Report) -> dict[str, int]:
    elements = [t.numel() for _, t in named_tensors(module) if t.is_floating_point()]
    weights = sum(elements)
    schemes = graph.facts[Schemes]
    rows = [(row, schemes[name]) for name, row in report.linears.items() if name in schemes]
    linears = sum(row.parameters for row, _ in rows)
    matrices = sum(row.expert_count or 1 for row, _ in rows)
    packed = sum(
        (row.expert_count or 1) * packed_bytes(row.out_features, row.in_features, scheme)
        for row, scheme in rows
    )
    return {
        "largest": max(elements),
        "linears": len(rows),
        "matrices": matrices,
        "linears_before": 2 * linears,
        "linears_after": packed,
        "model_before": 2 * weights,
        "model_after": 2 * (weights - linears) + packed,
    }


def _checks(module: nn.Module, made_up: bool) -> int:
    """Bytes on the device while whole graphs are compared and folds are proven on a few tokens."""
    elements = [t.numel() for _, t in named_tensors(module) if t.is_floating_point()]
    return _STREAMED * max(elements) if made_up else HELD * sum(elements)


def _memory(
    base: int,
    checks: int,
    needs: Needs,
    sizes: Mapping[str, int],
    limit: MemoryLimit,
    device: torch.device,
) -> dict[str, int]:
    """Peak bytes by place.

    Args:
        base: what the process takes without any weights.
        checks: what checks of whole graphs take on the compute device.
    """
    shard = MAX_SHARD_BYTES if limit.host is None else int(SHARD_SHARE * limit.host)
    back, stages = _READ_BACK[device.type] * sizes["largest"], needs.largest.peak
    if device.type == "cpu":
        # What is freed between stages and writing is not all given back to the system.
        return {"host": base + max(checks, stages + min(sizes["model_after"], 2 * shard) + back)}
    # The same of linears in shards, which are many; embedding tables are given back, and fill shards alone.
    shards = min(sizes["model_after"], 2 * max(shard, 2 * sizes["largest"]))
    writing = max(shards, min(sizes["linears_after"], 2 * shard) + back)
    kept = needs.narrowest if needs.place == "host" else 0
    offloaded = max(stage.offloaded for stage in needs.stages)
    return {"device": max(stages, checks), "host": base + kept + max(offloaded, writing)}


def _disk(needs: Needs, sizes: Mapping[str, int]) -> dict[str, int]:
    scratch = needs.narrowest if needs.place == "disk" else 0
    return {"output": sizes["model_after"], "meanwhile": sizes["linears_after"] + scratch}


def _resident() -> int:
    """Bytes that this process holds: modules, and a captured graph."""
    return int(psutil.Process().memory_info().rss)


def _stored(model: nn.Module | str | Path) -> int:
    """Bytes of the weights that a compile reads: of the files, or as the config describes them."""
    if isinstance(model, nn.Module):
        return sum(tensor.nbytes for _, tensor in named_tensors(model))
    files = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    if files:
        return files
    config = json.loads((Path(model) / "config.json").read_text())
    dtype = getattr(torch, str(config.get("dtype", config.get("torch_dtype"))), torch.float32)
    return dtype.itemsize * sum(tensor.numel() for _, tensor in named_tensors(skeleton(Path(model))))
