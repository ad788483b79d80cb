"""``awqc.load``: a quantized checkpoint in, a model that runs on a backend of one's choice out."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, fx

from awqc.backend import Backend
from awqc.calibration import token_batch
from awqc.capture import capture
from awqc.checkpoints import open_checkpoint
from awqc.compiled import Compilation, CompiledModel, assemble
from awqc.contents import match_contents
from awqc.disk_names import read_pieces
from awqc.errors import CheckpointError
from awqc.expert_storage import join
from awqc.experts import QuantExperts
from awqc.input_scales import SUFFIX
from awqc.lowered import LoweredExperts, LoweredLinears
from awqc.lowering import lower_linear
from awqc.report import REPORT_FILE, Report
from awqc.runtime import QuantLinear
from awqc.source import ModelSource, named_tensors, skeleton

#: Tokens in the input that the graph of a loaded model is captured with.
_GRAPH_TOKENS = 16


def load(
    path: str | Path,
    backend: str | Backend = "auto",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> CompiledModel:
    """Load a quantized checkpoint: AWQ in all its versions, compressed-tensors, or awqc's own.

    Args:
        path: the checkpoint directory.
        backend: what the linears are lowered to; needs no new search.
        device: where the model goes.
        dtype: dtype of dense tensors and activations; float32 on the CPU, else that of the checkpoint.

    Raises:
        CheckpointError: if the checkpoint is damaged, incomplete, dense, or disagrees with its config.
        BackendError: for an unknown backend.
    """
    path, device = Path(path), torch.device(device)
    checkpoint = open_checkpoint(path)
    if not checkpoint.quantized_names():
        raise CheckpointError(
            f"{path} holds no quantized linear: quantize it with awqc.compile, "
            "or load it with from_pretrained"
        )
    module = skeleton(path)
    vocabulary = next((t.shape[0] for n, t in named_tensors(module) if t.ndim == 2), 2)
    sample = token_batch((torch.arange(_GRAPH_TOKENS, device=device) % vocabulary)[None], module)
    contents = match_contents(module, checkpoint, sample)
    dense = contents.dense
    stored = [checkpoint.tensors.info(piece.name).dtype for pieces in dense.values() for piece in pieces]
    half = next((d for d in stored if d in (torch.float16, torch.bfloat16)), torch.float16)
    dtype = dtype or (torch.float32 if device.type == "cpu" else half)
    lowered = LoweredLinears()
    report = _report(path)
    rows = {row.name: row for row in report.linears.values()}
    for name, disk in contents.linears.items():
        bias = checkpoint.dense(f"{disk}.bias") if f"{disk}.bias" in checkpoint.tensors else None
        chosen = lower_linear(checkpoint.weight(disk), bias, dtype, device, backend)
        scale = disk + SUFFIX
        scaled = checkpoint.dense(scale).to(device) if scale in checkpoint.tensors else None
        lowered[name] = QuantLinear(chosen, scaled)
        if name in rows:
            rows[name].backend, rows[name].notes = chosen.backend.name, list(chosen.packed.notes)
    stacks = LoweredExperts()
    for name, (stored_in, transposed) in contents.stacks.items():
        chosen = lower_linear(join(stored_in, checkpoint.weight), None, dtype, device, backend)
        stacks[name] = QuantExperts(chosen, transposed)
        if name in report.linears:
            row = report.linears[name]
            row.backend, row.notes = chosen.backend.name, list(chosen.packed.notes)
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(module)}

    def value(name: str) -> Tensor:
        tensor = read_pieces(dense[name], shapes[name], checkpoint.dense)
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    tensors = {name: value(name) for name in dense}
    tensors |= {n: t.to(device) for n, t in named_tensors(module) if n not in dense and not t.is_meta}
    source = ModelSource(module, value, path, contents.stored_as, half)

    def graph() -> fx.GraphModule:
        captured = capture(ModelSource(model, lambda n: dict(named_tensors(model))[n]), sample, None, device)
        attributes = {str(n.target): captured.weights[str(n.target)] for n in captured.parameters().values()}
        return fx.GraphModule(attributes, captured.fx)

    model = assemble(module, tensors, lowered, stacks, Compilation(source, report, None, graph, sample))
    return model


def _report(path: Path) -> Report:
    file = path / REPORT_FILE
    return Report.from_json(file.read_text()) if file.is_file() else Report()
