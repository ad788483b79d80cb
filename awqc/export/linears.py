"""What a quantized linear becomes in ONNX: one operator of ONNX Runtime's, or two standard ones.

A form takes the canonical weight, ``codes`` ``(N, K)`` with one scale and zero point for every group, and
writes it as its operator stores it. Nothing is rounded: codes of 3 bits are kept in 4, those of 5 to 7 in 8,
and a group that the operator has no size for is split into equal blocks that repeat its scale.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from awqc.checkpoints.packing import pack_bits
from awqc.quantized import QuantizedWeight

#: Block sizes of MatMulNBits: powers of two in this range.
_SMALLEST, _LARGEST = 16, 256


@dataclass(frozen=True)
class Linear:
    """A quantized linear in an ONNX graph: ``y = x @ W.T + bias``.

    Args:
        name: of its module, with dots.
        weight: canonical.
        x, bias: values in the graph; ``x`` is ``(..., K)`` and ``bias`` ``(N,)`` or None.
        dtype: of ``x``, and so of the scales.
    """

    name: str
    weight: QuantizedWeight
    x: ir.Value
    bias: ir.Value | None
    dtype: ir.DataType


class Form(ABC):
    """One way of writing quantized linears."""

    name: ClassVar[str]

    @abstractmethod
    def refuses(self, weight: QuantizedWeight) -> str | None:
        """Why the operators of this form cannot hold ``weight``, in one line; None if they can."""

    @abstractmethod
    def write(self, linear: Linear, graph: GraphWriter) -> ir.Value:
        """Add the nodes that compute ``linear`` to ``graph``; returns its output without the bias."""


class GraphWriter:
    """Nodes to be inserted into a graph, and their weights.

    Args:
        model: receives initializers at once; the nodes are collected in :attr:`nodes`.
        path: prefix of node names, ``/model/layers.0/mlp/down_proj``.
    """

    def __init__(self, model: ir.Model, path: str) -> None:
        self.nodes: list[ir.Node] = []
        self._model = model
        self._path = path
        self._used: Counter[str] = Counter()

    def weight(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A new initializer."""
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._model.graph.register_initializer(value)
        return value

    def constant(self, values: Sequence[int]) -> ir.Value:
        """A new initializer ``(len(values),)`` of integers, or the one of these values."""
        name = "constant_" + "_".join(map(str, values))
        if name in self._model.graph.initializers:
            return self._model.graph.initializers[name]
        return self.weight(name, ir.tensor(np.array(values, np.int64), name=name))

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        domain: str = "",
        version: int | None = None,
        **attributes: int,
    ) -> ir.Value:
        """A new node with one output, which is returned."""
        name = f"{self._path}/{op}" + (f"_{self._used[op]}" if self._used[op] else "")
        self._used[op] += 1
        node = ir.node(op, inputs, attributes, domain=domain, version=version, name=name)
        node.outputs[0].name = f"{name}_output"
        if version is not None:
            self._model.opset_imports.setdefault(domain, version)
        self.nodes.append(node)
        return node.outputs[0]


