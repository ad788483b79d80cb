"""``awqc.compile_to``: a model compiled onto disk, stage by stage, so that it never has to be in memory.

What a stage has changed goes to a journal beside the output, and from there, when all stages are done, into
the checkpoint, tensor by tensor. A job that is killed leaves the journal, and the same call continues it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awqc.backend import Backend
from awqc.calibration import CalibrationInputs
from awqc.checkpoints import check_format, check_input_scales, check_output
from awqc.checkpoints.shards import MAX_SHARD_BYTES
from awqc.config import QuantConfig
from awqc.context import Progress
from awqc.errors import CheckpointError, ConfigError
from awqc.flags import Flags
from awqc.job import SEQ_LEN, Calibration, Job, account, check_pipeline, start
from awqc.journal import Follower, Identity, Journal, SourceDigest, journal_path
from awqc.journal.entry import write_whole
from awqc.memory import SHARD_SHARE, enforced, memory_limit
from awqc.pipeline import Pipeline
from awqc.ranks import current
from awqc.report import REPORT_FILE, Report
from awqc.runtime.experts import QuantExperts
from awqc.runtime.linear import QuantLinear
from awqc.runtime.lowered import LoweredExperts, LoweredLinears
from awqc.storage.saving import Result, lowered_part, write
from awqc.storage.source import ModelSource, aliases


@dataclass(frozen=True)
class CompiledCheckpoint:
    """What a compile has written.

    Args:
        path: the directory, absolute.
        format: of the checkpoint.
        report: every decision; also in the directory.
    """

    path: Path
    format: str
    report: Report


def compile_to(
    model: nn.Module | str | Path,
    out: str | Path,
    calib: Any = "self",
    *,
    format: str = "awq",
    overwrite: bool = False,
    resume: bool = True,
    max_memory: int | str | Mapping[int | str, int | str] | None = None,
    backend: str | Backend = "auto",
    config: QuantConfig | None = None,
    pipeline: Pipeline | None = None,
    tokenizer: Any = None,
    max_calib_samples: int = 128,
    max_calib_seq_len: int = SEQ_LEN,
    split: str | None = None,
    column: str | None = None,
    root: str | None = None,
    device: str | torch.device = "cpu",
    flags: Flags | None = None,
    progress: Progress | None = None,
) -> CompiledCheckpoint:
    """Quantize a model onto disk: what :func:`awqc.compile` and ``save`` do, in the memory of one stage.

    Finished stages are kept in ``OUT.journal`` until the checkpoint is complete. After a crash, or with the
    disk full, the same call continues from there and ends with the same bits.

    Args:
        model: a directory with ``config.json`` and safetensors, or a module.
        out: the directory to write; it appears whole or not at all.
        format: of the checkpoint: ``"awq"``, ``"compressed-tensors"`` or ``"awqc"``.
        overwrite: replace a checkpoint that is there.
        resume: continue from the journal; False starts over.
        max_memory: what may be used on the compute device, such as ``"10GB"``, or by device, such as
            ``{"cuda:0": "10GB", "cpu": "30GB"}``. See :mod:`awqc.memory` for what is done to keep it.
        backend: what is to run the result; the report says what takes each linear.

    All other arguments are those of :func:`awqc.compile`.

    Returns:
        The path and the report.

    Raises:
        JournalError: if the journal is that of another compile, or the disk is full.
        AwqcError: as :func:`awqc.compile` and :meth:`awqc.CompiledModel.save`.
    """
    target = check_output(out, overwrite=overwrite)
    if not isinstance(model, nn.Module) and target == Path(model).resolve():
        raise ConfigError(f"{out} is the model itself: choose another output path")
    flags = flags or Flags.from_environment()
    pipeline = check_pipeline(pipeline, backend, pack=False)
    calibration = Calibration(calib, tokenizer, max_calib_samples, max_calib_seq_len, split, column)
    limit = memory_limit(max_memory, torch.device(device))
    chosen = config or QuantConfig()
    opened: list[Journal] = []
    ranks = current()

    def journal(source: ModelSource, inputs: CalibrationInputs, report: Report) -> Journal:
        identity = Identity.of(chosen, pipeline, flags.skip, inputs.sha256, root or "", torch.device(device))
        directory = journal_path(target)
        ranks.agree("what they compile", dict(identity))
        if ranks.first:
            opened.append(Journal(directory, identity, SourceDigest(source), report, resume))
        ranks.agree("", None)  # the first process has opened it, or cleared it
        if not ranks.first:
            opened.append(Follower(directory, identity, report))
        return opened[0]

    try:
        with enforced(limit, torch.device(device)):
            job = start(model, calibration, chosen, root, device, progress, journal, limit)
            job.run(pipeline, flags)
            if ranks.first:
                with job.context.report.timed("save"):
                    written = _write(job, target, format, overwrite)
                # Now that it is known how long that took.
                write_whole(target / REPORT_FILE, written.report.to_json().encode())
            else:
                written = CompiledCheckpoint(target, format, job.context.report)
            ranks.agree("", None)  # what is written is there for all
    except KeyboardInterrupt as error:
        for one in opened:
            one.close()
        raise KeyboardInterrupt(_left(opened)) from error
    finally:
        for one in opened:
            one.close()
    for one in opened:
        one.remove()
    return written


def _left(opened: list[Journal]) -> str:
    if not opened or not opened[0].directory.is_dir():
        return ""
    return f"finished stages are in {opened[0].directory}; the same command continues from there"


def _write(job: Job, out: Path, format: str, overwrite: bool) -> CompiledCheckpoint:
    """Write the checkpoint; what the format turns out not to carry is kept in the one that carries all."""
    report, facts = job.context.report, job.graph.facts
    lowered = [*facts[LoweredLinears].values(), *facts[LoweredExperts].values()]
    account(report, job.source, lowered)
    result, error = _result(job), None
    shapes = {n: (m.out_features, m.in_features, m.scheme) for n, m in _held(job).items()}
    try:
        check_format(format, shapes)
        if any(linear.input_scale is not None for linear in result.linears.values()):
            check_input_scales(format)
    except CheckpointError as refused:
        format, error = "awqc", refused
    host = job.context.limit.host
    most = MAX_SHARD_BYTES if host is None else min(MAX_SHARD_BYTES, int(SHARD_SHARE * host))
    path = write(result, out, format, overwrite=overwrite, max_shard_bytes=most)
    if error is not None:
        raise CheckpointError(
            f"{error}. Nothing is lost: the result is in {path} in format 'awqc', from which awqc.load(...)"
            ".save(..., format=...) writes another"
        ) from error
    return CompiledCheckpoint(path, format, report)


def _held(job: Job) -> dict[str, QuantLinear | QuantExperts]:
    return {**job.graph.facts[LoweredLinears], **job.graph.facts[LoweredExperts]}


def _result(job: Job) -> Result:
    graph, source, held = job.graph, job.source, _held(job)
    weights, facts = graph.weights, graph.facts
    parameters = {name: name if isinstance(m, QuantExperts) else f"{name}.weight" for name, m in held.items()}
    packed, tied = set(parameters.values()), aliases(source.module)

    def weight(name: str) -> Any:
        rounded = weights.rounded(parameters[name])
        assert rounded is not None
        return rounded.weight

    def dense() -> Iterator[tuple[str, Tensor]]:
        for name in source.module.state_dict():
            if name not in packed and name not in tied:
                value = weights.value(name)
                assert isinstance(value, Tensor)
                yield name, value

    def value(name: str) -> Tensor:
        owner, _, part = name.rpartition(".")
        if owner not in held or part not in held[owner].operands():
            found = weights[name]
            weights.release()
            return found
        bias = f"{owner}.bias" if f"{owner}.bias" in weights.names else None
        dense = None if bias is None else weights[bias]
        return lowered_part(held[owner], weight(owner), dense, weights.device, part)

    return Result(
        source.module,
        source,
        job.context.report,
        job.record,
        facts[LoweredLinears],
        facts[LoweredExperts],
        weight,
        dense,
        lambda: graph.fx,
        value,
        job.context.batches[0],
    )
