"""Save a compiled model: canonical weights out of the packed ones, dense tensors in the source's dtype."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from awqc.capture import relative_error
from awqc.checkpoints import (
    Checkpoint,
    QuantizedStream,
    SearchRecord,
    check_input_scales,
    open_checkpoint,
    write_checkpoint,
)
from awqc.checkpoints.shards import MAX_SHARD_BYTES
from awqc.errors import CheckpointError
from awqc.program import execute
from awqc.quantized import QuantizedWeight
from awqc.report import REPORT_FILE, Report
from awqc.runtime.experts import QuantExperts
from awqc.runtime.input_scales import SUFFIX
from awqc.runtime.linear import QuantLinear
from awqc.runtime.lowering import lower_linear
from awqc.storage.expert_storage import StoredLinear, cut, join, stored_linears
from awqc.storage.source import ModelSource, aliases
from awqc.views import operand

if TYPE_CHECKING:
    from awqc.runtime.compiled import Compilation, CompiledModel


@dataclass(frozen=True)
class Result:
    """A quantized model wherever its tensors are: in modules, or in a journal on disk.

    Args:
        model: class, config and structure; its tensors are not read.
        source: names on disk and files beside the weights.
        report: goes along.
        record: of the search.
        linears, stacks: what runs each quantized linear or stack of experts; their tensors may be on meta.
        weight: reads the canonical weight of one of them by its name.
        dense: every other tensor that a checkpoint holds, by its name in the model.
        graph: the lowered graph.
        value: a tensor of it by name.
        sample: an input of it.
    """

    model: nn.Module
    source: ModelSource
    report: Report
    record: Callable[[], SearchRecord] | None
    linears: Mapping[str, QuantLinear]
    stacks: Mapping[str, QuantExperts]
    weight: Callable[[str], QuantizedWeight]
    dense: Callable[[], Iterator[tuple[str, Tensor]]]
    graph: Callable[[], fx.Graph]
    value: Callable[[str], Tensor]
    sample: Mapping[str, Tensor]


def save(
    model: CompiledModel,
    compilation: Compilation,
    path: str | Path,
    format: str,
    *,
    overwrite: bool,
    check: bool,
) -> Path:
    """See :meth:`awqc.runtime.compiled.CompiledModel.save`."""
    linears, stacks = model.quantized_linears(), model.quantized_experts()
    held: dict[str, QuantLinear | QuantExperts] = {**linears, **stacks}
    result = Result(
        model,
        compilation.source,
        compilation.report,
        compilation.record,
        linears,
        stacks,
        lambda name: held[name].unpack()[0],
        lambda: _dense(model, linears, stacks),
        lambda: model.graph.graph,
        lambda name: _attribute(model.graph, name),
        compilation.sample,
    )
    return write(result, path, format, overwrite=overwrite, check=check)


def write(
    result: Result,
    path: str | Path,
    format: str,
    *,
    overwrite: bool = False,
    check: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a checkpoint, tensor by tensor; see :meth:`awqc.runtime.compiled.CompiledModel.save`."""
    if any(linear.input_scale is not None for linear in result.linears.values()):
        check_input_scales(format)
    written = write_checkpoint(
        path,
        format=format,
        tensors=_stored(result),
        quantized=_quantized(result),
        config=_config(result),
        kept=_kept(result),
        head=_head(result.model),
        dtype=result.source.half,
        files_from=result.source.path,
        record=result.record() if format == "awqc" and result.record else None,
        documents={REPORT_FILE: result.report.to_json()},
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )
    if check:
        check_saved(result, written)
    return written


def _quantized(result: Result) -> QuantizedStream:
    """Every quantized linear under its name on disk, those of a stack too."""
    source, shapes = result.source, {}
    for name, linear in result.linears.items():
        shapes[source.module_on_disk(name)] = (linear.out_features, linear.in_features, linear.scheme)
    pieces = {name: _on_disk(name, experts, source) for name, experts in result.stacks.items()}
    for name, experts in result.stacks.items():
        for piece in pieces[name]:
            rows = experts.out_features if piece.outputs is None else len(piece.outputs)
            shapes[piece.name] = (rows, experts.in_features, experts.scheme)

    def weights() -> Iterator[tuple[str | list[str], QuantizedWeight]]:
        for name in result.linears:
            yield source.module_on_disk(name), result.weight(name)
        for name in result.stacks:
            yield from cut(pieces[name], result.weight(name))

    return QuantizedStream(shapes, weights)


def _on_disk(name: str, experts: QuantExperts, source: ModelSource) -> list[StoredLinear]:
    return stored_linears(source.stored(name), experts.count, experts.transposed)


def _dense(
    model: nn.Module, linears: Mapping[str, QuantLinear], stacks: Mapping[str, QuantExperts]
) -> Iterator[tuple[str, Tensor]]:
    """Every dense tensor under its name in the model; biases of quantized linears in their module's name."""
    held = {**linears, **stacks}
    packed = {f"{name}.{part}" for name, module in held.items() for part, _ in module.named_buffers()}
    tied = aliases(model)
    for name, tensor in model.state_dict().items():
        if name not in packed and name not in tied:
            yield name, tensor
    for name, linear in linears.items():
        bias = linear.unpack()[1]
        if bias is not None:
            yield f"{name}.bias", bias


