"""A graph as stable text, and the difference between two such texts."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, fx

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def graph_text(graph: fx.Graph) -> str:
    """One line a node: ``name: f32[1, 16, 64] = aten.linear(x, model.q.weight)``."""
    return "\n".join(_line(node) for node in graph.nodes) + "\n"


def diff_text(before: str, after: str) -> str:
    """Unified diff of two graph texts without file headers; empty if they are equal."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=2)
    return "\n".join(line for line in lines if not line.startswith(("---", "+++")))


def _line(node: fx.Node) -> str:
    if node.op == "output":
        (result,) = node.args
        return f"return {_value(result)}"
    kind = value_type(node.meta.get("val"))
    if node.op == "placeholder":
        return f"{node.name}: {kind} = input"
    if node.op == "get_attr":
        return f"{node.target}: {kind} = parameter"
    arguments = [_value(a) for a in node.args] + [f"{k}={_value(v)}" for k, v in node.kwargs.items()]
    return f"{node.name}: {kind} = {node_op(node)}({', '.join(arguments)})"


def node_op(node: fx.Node) -> str:
    """What a node does: ``aten.linear``, or ``input``, ``parameter``, ``output``."""
    if node.op != "call_function":
        return {"placeholder": "input", "get_attr": "parameter"}.get(node.op, node.op)
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name.removesuffix(".default")
    return getattr(target, "__name__", str(target))


def value_type(value: Any) -> str:
    """Dtype and shape of a tensor, ``f32[1, 16, 64]``, or of several."""
    if isinstance(value, Tensor):
        return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(value_type(v) for v in value)})"
    return "?"


def _value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return str(value.target) if value.op == "get_attr" else value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_value(v) for v in value)
        return f"[{inner}]"
    if isinstance(value, torch.dtype):
        return _DTYPES.get(value, str(value))
    return str(value)
