"""Save a compiled model: canonical weights out of the packed ones, dense tensors in the source's dtype."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from awqc.capture import relative_error
from awqc.checkpoints import check_input_scales, open_checkpoint, write_checkpoint
from awqc.errors import CheckpointError
from awqc.expert_storage import StoredLinear, join, stored_linears
from awqc.experts import QuantExperts
from awqc.graph import execute
from awqc.input_scales import SUFFIX
from awqc.lowering import lower_linear
from awqc.report import REPORT_FILE
from awqc.runtime import QuantLinear
from awqc.source import ModelSource, aliases
from awqc.views import operand

if TYPE_CHECKING:
    from awqc.compiled import Compilation, CompiledModel


def save(
    model: CompiledModel,
    compilation: Compilation,
    path: str | Path,
    format: str,
    *,
    overwrite: bool,
    check: bool,
) -> Path:
    """See :meth:`awqc.compiled.CompiledModel.save`."""
    source = compilation.source
    linears, stacks = model.quantized_linears(), model.quantized_experts()
    if any(linear.input_scale is not None for linear in linears.values()):
        check_input_scales(format)
    quantized = {source.module_on_disk(name): linear.unpack()[0] for name, linear in linears.items()}
    for name, experts in stacks.items():
        weight = experts.unpack()[0]
        quantized |= {linear.name: linear.of(weight) for linear in _on_disk(name, experts, source)}
    written = write_checkpoint(
        path,
        format=format,
        tensors=_dense(model, compilation, linears, stacks),
        quantized=quantized,
        config=_config(model, compilation),
        kept=_kept(model, compilation),
        head=_head(model),
        dtype=compilation.source.half,
        files_from=source.path,
        record=compilation.record() if format == "awqc" and compilation.record else None,
        documents={REPORT_FILE: compilation.report.to_json()},
        overwrite=overwrite,
    )
    if check:
        check_saved(model, compilation, written)
    return written


def _on_disk(name: str, experts: QuantExperts, source: ModelSource) -> list[StoredLinear]:
    return stored_linears(source.stored(name), experts.count, experts.transposed)


def _dense(
    model: nn.Module,
    compilation: Compilation,
    linears: Mapping[str, QuantLinear],
    stacks: Mapping[str, QuantExperts],
) -> Iterator[tuple[str, Tensor]]:
    """Every dense tensor under its name on disk; biases of quantized linears in their module's name."""
    held = {**linears, **stacks}
    packed = {f"{name}.{part}" for name, module in held.items() for part, _ in module.named_buffers()}
    tied = aliases(model)

    def stored(tensor: Tensor) -> Tensor:
        return tensor.detach().to(compilation.source.half) if tensor.is_floating_point() else tensor.detach()

    for name, tensor in model.state_dict().items():
        if name not in packed and name not in tied:
            for piece in compilation.source.stored(name):
                yield piece.name, stored(piece.take(tensor))
    for name, linear in linears.items():
        bias = linear.unpack()[1]
        if bias is not None:
            yield compilation.source.on_disk(f"{name}.bias"), stored(bias)
        if linear.input_scale is not None:  # not rounded: the weight was multiplied by its inverse
            yield compilation.source.module_on_disk(name) + SUFFIX, linear.input_scale


def _config(model: nn.Module, compilation: Compilation) -> dict[str, Any]:
    path = compilation.source.path
    if path is not None and (path / "config.json").is_file():
        config: dict[str, Any] = json.loads((path / "config.json").read_text())
    elif hasattr(model, "config"):
        config = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[operator,union-attr]
    else:
        raise CheckpointError(
            f"{type(model).__name__} has no config to save: only Hugging Face models make checkpoints that "
            "engines load; keep this one with torch.save(model.state_dict(), ...)"
        )
    config.pop("quantization_config", None)
    if not config.get("architectures"):  # a model built from a config: loaders ask which class it was
        config["architectures"] = [type(model).__name__]
    return config


def _kept(model: nn.Module, compilation: Compilation) -> list[str]:
    """Linears that stay dense, by the names of every loader: in the module tree and on disk. Routers are
    linears too, of a class of their own."""
    rows = compilation.report.linears.values()
    kept = {row.name for row in rows if row.decision != "quantized" and row.expert_count is None}
    modules = dict(model.named_modules(remove_duplicate=False))
    dense = [n for n, m in modules.items() if isinstance(m, nn.Linear) or n in kept]
    return list(dict.fromkeys(s for n in dense for s in (n, compilation.source.module_on_disk(n))))


