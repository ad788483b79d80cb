"""What a quantized checkpoint holds for each parameter of the model that its config describes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from awqc.capture import capture
from awqc.checkpoints import Checkpoint
from awqc.config import QuantConfig
from awqc.context import Context
from awqc.driver import analysis_pipeline
from awqc.errors import CheckpointError
from awqc.storage.disk_names import Piece, disk_names, match_names, match_stored
from awqc.storage.expert_storage import StoredLinear, stored_linears
from awqc.storage.source import ModelSource, aliases, named_tensors
from awqc.views import expert_linears

SavedAs = Callable[[nn.Module], dict[str, list[Piece]]]


@dataclass(frozen=True)
class Contents:
    """Where everything is.

    Args:
        linears: module name -> name on disk, of quantized linears.
        stacks: parameter name of experts' stacked weights -> the quantized linears that they are stored as,
            and whether the parameter is ``(E, K, N)``.
        dense: name -> what it is stored as, of all other parameters.
        stored_as: the same for all parameters.
    """

    linears: dict[str, str]
    stacks: dict[str, tuple[list[StoredLinear], bool]]
    dense: dict[str, list[Piece]]
    stored_as: dict[str, list[Piece]]


def match_contents(module: nn.Module, checkpoint: Checkpoint, sample: Mapping[str, Tensor]) -> Contents:
    """Match the parameters of ``module``, which are on meta, with what ``checkpoint`` stores.

    Args:
        sample: an input, for models whose forward has to be looked at.

    Raises:
        CheckpointError: if a tensor is missing or of another shape, or belongs to no parameter.
    """
    wanted = [name for name, tensor in named_tensors(module) if tensor.is_meta]
    saved_as = functools.cache(disk_names)  # asked for up to three times, or not at all
    linears = _linears(module, checkpoint, saved_as)
    packed = {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
    unpacked = [name for name in wanted if name not in packed]
    dense = match_stored(unpacked, module, checkpoint.dense_names(), aliases(module), saved_as)
    missing = [name for name in wanted if name not in packed and name not in dense]
    stacks, pieces = _stacks(module, checkpoint, missing, sample, saved_as)
    unknown = set(checkpoint.quantized_names()) - set(linears.values())
    unknown -= {linear.name for stored, _ in stacks.values() for linear in stored}
    _check(module, checkpoint, dense, [name for name in missing if name not in stacks], unknown)
    of_linears = {f"{name}.weight": [Piece(f"{disk}.weight")] for name, disk in linears.items()}
    return Contents(linears, stacks, dense, {**dense, **pieces, **of_linears})


def _linears(module: nn.Module, checkpoint: Checkpoint, saved_as: SavedAs) -> dict[str, str]:
    modules = dict(module.named_modules())
    prefix = getattr(module, "base_model_prefix", "")
    names = [name for name in modules if isinstance(getattr(modules[name], "weight", None), Tensor)]
    quantized = checkpoint.quantized_names()
    found = match_names(names, quantized, prefix, {})
    if set(quantized) - set(found.values()):
        # Some belong to experts, and some have other names on disk than in the module.
        saved = {name: pieces[0].name for name, pieces in saved_as(module).items() if len(pieces) == 1}
        others = {
            saved[f"{name}.weight"].removesuffix(".weight"): name
            for name in names
            if name not in found and f"{name}.weight" in saved
        }
        found |= match_names(list(others.values()), quantized, prefix, others)
    for name, disk in found.items():
        shape, expected = checkpoint.shape(disk), tuple(modules[name].weight.shape)
        if shape != expected and shape != expected[::-1]:
            raise CheckpointError(
                f"{checkpoint.path}: quantized linear {disk!r} is {shape}, but config.json describes "
                f"{expected}: config and weights belong to different models"
            )
    return found


def _stacks(
    module: nn.Module,
    checkpoint: Checkpoint,
    missing: list[str],
    sample: Mapping[str, Tensor],
    saved_as: SavedAs,
) -> tuple[dict[str, tuple[list[StoredLinear], bool]], dict[str, list[Piece]]]:
    """Those of ``missing`` that are stored as quantized linears, and what their float weights would be."""
    tensors = dict(named_tensors(module))
    candidates = [name for name in missing if tensors[name].ndim == 3]
    saved = saved_as(module) if candidates else {}
    prefix, quantized = getattr(module, "base_model_prefix", ""), checkpoint.quantized_names()
    layouts: dict[str, bool] | None = None
    stacks: dict[str, tuple[list[StoredLinear], bool]] = {}
    pieces: dict[str, list[Piece]] = {}
    for name in candidates:
        shape = tuple(tensors[name].shape)
        of_parameter = saved.get(name, [Piece(name)])
        names = [linear.name for linear in stored_linears(of_parameter, shape[0], False)]
        there = match_names(names, quantized, prefix, {})
        if len(there) < len(names):
            continue
        if of_parameter[0].index is not None:
            transposed = of_parameter[0].transposed  # on disk, a linear's weight is (N, K)
        elif shape[1] != shape[2]:
            transposed = checkpoint.shape(there[names[0]]) == (shape[2], shape[1])
        else:
            # Nothing that is stored tells (N, K) from (K, N): the forward does.
            layouts = _layouts(module, sample) if layouts is None else layouts
            transposed = layouts.get(name, False)
        stored = stored_linears(of_parameter, shape[0], transposed)
        stored = [StoredLinear(there[one.name], one.index, one.outputs) for one in stored]
        _check_shapes(checkpoint, stored, shape[::-1][:2] if transposed else shape[1:])
        stacks[name], pieces[name] = (stored, transposed), of_parameter
    return stacks, pieces


def _layouts(module: nn.Module, sample: Mapping[str, Tensor]) -> dict[str, bool]:
    """Parameter name of experts' stacked weights -> whether the forward takes it for ``(E, K, N)``."""
    tensors = dict(named_tensors(module))
    graph = capture(ModelSource(module, tensors.__getitem__, has_values=False), sample)
    analysis_pipeline().run(graph, Context(QuantConfig()))
    return {view.parameter: view.transposed for view in expert_linears(graph)}


def _check_shapes(checkpoint: Checkpoint, stored: list[StoredLinear], expected: tuple[int, ...]) -> None:
    for linear in stored:
        shape = (expected[0] if linear.outputs is None else len(linear.outputs), expected[1])
        found = checkpoint.shape(linear.name)
        if found != shape:
            raise CheckpointError(
                f"{checkpoint.path}: quantized linear {linear.name!r} is {found}, but config.json describes "
                f"{shape}: config and weights belong to different models"
            )


def _check(
    module: nn.Module,
    checkpoint: Checkpoint,
    dense: Mapping[str, list[Piece]],
    missing: list[str],
    unknown: set[str],
) -> None:
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} tensor(s) that its config.json asks for, such as "
            f"{missing[0]!r}: the checkpoint is incomplete; copy or save it again"
        )
    tensors = dict(named_tensors(module))
    for name, pieces in dense.items():
        for piece in pieces:
            shape = tuple(checkpoint.tensors.info(piece.name).shape)
            expected = piece.shape(tuple(tensors[name].shape))
            if shape != expected:
                raise CheckpointError(
                    f"{checkpoint.path}: tensor {piece.name!r} has shape {shape}, but config.json describes "
                    f"{expected}: config and weights belong to different models"
                )
    if unknown:
        raise CheckpointError(
            f"{checkpoint.path} stores {len(unknown)} quantized linear(s), such as {min(unknown)!r}, that "
            "the model of its config.json does not have: config and weights belong to different models"
        )