@dataclass(frozen=True)
class MatMulNBits(Form):
    """``com.microsoft.MatMulNBits``, which multiplies packed weights.

    Args:
        accuracy_level: what the activations may be rounded to: 0 leaves it to ONNX Runtime, 1 float32,
            2 float16, 3 bfloat16, 4 int8.
    """

    name: ClassVar[str] = "MatMulNBits"
    accuracy_level: int = 1

    def refuses(self, weight: QuantizedWeight) -> str | None:
        if _block(weight) is None:
            group = weight.scheme.group(weight.in_features)
            return f"MatMulNBits has blocks of 16 to 256 channels, powers of two, and none divides {group}"
        return None

    def write(self, linear: Linear, graph: GraphWriter) -> ir.Value:
        weight, bits = linear.weight, _width(linear.weight.scheme.bits, (2, 4, 8))
        n, k, block = weight.out_features, weight.in_features, _block(weight)
        assert block is not None
        blocks = math.ceil(k / block)
        codes = torch.nn.functional.pad(weight.codes, (0, blocks * block - k))
        scales, zeros = (_per_block(t, weight, block) for t in (weight.scales, weight.zeros))
        packed = pack_bits(codes, bits).view(n, blocks, block * bits // 8)
        inputs = [
            linear.x,
            graph.weight(f"{linear.name}.weight", ir.tensor(packed.numpy())),
            graph.weight(f"{linear.name}.scales", _floats(scales, linear.dtype)),
        ]
        if not bool((zeros == 1 << bits - 1).all()):  # which the operator takes when there are none
            packed_zeros = pack_bits(zeros, bits)[:, : math.ceil(blocks * bits / 8)].contiguous()
            inputs.append(graph.weight(f"{linear.name}.zero_points", ir.tensor(packed_zeros.numpy())))
        return graph.node(
            "MatMulNBits",
            inputs,
            domain="com.microsoft",
            version=1,
            K=k,
            N=n,
            bits=bits,
            block_size=block,
            accuracy_level=self.accuracy_level,
        )


@dataclass(frozen=True)
class Dequantize(Form):
    """``DequantizeLinear`` on blocks of a weight ``(K, N)``, then ``MatMul``: standard operators of opset 21.

    Stored input channels first, since ONNX Runtime then multiplies packed weights as with
    :class:`MatMulNBits`; other runtimes dequantize.
    """

    name: ClassVar[str] = "DequantizeLinear"

    def refuses(self, weight: QuantizedWeight) -> str | None:
        return None

    def write(self, linear: Linear, graph: GraphWriter) -> ir.Value:
        weight = linear.weight
        bits = _width(weight.scheme.bits, (4, 8))
        block = _block(weight) or weight.scheme.group(weight.in_features)
        scales, zeros = (_per_block(t, weight, block) for t in (weight.scales, weight.zeros))
        inputs = [
            graph.weight(f"{linear.name}.weight", _unsigned(weight.codes.T, bits)),
            graph.weight(f"{linear.name}.scales", _floats(scales.T.contiguous(), linear.dtype)),
            graph.weight(f"{linear.name}.zero_points", _unsigned(zeros.T, bits)),
        ]
        dense = graph.node("DequantizeLinear", inputs, axis=0, block_size=block)
        return graph.node("MatMul", [linear.x, dense])


def _width(bits: int, widths: Sequence[int]) -> int:
    return next(width for width in widths if width >= bits)


def _block(weight: QuantizedWeight) -> int | None:
    """The largest block size of MatMulNBits that a group is a multiple of; None if there is none."""
    k = weight.in_features
    group = weight.scheme.group(k)
    if group == k:  # one group: blocks may reach beyond the row
        return min(max(_SMALLEST, 1 << (k - 1).bit_length()), _LARGEST)
    block = math.gcd(group, _LARGEST)
    return block if block >= _SMALLEST else None


def _per_block(per_group: Tensor, weight: QuantizedWeight, block: int) -> Tensor:
    """``(N, G)`` spread over blocks, ``(N, ceil(K / block))``."""
    starts = torch.arange(0, weight.in_features, block)
    return per_group[:, starts // weight.scheme.group(weight.in_features)]


def _floats(tensor: Tensor, dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.tensor(tensor.float().numpy().astype(dtype.numpy()))


def _unsigned(codes: Tensor, bits: int) -> ir.TensorProtocol:
    """Codes of any shape as UINT4, two to a byte in row-major order, or UINT8."""
    if bits == 8:
        return ir.tensor(codes.contiguous().numpy())
    packed = pack_bits(codes.reshape(1, -1), 4)[0, : math.ceil(codes.numel() / 2)]
    return ir.PackedTensor(packed.numpy(), ir.DataType.UINT4, shape=codes.shape)
