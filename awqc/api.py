"""``awqc.compile``: a float model in, a quantized model out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from awqc.backend import Backend, get_backend
from awqc.calibration import CalibrationTokens, load_tokens, sequence_limit, vocabulary_size
from awqc.capture import CaptureReport, capture, check_against_eager
from awqc.checkpoints import SearchRecord, fingerprint, hash_tensor
from awqc.compiled import Compilation, CompiledModel, assemble, structural_copy
from awqc.config import QuantConfig
from awqc.context import Context, Progress, Silent
from awqc.driver import default_pipeline
from awqc.flags import Flags
from awqc.graph import Graph
from awqc.lowered import LoweredExperts, LoweredLinears
from awqc.packed import PackedModule
from awqc.pipeline import Pipeline
from awqc.quantized import packed_bytes
from awqc.report import Report
from awqc.scales import FoldedScales
from awqc.source import ModelSource, named_tensors, open_source
from awqc.verify import Probe
from awqc.weights import Rounded, Weights

#: Tokens in the input on which whole graphs are compared and folds are proven.
PROBE_TOKENS = 16


def compile(
    model: nn.Module | str | Path,
    calib: Any = "self",
    *,
    backend: str | Backend = "auto",
    config: QuantConfig | None = None,
    pipeline: Pipeline | None = None,
    tokenizer: Any = None,
    max_calib_samples: int = 128,
    max_calib_seq_len: int = 512,
    split: str | None = None,
    column: str | None = None,
    device: str | torch.device = "cpu",
    flags: Flags | None = None,
    progress: Progress | None = None,
) -> CompiledModel:
    """Quantize a model.

    Args:
        model: a module (left as it is; the result shares its unchanged tensors), or a directory with
            ``config.json`` and safetensors, read tensor by tensor.
        calib: calibration data, see :func:`awqc.calibration.load_tokens`: token ids, strings,
            conversations, a file, a data set, or ``"self"`` to let the model write its own.
        backend: what the linears are lowered to: ``"auto"``, a name, or a backend object.
        config: bits, group size and so on.
        pipeline: the passes; :meth:`Pipeline.default` unless given. ``backend`` sets its ``lower`` pass.
        tokenizer: needed for text; by default the one beside the model.
        max_calib_samples, max_calib_seq_len: at most so many sequences of so many tokens.
        split, column: of a data set.
        device: where to compile, and where the result is.
        flags: debugging aids; by default from ``AWQC_*`` variables.
        progress: how long loops show themselves.

    Returns:
        The model with quantized linears, with ``.report``, ``.graph`` and ``.save``.

    Raises:
        ConfigError, CaptureError, CalibrationError, CheckpointError, BackendError, NonFiniteError,
        PipelineError, VerifyError: see :mod:`awqc.errors`; nothing has been written.
    """
    config, progress = config or QuantConfig(), progress or Silent()
    pipeline = (pipeline or default_pipeline()).with_options("lower", backend=backend)
    if isinstance(backend, str) and backend != "auto":
        get_backend(backend)
    pipeline.check_order()
    source = open_source(model)
    started = time.perf_counter()
    tokens = _calibration(
        source, calib, tokenizer, max_calib_samples, max_calib_seq_len, split, column, config, progress
    )
    read = time.perf_counter()
    batches = [{"input_ids": row[None].to(device)} for row in tokens.ids]
    graph = capture(source, batches[0], torch.float32, device)
    context = Context(config, batches, _report(config, tokens, source), progress)
    _check_capture(source, graph, context)
    context.report.add_seconds("read-calibration", read - started)
    context.report.add_seconds("capture", time.perf_counter() - read)
    pipeline.run(graph, context, flags)
    return _finish(source, graph, context, tokens)


def _check_capture(source: ModelSource, graph: Graph, context: Context) -> None:
    """Compare graph and module on two inputs, at a small shape if the graph is the same program there."""
    batch = context.batches[0]
    small = {name: value[:, :PROBE_TOKENS] for name, value in batch.items()}
    checked = graph
    if batch["input_ids"].shape[1] > 2 * PROBE_TOKENS:
        probe = Probe(capture(source, small, graph.weights.dtype, graph.weights.device), small)
        if probe.mirrors(graph):
            context.probe, checked, batch = probe, probe.graph, small
        else:
            context.report.note(
                "capture", f"traces differently at {PROBE_TOKENS} tokens: checked at full length"
            )
    # A second input that the graph was not traced with: frozen values would show.
    other = {"input_ids": context.batches[-1]["input_ids"].flip(-1)[:, : batch["input_ids"].shape[1]]}
    checks = check_against_eager(checked, source.module, {"calibration": batch, "reversed": other})
    context.report.capture = {**asdict(graph.facts[CaptureReport]), "checks": checks}


def _calibration(
    source: ModelSource,
    calib: Any,
    tokenizer: Any,
    samples: int,
    seq_len: int,
    split: str | None,
    column: str | None,
    config: QuantConfig,
    progress: Progress,
) -> CalibrationTokens:
    limit = sequence_limit(source.config) if source.config is not None else None
    vocabulary = vocabulary_size(source.config) if source.config is not None else None
    # Nobody who asks for nothing in particular wants an error for a model with a short context.
    if limit is not None and seq_len == _default_seq_len():
        seq_len = min(seq_len, limit)
    if tokenizer is None and source.path is not None and not isinstance(calib, Tensor):
        tokenizer = source.tokenizer()
    return load_tokens(
        calib,
        tokenizer=tokenizer,
        model=source.materialized() if isinstance(calib, str) and calib == "self" else None,
        max_calib_samples=samples,
        max_calib_seq_len=seq_len,
        split=split,
        column=column,
        seed=config.seed,
        limit=limit,
        vocab_size=vocabulary,
        progress=progress.count("reading calibration data"),
    )


def _default_seq_len() -> int:
    assert compile.__kwdefaults__ is not None
    return int(compile.__kwdefaults__["max_calib_seq_len"])


def _report(config: QuantConfig, tokens: CalibrationTokens, source: ModelSource) -> Report:
    report = Report(config=config.as_dict())
    report.calibration = {
        "source": tokens.source,
        "samples": tokens.samples,
        "seq_len": tokens.seq_len,
        "tokens": tokens.tokens,
        "dropped": tokens.dropped,
        "sha256": tokens.sha256,
    }
    for note in tokens.notes:
        report.note("calibration", note)
    for note in source.notes:
        report.note("source", note)
    return report


def _finish(source: ModelSource, graph: Graph, context: Context, tokens: CalibrationTokens) -> CompiledModel:
    """Put what the passes left in the graph into the model's modules."""
    lowered, stacks = graph.facts[LoweredLinears], graph.facts[LoweredExperts]
    weights, report = graph.weights, context.report
    _account(report, source, [*lowered.values(), *stacks.values()])

    def record() -> SearchRecord:
        hashes = {name: hash_tensor(source.read(name)) for name in source.names()}
        return SearchRecord(
            config=report.config,
            fingerprint=fingerprint(report.config, tokens.sha256, hashes),
            ratios={name: row.ratio if row.applied else None for name, row in report.groups.items()},
            scales=graph.facts.get(FoldedScales) or {},
        )

    module = structural_copy(source.module)

    def lowered_graph() -> fx.GraphModule:
        shared: dict[str, Tensor] = dict(compiled.named_parameters(remove_duplicate=False))
        shared |= dict(compiled.named_buffers(remove_duplicate=False))
        names = [str(n.target) for n in graph.fx.nodes if n.op == "get_attr"]
        # Constants that tracing lifted belong to no module: only the graph has them.
        return fx.GraphModule({n: shared[n] if n in shared else weights[n] for n in names}, graph.fx)

    compilation = Compilation(source, report, record, lowered_graph, context.batches[0])
    gone = {f"{name}.{part}" for name in lowered for part in ("weight", "bias")} | set(stacks)
    compiled = assemble(module, _dense_tensors(source, weights, gone), lowered, stacks, compilation)
    return compiled


