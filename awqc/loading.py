"""``awqc.load``: a quantized checkpoint in, a model that runs on a backend of one's choice out."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, fx, nn

from awqc.backend import Backend
from awqc.capture import capture
from awqc.checkpoints import Checkpoint, open_checkpoint
from awqc.compiled import Compilation, CompiledModel, assemble
from awqc.errors import CheckpointError
from awqc.lowered import LoweredExperts, LoweredLinears
from awqc.lowering import lower_linear
from awqc.report import REPORT_FILE, Report
from awqc.runtime import QuantLinear
from awqc.source import ModelSource, aliases, match_names, named_tensors, skeleton

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
    dense = _match_dense(module, checkpoint)
    linears = _match_linears(module, checkpoint)
    stored_as = {**dense, **{f"{name}.weight": f"{disk}.weight" for name, disk in linears.items()}}
    stored = [checkpoint.tensors.info(disk).dtype for disk in dense.values()]
    half = next((d for d in stored if d in (torch.float16, torch.bfloat16)), torch.float16)
    dtype = dtype or (torch.float32 if device.type == "cpu" else half)
    lowered = LoweredLinears()
    report = _report(path)
    rows = {row.name: row for row in report.linears.values()}
    for name, disk in linears.items():
        bias = checkpoint.dense(f"{disk}.bias") if f"{disk}.bias" in checkpoint.tensors else None
        chosen = lower_linear(checkpoint.weight(disk), bias, dtype, device, backend)
        lowered[name] = QuantLinear(chosen)
        if name in rows:
            rows[name].backend, rows[name].notes = chosen.backend.name, list(chosen.packed.notes)

    def value(name: str) -> Tensor:
        tensor = checkpoint.dense(dense[name])
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    tensors = {name: value(name) for name in dense}
    tensors |= {n: t.to(device) for n, t in named_tensors(module) if n not in dense and not t.is_meta}
    source = ModelSource(module, value, path, stored_as, half)
    vocabulary = next((t.shape[0] for n, t in named_tensors(module) if t.ndim == 2), 2)
    sample = {"input_ids": (torch.arange(_GRAPH_TOKENS, device=device) % vocabulary)[None]}

    def graph() -> fx.GraphModule:
        captured = capture(ModelSource(model, lambda n: dict(named_tensors(model))[n]), sample, None, device)
        attributes = {str(n.target): captured.weights[str(n.target)] for n in captured.parameters().values()}
        return fx.GraphModule(attributes, captured.fx)

    model = assemble(
        module, tensors, lowered, LoweredExperts(), Compilation(source, report, None, graph, sample)
    )
    return model


def _report(path: Path) -> Report:
    file = path / REPORT_FILE
    return Report.from_json(file.read_text()) if file.is_file() else Report()


def _match_linears(module: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Module name -> name on disk of every quantized linear, with the shapes compared."""
    modules = dict(module.named_modules())
    prefix = getattr(module, "base_model_prefix", "")
    found = match_names(list(modules), checkpoint.quantized_names(), prefix, {})
    unknown = set(checkpoint.quantized_names()) - set(found.values())
    if unknown:
        raise CheckpointError(
            f"{checkpoint.path} stores {len(unknown)} quantized linear(s), such as {min(unknown)!r}, that "
            "the model of its config.json does not have: config and weights belong to different models"
        )
    for name, disk in found.items():
        weight = getattr(modules[name], "weight", None)
        shape, expected = checkpoint.shape(disk), tuple(weight.shape) if isinstance(weight, Tensor) else ()
        if shape != expected and shape != expected[::-1]:
            raise CheckpointError(
                f"{checkpoint.path}: quantized linear {disk!r} is {shape}, but config.json describes "
                f"{expected}: config and weights belong to different models"
            )
    return found


def _match_dense(module: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter name -> name on disk of every dense tensor, with completeness and shapes checked."""
    tensors = dict(named_tensors(module))
    tied, prefix = aliases(module), getattr(module, "base_model_prefix", "")
    found = match_names([n for n, t in tensors.items() if t.is_meta], checkpoint.dense_names(), prefix, tied)
    packed = match_names(list(dict(module.named_modules())), checkpoint.quantized_names(), prefix, {})
    missing = [
        n for n, t in tensors.items() if t.is_meta and n not in found and n.rpartition(".")[0] not in packed
    ]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} tensor(s) that its config.json asks for, such as "
            f"{missing[0]!r}: the checkpoint is incomplete; copy or save it again"
        )
    for name, disk in list(found.items()):
        if name.rpartition(".")[0] in packed:
            del found[name]  # the bias of a quantized linear goes with it
            continue
        shape, expected = checkpoint.tensors.info(disk).shape, tuple(tensors[name].shape)
        if tuple(shape) != expected:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {disk!r} has shape {tuple(shape)}, but config.json describes "
                f"{expected}: config and weights belong to different models"
            )
    return found
