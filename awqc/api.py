"""``awqc.compile``: a float model in, a quantized model out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from awqc.backend import Backend, get_backend
from awqc.calibration import (
    CalibrationInputs,
    CalibrationTokens,
    load_tokens,
    model_inputs,
    sequence_limit,
    token_inputs,
    vocabulary_size,
)
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
from awqc.preparation import left_out, prepare
from awqc.quantized import packed_bytes
from awqc.report import LinearRow, Report
from awqc.scales import FoldedScales
from awqc.source import ModelSource, named_tensors, open_source
from awqc.weights import Rounded, Weights


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
    root: str | None = None,
    device: str | torch.device = "cpu",
    flags: Flags | None = None,
    progress: Progress | None = None,
) -> CompiledModel:
    """Quantize a model.

    Args:
        model: a module (left as it is; the result shares its unchanged tensors), or a directory with
            ``config.json`` and safetensors, read tensor by tensor.
        calib: calibration data, see :func:`awqc.calibration.load_tokens`: token ids, strings,
            conversations, a file, a data set, or ``"self"`` to let the model write its own. For a model that
            reads more than tokens, a list of dicts of the arguments of its forward.
        backend: what the linears are lowered to: ``"auto"``, a name, or a backend object.
        config: bits, group size and so on.
        pipeline: the passes; :meth:`Pipeline.default` unless given. ``backend`` sets its ``lower`` pass.
        tokenizer: needed for text; by default the one beside the model.
        max_calib_samples, max_calib_seq_len: at most so many sequences of so many tokens.
        split, column: of a data set.
        root: name of the submodule to compile; what lies outside stays in float. By default the part that
            reads text where that is a part of the model, else the whole; ``""`` is the whole.
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
    inputs = model_inputs(calib, max_calib_samples) or token_inputs(
        _calibration(
            source, calib, tokenizer, max_calib_samples, max_calib_seq_len, split, column, config, progress
        ),
        source.module,
    )
    report = _report(config, inputs, source)
    read = time.perf_counter()
    prepared = prepare(source, inputs.batches, device, report, root)
    report.add_seconds("read-calibration", read - started)
    report.add_seconds("capture", time.perf_counter() - read)
    context = Context(config, prepared.batches, report, progress, probe=prepared.probe)
    kept = left_out(source, prepared.graph, prepared.root)
    pipeline.run(prepared.graph, context, flags)
    _keep(source, report, kept)
    return _finish(source, prepared.graph, context, inputs)


def _keep(source: ModelSource, report: Report, kept: Mapping[str, str]) -> None:
    """Rows for the linears that the graph does not hold: they stay in float."""
    tensors = dict(named_tensors(source.module))
    for name, why in kept.items():
        n, k = tensors[name].shape
        row = LinearRow(name.removesuffix(".weight"), n, k, "kept", why, no_group=why)
        report.linears.setdefault(name, row)


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


def _report(config: QuantConfig, tokens: CalibrationInputs, source: ModelSource) -> Report:
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


def _finish(source: ModelSource, graph: Graph, context: Context, tokens: CalibrationInputs) -> CompiledModel:
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
