"""torch -> ONNX: the model is traced once for all sizes, then translated by torch's own exporter.

Quantized linears pass through as nodes of ops of awqc's own on canonical codes, ``awqc.QLinear`` and
``awqc.QExperts``; what they become in ONNX is decided afterwards (:mod:`awqc.export.lowering`).
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from awqc.errors import CaptureError
from awqc.export.decoder import Decoder, Interface
from awqc.export.names import rename
from awqc.export.translations import TRANSLATIONS
from awqc.runtime.experts import QuantExperts
from awqc.runtime.packed import PackedModule

#: The ops of quantized linears: inputs x, codes, scales, zeros, bias or none, for experts offsets or none, as
#: ``awqc::qlinear`` and ``awqc::qexperts`` have them; attributes ``bits`` and ``group_size``.
DOMAIN, QLINEAR, QEXPERTS = "awqc", "QLinear", "QExperts"
#: Buffers that hold the canonical weight while a module is traced.
_OPERANDS = ("_codes", "_scales", "_zeros", "_bias")


def trace(model: nn.Module, interface: Interface, opset: int) -> ir.Model:
    """The ONNX graph of ``model``, its quantized linears as ``awqc.QLinear`` nodes.

    Args:
        model: a causal language model; its parameters are shared with the result.
        interface: what goes in and comes out.
        opset: version of the standard operator set.

    Raises:
        CaptureError: if the forward cannot be traced for all sizes at once, or holds an op without an ONNX
            translation.
    """
    arguments, shapes = interface.example()
    decoder = Decoder(model).eval()
    with _grouped_experts(model), _canonical(model), torch.no_grad(), _quiet():
        try:
            program = torch.export.export(decoder, (), arguments, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} could not be traced by torch.export for all batch sizes and "
                f"lengths: {_first_line(error)}"
            ) from error
        try:
            exported = torch.onnx.export(
                program,
                input_names=interface.inputs,
                output_names=interface.outputs,
                opset_version=opset,
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise CaptureError(
                f"{type(model).__name__} cannot be written as ONNX: {_cause(error)}"
            ) from error
    assert exported is not None
    rename(exported.model, "model", interface.dimensions)
    return exported.model


@contextmanager
def _canonical(model: nn.Module) -> Iterator[None]:
    """Within the block every quantized linear of ``model``, and every stack of experts' linears, is one node
    that holds its canonical weight."""
    packed = [module for module in model.modules() if isinstance(module, PackedModule)]
    try:
        for module in packed:
            weight, bias = module.unpack()
            held = dict(zip(_OPERANDS, (weight.codes, weight.scales, weight.zeros, bias), strict=True))
            module._buffers |= {name: tensor for name, tensor in held.items() if tensor is not None}
            module.forward = functools.partial(_node, module)
        yield
    finally:
        for module in packed:
            module.__dict__.pop("forward", None)
            for name in _OPERANDS:
                module._buffers.pop(name, None)


def _node(module: PackedModule, x: Tensor, *offsets: Tensor | None) -> Tensor:
    operands = [module._buffers.get(name) for name in _OPERANDS]
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{QEXPERTS if isinstance(module, QuantExperts) else QLINEAR}",
        (x, *operands, *offsets),
        {"bits": module.scheme.bits, "group_size": module.scheme.group(module.in_features)},
        dtype=x.dtype,
        shape=(*x.shape[:-1], module.out_features),
        version=1,
    )


@contextmanager
def _grouped_experts(model: Any) -> Iterator[None]:
    """Within the block experts multiply sorted rows, if they can: other ways branch on values."""
    if not getattr(model, "_can_set_experts_implementation", lambda: False)():
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("grouped_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """No remarks of the exporter's about packages it could have used and names it did not."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def _cause(error: BaseException) -> str:
    """The first line of what began it, since the exporter reports what it did first."""
    cause: Any = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return _first_line(cause)
