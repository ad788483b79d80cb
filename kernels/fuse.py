"""Fusing the linears of a compiled model: a pass over the graph that ``torch.compile`` makes.

    torch.compile(model, options={"post_grad_custom_post_pass": FuseLinears()})

The pass sees ATen ops and those of kernels, and rewrites what ``awqc::qlinear_marlin`` stands next to:

* linears that read the same tensor become one ``qlinears_marlin``;
* of two such, ``silu(first) * second`` becomes ``qlinear_marlin_gated``;
* a sum with another tensor of the result's shape becomes ``qlinear_marlin_add``.

The model, its packed weights and its eager forward stay as they are. Only results that nobody else reads are
fused away. Fused forms round once where the ops round several times.
"""

from __future__ import annotations

import hashlib
import inspect
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from awqc.kernels.marlin_fused import MOST_WEIGHTS

aten, awqc = torch.ops.aten, torch.ops.awqc
_LINEAR = awqc.qlinear_marlin.default


class FuseLinears(CustomGraphPass):
    """The pass; how many of each form it made last is in :attr:`made`, which stays empty where the compiler
    finds the graph on disk, fused before."""

    def __init__(self) -> None:
        self.made: dict[str, int] = {}

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite ``graph`` in place."""
        self.made = {}
        for form, fuse in (("gated", _fuse_gates), ("add", _fuse_residuals), ("shared", _fuse_shared)):
            self.made[form] = fuse(graph)
            graph.eliminate_dead_code()  # what one form has taken in is nothing for the next
        graph.lint()

    def __deepcopy__(self, memo: object) -> FuseLinears:
        # Who copies its options must find them equal afterwards, or it compiles anew.
        return self

    def uuid(self) -> str:
        """What compiled graphs are kept under on disk: changes with this file."""
        return hashlib.sha256(inspect.getsource(sys.modules[__name__]).encode()).hexdigest()


def _linear(node: object) -> tuple[Any, ...] | None:
    """``x, packed, bias, out_features, group, bfloat16_scales`` if ``node`` is a linear."""
    return tuple(node.args) if isinstance(node, fx.Node) and node.target is _LINEAR else None


def _shape(node: object) -> tuple[torch.dtype, torch.Size] | None:
    """Dtype and sizes of what ``node`` computes."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return (value.dtype, value.shape) if isinstance(value, torch.Tensor) else None


def _replace(graph: fx.Graph, old: fx.Node, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with graph.inserting_before(old):
        new = graph.call_function(target, args)
    new.meta.update(old.meta)
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def _uncast(node: object, seen: set[fx.Node]) -> object:
    """What was cast to become ``node``; the casts are added to ``seen``."""
    while isinstance(node, fx.Node) and node.target is torch.ops.prims.convert_element_type.default:
        seen.add(node)
        node, *_ = node.args
    return node


def _silu_operand(node: object, seen: set[fx.Node]) -> object:
    """``x`` if ``node`` is SiLU of it, with casts around: as it is, or as inductor spells it,
    ``x / (exp(-x) + 1)``. The nodes of the pattern are added to ``seen``."""
    node = _uncast(node, seen)
    if not isinstance(node, fx.Node):
        return None
    seen.add(node)
    if node.target is aten.silu.default:
        (x,) = node.args
        return _uncast(x, seen)
    if node.target is not aten.div.Tensor:
        return None
    x, below = node.args
    for target, rest in ((aten.add.Tensor, (1,)), (aten.exp.default, ()), (aten.neg.default, ())):
        if not isinstance(below, fx.Node) or below.target is not target:
            return None
        seen.add(below)
        below, *others = below.args
        if tuple(others) != rest:
            return None
    return _uncast(x, seen) if below is x else None


def _fuse_gates(graph: fx.Graph) -> int:
    made = 0
    for node in list(graph.nodes):
        if node.target is not aten.mul.Tensor:
            continue
        left, right = node.args
        for gate, up in ((left, right), (right, left)):
            seen = {node}
            first = _silu_operand(gate, seen)
            mine, other = _linear(first), _linear(up)
            if mine is None or other is None or not isinstance(first, fx.Node) or first is up:
                continue
            same = (mine[0], *mine[2:]) == (other[0], *other[2:]) and mine[2] is None
            private = set(first.users) <= seen and set(up.users) == {node}
            inner = all(set(part.users) <= seen for part in seen - {node})
            if same and private and inner and _shape(node) == _shape(first):
                x, packed, _, *constants = mine
                _replace(graph, node, awqc.qlinear_marlin_gated.default, (x, packed, other[1], *constants))
                made += 1
                break
    return made


def _fuse_residuals(graph: fx.Graph) -> int:
    made = 0
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        left, right = node.args
        for linear, residual in ((left, right), (right, left)):
            found = _linear(linear)
            if found is None or set(linear.users) != {node} or linear is residual:
                continue
            if _shape(linear) == _shape(residual) == _shape(node) is not None:
                x, packed, bias, *constants = found
                arguments = (x, packed, bias, residual, *constants)
                _replace(graph, node, awqc.qlinear_marlin_add.default, arguments)
                made += 1
                break
    return made


def _fuse_shared(graph: fx.Graph) -> int:
    readers: dict[tuple[object, ...], list[fx.Node]] = {}
    for node in graph.nodes:
        found = _linear(node)
        if found is None:
            continue
        x, packed, bias, _, *constants = found
        if all(part is None or part.op in ("placeholder", "get_attr") for part in (packed, bias)):
            readers.setdefault((x, bias is None, *constants), []).append(node)
    made = 0
    for (x, without_bias, *constants), linears in readers.items():
        for start in range(0, len(linears), MOST_WEIGHTS):
            some = linears[start : start + MOST_WEIGHTS]
            if len(some) > 1:
                _share(graph, some, x, bool(without_bias), constants)
                made += 1
    return made


def _share(
    graph: fx.Graph, linears: Sequence[fx.Node], x: object, without_bias: bool, constants: Sequence[object]
) -> None:
    """One launch in the place of the first of ``linears``."""
    _, packed, biases, sizes, *_ = zip(*(linear.args for linear in linears), strict=True)
    arguments: tuple[Any, ...] = (
        x,
        list(packed),
        [] if without_bias else list(biases),
        list(sizes),
        *constants,
    )
    with graph.inserting_before(linears[0]):
        together: Any = graph.call_function(awqc.qlinears_marlin.default, arguments)
    together.meta["val"] = [linear.meta.get("val") for linear in linears]
    for index, linear in enumerate(linears):
        _replace(graph, linear, operator.getitem, (together, index))