def _stored(result: Result) -> Iterator[tuple[str, Tensor]]:
    """Every dense tensor under its name on disk, and the scales of inputs."""
    source = result.source
    for name, tensor in result.dense():
        tensor = tensor.detach().to(source.half) if tensor.is_floating_point() else tensor.detach()
        if name.rpartition(".")[0] in result.linears:
            yield source.on_disk(name), tensor
        else:
            yield from ((piece.name, piece.take(tensor)) for piece in source.stored(name))
    for name, linear in result.linears.items():
        if linear.input_scale is not None:  # not rounded: the weight was multiplied by its inverse
            yield source.module_on_disk(name) + SUFFIX, linear.input_scale


def _config(result: Result) -> dict[str, Any]:
    path, model = result.source.path, result.model
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


def _kept(result: Result) -> list[str]:
    """Linears that stay dense, by the names of every loader: in the module tree and on disk. Routers are
    linears too, of a class of their own."""
    rows = result.report.linears.values()
    kept = {row.name for row in rows if row.decision != "quantized" and row.expert_count is None}
    modules = dict(result.model.named_modules(remove_duplicate=False))
    quantized = {id(modules[name]) for name in result.linears}
    dense = [
        n for n, m in modules.items() if (isinstance(m, nn.Linear) and id(m) not in quantized) or n in kept
    ]
    return list(dict.fromkeys(s for n in dense for s in (n, result.source.module_on_disk(n))))


def _head(model: nn.Module) -> str | None:
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    return next((n for n, m in model.named_modules(remove_duplicate=False) if m is embeddings and n), None)


def check_saved(result: Result, path: Path) -> None:
    """Compare the first stage of the result with the one that ``path`` holds.

    The lowered graph is run from its inputs through its first quantized linears to the input of the next,
    once on the tensors that were saved and once on what reads back from disk.

    Raises:
        CheckpointError: if the results differ by more than the rounding of dense tensors to half precision.
    """
    held: dict[str, QuantLinear | QuantExperts] = {**result.linears, **result.stacks}
    nodes, end = _first_stage(result.graph(), {linear.op for linear in held.values()})
    checkpoint = open_checkpoint(path)
    seen: dict[str, tuple[torch.device, torch.dtype]] = {}

    def saved(name: str) -> Tensor:
        value = result.value(name)
        seen[name] = value.device, value.dtype
        return value

    def read(name: str) -> Tensor:
        value = _read_back(name, *seen[name], held, result.source, checkpoint)
        return result.value(name) if value is None else value  # a buffer that no checkpoint stores

    expected, found = (_run(nodes, end, _Tensors(of), result.sample) for of in (saved, read))
    error, bound = relative_error(found, expected), 64 * torch.finfo(result.source.half).eps
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


class _Tensors(Mapping[str, Tensor]):
    """Tensors of a graph, each there for the op that reads it.

    Args:
        read: gives one by its name.
    """

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError("tensors are read by their names")

    def __len__(self) -> int:
        raise NotImplementedError("tensors are read by their names")


def _read_back(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    held: Mapping[str, QuantLinear | QuantExperts],
    source: ModelSource,
    checkpoint: Checkpoint,
) -> Tensor | None:
    """What the checkpoint holds for ``name``, lowered again where it is quantized; None for nothing."""
    owner, _, part = name.rpartition(".")
    stored = source.on_disk(name)
    if name.endswith(SUFFIX):
        return checkpoint.dense(source.module_on_disk(owner) + SUFFIX).to(device)
    if owner in held:
        linear, bias = held[owner], source.on_disk(f"{owner}.bias")
        if isinstance(linear, QuantExperts):
            weight = join(_on_disk(owner, linear, source), checkpoint.weight)
        else:
            weight = checkpoint.weight(source.module_on_disk(owner))
        dense = checkpoint.dense(bias) if bias in checkpoint.tensors else None
        return lowered_part(linear, weight, dense, device, part).to(dtype)
    if stored not in checkpoint.tensors:
        return None
    # Two steps: in one, a copy in the other dtype would be made on the host.
    return checkpoint.dense(stored).to(device).to(dtype)


def lowered_part(
    linear: QuantLinear | QuantExperts,
    weight: QuantizedWeight,
    bias: Tensor | None,
    device: torch.device,
    part: str,
) -> Tensor:
    """The packed tensor ``part`` of ``weight``, lowered as ``linear`` is."""
    tensor = lower_linear(weight, bias, linear.dtype, device, linear.backend).packed.tensors[part]
    assert tensor is not None
    return tensor


def _run(
    nodes: list[fx.Node], end: fx.Node, tensors: Mapping[str, Tensor], sample: Mapping[str, Tensor]
) -> Any:
    env: dict[fx.Node, Any] = {n: sample[str(n.target)] for n in nodes if n.op == "placeholder"}
    execute(nodes, env, tensors, keep=[end])
    return env[end]