def _dense_tensors(source: ModelSource, weights: Weights, gone: set[str]) -> dict[str, Tensor]:
    """Tensors of the result that the source's module does not hold as they are."""
    module = dict(named_tensors(source.module))
    unread = any(tensor.is_meta for tensor in module.values())
    on_cpu = weights.device.type == "cpu"
    # A model in memory keeps its dtype; one from disk gets the dtype its device computes fast in.
    dtype = (torch.float32 if on_cpu else source.half) if unread else source.dtype
    changed = weights.changed()
    tensors = {}
    for name, tensor in module.items():
        new = name in changed and not isinstance(changed[name], Rounded)
        if name not in gone and (new or tensor.is_meta or tensor.device.type != weights.device.type):
            value = weights[name]
            tensors[name] = value.to(dtype) if isinstance(tensor, nn.Parameter) else value.to(tensor.dtype)
    return tensors


def _account(report: Report, source: ModelSource, lowered: Sequence[PackedModule]) -> None:
    """Sizes: as stored before (16 bits) and after, and what the packed linears hold in memory."""
    dense = sum(t.numel() for _, t in named_tensors(source.module) if t.is_floating_point())
    linears = sum(m.rows * m.in_features for m in lowered)
    packed = sum(packed_bytes(m.rows, m.in_features, m.scheme) for m in lowered)
    report.sizes = {
        "linears_before": 2 * linears,
        "linears_after": packed,
        "model_before": 2 * dense,
        "model_after": 2 * (dense - linears) + packed,
        "linears_resident": sum(t.nbytes for linear in lowered for t in linear.buffers()),
    }
