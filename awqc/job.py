"""What a compile has before its passes run, and the accounts of its report, wherever the result goes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
from awqc.config import QuantConfig
from awqc.context import Context, Progress, Silent
from awqc.driver import default_pipeline
from awqc.errors import ConfigError, NoTokenizerError
from awqc.flags import Flags
from awqc.graph import Graph
from awqc.journal import Journal
from awqc.made_up import stand_ins
from awqc.memory import MemoryLimit
from awqc.observers.statistics import Statistics
from awqc.pipeline import Pipeline
from awqc.preparation import left_out, prepare
from awqc.quantization.scales import FoldedScales
from awqc.quantized import packed_bytes
from awqc.ranks import current
from awqc.report import LinearRow, Report
from awqc.runtime.packed import PackedModule
from awqc.storage.source import ModelSource, named_tensors, open_source

OpenJournal = Callable[[ModelSource, CalibrationInputs, Report], Journal]

#: Tokens in a calibration sequence unless asked for.
SEQ_LEN = 512


@dataclass(frozen=True)
class Calibration:
    """Where calibration data come from; see :func:`awqc.calibration.load_tokens`."""

    data: Any = "self"
    tokenizer: Any = None
    samples: int = 128
    seq_len: int = SEQ_LEN
    split: str | None = None
    column: str | None = None


@dataclass
class Job:
    """A compile whose model is captured.

    Args:
        source: the model.
        inputs: calibration data as it reads them.
        graph: the captured model.
        context: what passes share.
        kept: parameter name of every linear that the graph does not hold -> why.
    """

    source: ModelSource
    inputs: CalibrationInputs
    graph: Graph
    context: Context
    kept: Mapping[str, str]

    def run(self, pipeline: Pipeline, flags: Flags | None) -> None:
        """Run the passes; linears that no graph holds get a row too."""
        pipeline.run(self.graph, self.context, flags)
        self.graph.facts.drop(Statistics)  # of the last stage: nothing that follows is as large
        report = self.context.report
        if self.context.ranks.count > 1:
            report.processes = self.context.ranks.agree("", sum(report.seconds.values()))
        _keep(self.source, report, self.kept)

    def record(self) -> SearchRecord:
        """What the search has decided; reads all source weights."""
        source, report = self.source, self.context.report
        hashes = {name: hash_tensor(source.read(name)) for name in source.names()}
        return SearchRecord(
            config=report.config,
            fingerprint=fingerprint(report.config, self.inputs.sha256, hashes),
            ratios={name: row.ratio if row.applied else None for name, row in report.groups.items()},
            scales=self.graph.facts.get(FoldedScales) or {},
        )


def check_pipeline(pipeline: Pipeline | None, backend: str | Backend, **lower: Any) -> Pipeline:
    """The pipeline that ends on ``backend``, its order proven.

    Raises:
        BackendError, PipelineError: before anything is read.
    """
    pipeline = (pipeline or default_pipeline()).with_options("lower", backend=backend, **lower)
    if isinstance(backend, str) and backend != "auto":
        get_backend(backend)
    pipeline.check_order()
    return pipeline


def start(
    model: nn.Module | str | Path,
    calibration: Calibration,
    config: QuantConfig | None,
    root: str | None,
    device: str | torch.device,
    progress: Progress | None,
    journal: OpenJournal | None = None,
    limit: MemoryLimit | None = None,
) -> Job:
    """Read the config and the calibration data, and capture the model; see :func:`awqc.compile`.

    Args:
        journal: opens one for what is to be compiled.
        limit: of memory.
    """
    config, progress = config or QuantConfig(), progress or Silent()
    source = open_source(model)
    started = time.perf_counter()
    data = calibration.data
    inputs = model_inputs(data, calibration.samples) or token_inputs(
        _tokens(
            source, calibration, config, progress, (limit or MemoryLimit()).by_device(torch.device(device))
        ),
        source.module,
    )
    report = _report(config, inputs, source)
    current().agree("calibration data or options", [inputs.sha256, report.config])
    opened = None if journal is None else journal(source, inputs, report)
    limit = limit or MemoryLimit()
    source.stand_ins = stand_ins(source, limit, torch.device(device))
    if source.stand_ins is not None:
        report.note(
            "capture", "graphs are compared, and folds proven, on made-up weights: the model's do not fit"
        )
    read = time.perf_counter()
    prepared = prepare(source, inputs.batches, device, report, root, limit)
    report.add_seconds("read-calibration", read - started)
    report.add_seconds("capture", time.perf_counter() - read)
    context = Context(config, prepared.batches, report, progress, probe=prepared.probe, journal=opened)
    context.limit, context.rows = limit, prepared.rows
    context.scratch = None if opened is None else opened.directory
    return Job(source, inputs, prepared.graph, context, left_out(source, prepared.graph, prepared.root))


def _keep(source: ModelSource, report: Report, kept: Mapping[str, str]) -> None:
    """Rows for the linears that the graph does not hold: they stay in float."""
    tensors = dict(named_tensors(source.module))
    for name, why in kept.items():
        n, k = tensors[name].shape
        row = LinearRow(name.removesuffix(".weight"), n, k, "kept", why, no_group=why)
        report.linears.setdefault(name, row)


def _tokens(
    source: ModelSource,
    calibration: Calibration,
    config: QuantConfig,
    progress: Progress,
    max_memory: Mapping[int | str, int] | None,
) -> CalibrationTokens:
    limit = sequence_limit(source.config) if source.config is not None else None
    vocabulary = vocabulary_size(source.config) if source.config is not None else None
    seq_len, tokenizer, data = calibration.seq_len, calibration.tokenizer, calibration.data
    # Nobody who asks for nothing in particular wants an error for a model with a short context.
    if limit is not None and seq_len == SEQ_LEN:
        seq_len = min(seq_len, limit)
    missing: ConfigError | None = None
    if tokenizer is None and source.path is not None and not isinstance(data, Tensor):
        try:
            tokenizer = source.tokenizer()
        except ConfigError as error:
            missing = error  # which token ids do not notice
    writes = isinstance(data, str) and data == "self"
    with tempfile.TemporaryDirectory() as folder:
        try:
            return load_tokens(
                data,
                tokenizer=tokenizer,
                model=source.materialized(max_memory, Path(folder)) if writes else None,
                max_calib_samples=calibration.samples,
                max_calib_seq_len=seq_len,
                split=calibration.split,
                column=calibration.column,
                seed=config.seed,
                limit=limit,
                vocab_size=vocabulary,
                progress=progress.count("reading calibration data"),
            )
        except NoTokenizerError as error:
            raise missing or error from error


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


def account(report: Report, source: ModelSource, lowered: Iterable[PackedModule]) -> None:
    """Sizes: as stored before (16 bits) and after, and what the packed linears hold in memory."""
    lowered = list(lowered)
    dense = sum(t.numel() for _, t in named_tensors(source.module) if t.is_floating_point())
    linears = sum(m.rows * m.in_features for m in lowered)
    packed = sum(packed_bytes(m.rows, m.in_features, m.scheme) for m in lowered)
    report.sizes |= {
        "linears_before": 2 * linears,
        "linears_after": packed,
        "model_before": 2 * dense,
        "model_after": 2 * (dense - linears) + packed,
    }