def _head(model: nn.Module) -> str | None:
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    return next((n for n, m in model.named_modules(remove_duplicate=False) if m is embeddings and n), None)


def check_saved(model: CompiledModel, compilation: Compilation, path: Path) -> None:
    """Compare the first stage of the model in memory with the one that ``path`` holds.

    The lowered graph is run from its inputs through its first quantized linears to the input of the next,
    once on the tensors in memory and once on what reads back from disk.

    Raises:
        CheckpointError: if the results differ by more than the rounding of dense tensors to half precision.
    """
    graph = model.graph
    linears: dict[str, QuantLinear | QuantExperts] = {}
    linears |= model.quantized_linears()
    linears |= model.quantized_experts()
    nodes, result = _first_stage(graph.graph, {linear.op for linear in linears.values()})
    names = [str(node.target) for node in nodes if node.op == "get_attr"]
    memory = {name: _attribute(graph, name) for name in names}
    disk = _read_back(names, memory, linears, compilation, path)
    found, expected = (_run(nodes, tensors, compilation.sample)[result] for tensors in (disk, memory))
    error, bound = relative_error(found, expected), 64 * torch.finfo(compilation.source.half).eps
    if not error <= bound:
        raise CheckpointError(
            f"{path} does not read back as the model that was saved: its first stage differs by {error:.1e} "
            f"(rounding explains {bound:.1e}); do not use it, and report this"
        )


def _first_stage(graph: fx.Graph, ops: set[Any]) -> tuple[list[fx.Node], fx.Node]:
    """Nodes up to the second distinct input of quantized linears, and that input."""
    nodes: list[fx.Node] = []
    first: Any = None
    for node in graph.nodes:
        if node.op == "call_function" and node.target in ops:
            x: fx.Node = operand(node, 0)
            if first is not None and x is not first:
                return nodes, x
            first = x
        nodes.append(node)
    return nodes, nodes.pop().all_input_nodes[0]


def _attribute(graph: nn.Module, name: str) -> Tensor:
    owner, _, part = name.rpartition(".")
    value = getattr(graph.get_submodule(owner), part)
    assert isinstance(value, Tensor)
    return value


def _read_back(
    names: list[str],
    memory: dict[str, Tensor],
    linears: Mapping[str, QuantLinear | QuantExperts],
    compilation: Compilation,
    path: Path,
) -> dict[str, Tensor]:
    """What the checkpoint holds for ``names``, lowered again where it is quantized."""
    checkpoint, source = open_checkpoint(path), compilation.source
    disk: dict[str, Tensor] = {}
    for name in names:
        owner, _, _ = name.rpartition(".")
        stored, value = source.on_disk(name), memory[name]
        if name.endswith(SUFFIX):
            disk[name] = checkpoint.dense(source.module_on_disk(owner) + SUFFIX).to(value.device)
        elif owner in linears:
            linear, bias = linears[owner], source.on_disk(f"{owner}.bias")
            if isinstance(linear, QuantExperts):
                weight = join(_on_disk(owner, linear, source), checkpoint.weight)
            else:
                weight = checkpoint.weight(source.module_on_disk(owner))
            lowered = lower_linear(
                weight,
                checkpoint.dense(bias) if bias in checkpoint.tensors else None,
                linear.dtype,
                value.device,
                linear.backend,
            )
            tensor = lowered.packed.tensors[name.removeprefix(f"{owner}.")]
            assert tensor is not None
            disk[name] = tensor.to(value.dtype)
        elif stored in checkpoint.tensors:
            disk[name] = checkpoint.dense(stored).to(value.device, value.dtype)
        else:
            disk[name] = value  # a buffer that no checkpoint stores
    return disk


def _run(
    nodes: list[fx.Node], tensors: dict[str, Tensor], sample: Mapping[str, Tensor]
) -> dict[fx.Node, Any]:
    env: dict[fx.Node, Any] = {n: sample[str(n.target)] for n in nodes if n.op == "placeholder"}
    execute(nodes, env, tensors)
    return env
