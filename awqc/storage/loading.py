"""``awqc.load``: a quantized checkpoint in, a model that runs on a backend of one's choice out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from awqc.backend import Backend
from awqc.calibration import token_batch
from awqc.capture import capture
from awqc.checkpoints import open_checkpoint
from awqc.errors import CheckpointError, ConfigError
from awqc.report import REPORT_FILE, Report
from awqc.runtime.compiled import Compilation, CompiledModel, assemble
from awqc.runtime.linear import QuantLinear
from awqc.runtime.lowered import LoweredExperts, LoweredLinears
from awqc.runtime.lowered_graph import LoweredGraph
from awqc.runtime.packing import Packing
from awqc.runtime.placement import Place, compute_places, main_device, on
from awqc.storage.contents import match_contents
from awqc.storage.disk_names import read_pieces
from awqc.storage.source import ModelSource, aliases, named_tensors, skeleton

#: Tokens in the input that the graph of a loaded model is captured with.
_GRAPH_TOKENS = 16


def load(
    path: str | Path,
    backend: str | Backend = "auto",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    device_map: str | Mapping[str, Place] | None = None,
    max_memory: Mapping[Place, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> CompiledModel:
    """Load a quantized checkpoint: AWQ in all its versions, compressed-tensors, or awqc's own.

    Args:
        path: the checkpoint directory.
        backend: what the linears are lowered to; needs no new search.
        device: where the model goes.
        dtype: dtype of dense tensors and activations; float32 on the CPU, else that of the checkpoint.
        device_map: instead of ``device``, several places: ``"auto"``, ``"balanced"``, ``"balanced_low_0"`` or
            ``"sequential"``, or a dict from module names to devices, ``"cpu"`` and ``"disk"``, as in
            accelerate. What is kept in host memory or on disk runs on the first accelerator of the map.
        max_memory: bytes (or ``"10GB"``) that weights may take of each place, such as ``{0: "10GB", "cpu":
            "30GB"}``; all that is free by default.
        offload_folder: where tensors go that fit in no memory.

    Raises:
        CheckpointError: if the checkpoint is damaged, incomplete, dense, or disagrees with its config.
        BackendError: for an unknown backend, or if its packed weights cannot be offloaded.
        ConfigError: if ``device_map`` or ``max_memory`` cannot be used.
    """
    path = Path(path)
    if device_map is None and (max_memory is not None or offload_folder is not None):
        raise ConfigError("max_memory and offload_folder divide a model: give device_map='auto' too")
    device = torch.device(device) if device_map is None else main_device(device_map, max_memory)
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
    packing = Packing(checkpoint, contents, dtype, backend)
    if device_map is None:
        placement = on(device)
    else:
        sized = packing.sized(module, device)
        placement = compute_places(sized, device_map, max_memory, device, offload_folder)
    lowered, stacks, report = LoweredLinears(), LoweredExperts(), _report(path)
    rows = {row.name: row for row in report.linears.values()} | report.linears
    for name in (*contents.linears, *contents.stacks):
        packed = packing.pack(name, placement.device(name))
        placement.put_packed(name, packed)
        if name in rows:
            rows[name].backend, rows[name].notes = packed.backend.name, list(packed.notes)
        if isinstance(packed, QuantLinear):
            lowered[name] = packed
        else:
            stacks[name] = packed
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(module)}

    def value(name: str) -> Tensor:
        tensor = read_pieces(dense[name], shapes[name], checkpoint.dense)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    names: dict[str, list[str]] = {name: [name] for name in dense}
    for other, first in aliases(module).items():
        if first in names:
            names[first].append(other)
    tensors = {name: placement.put(value(name), *spellings) for name, spellings in names.items()}
    if not placement.several:
        tensors |= {n: t.to(device) for n, t in named_tensors(module) if n not in dense and not t.is_meta}
    source = ModelSource(module, value, path, contents.stored_as, half)

    def graph() -> LoweredGraph:
        if placement.several:
            raise ConfigError("a model on several devices has no one graph: load it without device_map")
        captured = capture(ModelSource(model, lambda n: dict(named_tensors(model))[n]), sample, None, device)
        attributes = {str(n.target): captured.weights[str(n.target)] for n in captured.parameters().values()}
        return LoweredGraph(attributes, captured.fx, [*lowered, *stacks])

    model = assemble(module, tensors, lowered, stacks, Compilation(source, report, None, graph, sample))
    placement.dispatch(model)
    return model


def _report(path: Path) -> Report:
    file = path / REPORT_FILE
    return Report.from_json(file.read_text()) if file.is_file() else Report()
