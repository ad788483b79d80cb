"""``awqc.compile``: a float model in, a quantized model out; and ``awqc.compile_to``, which writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awqc.backend import Backend
from awqc.config import QuantConfig
from awqc.context import Progress
from awqc.flags import Flags
from awqc.job import SEQ_LEN, Calibration, Job, account, check_pipeline, start
from awqc.pipeline import Pipeline
from awqc.runtime.compiled import Compilation, CompiledModel, assemble, structural_copy
from awqc.runtime.lowered import LoweredExperts, LoweredLinears
from awqc.runtime.lowered_graph import LoweredGraph
from awqc.storage.source import ModelSource, named_tensors
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
    max_calib_seq_len: int = SEQ_LEN,
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
    pipeline = check_pipeline(pipeline, backend)
    calibration = Calibration(calib, tokenizer, max_calib_samples, max_calib_seq_len, split, column)
    job = start(model, calibration, config, root, device, progress)
    job.run(pipeline, flags)
    return _finish(job)


def _finish(job: Job) -> CompiledModel:
    """Put what the passes left in the graph into the model's modules."""
    source, graph, report = job.source, job.graph, job.context.report
    lowered, stacks = graph.facts[LoweredLinears], graph.facts[LoweredExperts]
    weights = graph.weights
    account(report, source, [*lowered.values(), *stacks.values()])

    module = structural_copy(source.module)

    def lowered_graph() -> LoweredGraph:
        shared: dict[str, Tensor] = dict(compiled.named_parameters(remove_duplicate=False))
        shared |= dict(compiled.named_buffers(remove_duplicate=False))
        names = [str(n.target) for n in graph.fx.nodes if n.op == "get_attr"]
        # Constants that tracing lifted belong to no module: only the graph has them.
        tensors = {n: shared[n] if n in shared else weights[n] for n in names}
        return LoweredGraph(tensors, graph.fx, [*lowered, *stacks])

    # A function, so that a deep copy of the model does not copy the job.
    compilation = Compilation(source, report, lambda: job.record(), lowered_graph, job.context.batches[0])
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
