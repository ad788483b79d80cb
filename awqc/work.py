"""Work in amounts that no device decides, from which a plan foretells time.

A pass states what it will do to a stage (:meth:`awqc.pipeline.Pass.work`); what a unit takes here is measured
by :mod:`awqc.planning.rates`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from awqc.memory import SAMPLED_ROWS, Kind
from awqc.observers.stages import Observer
from awqc.quantization.schemes import Schemes
from awqc.quantized import Scheme
from awqc.views import ExpertLinear, Linear, expert_linear, linear, operand, shape

#: flops, grams, rounded, factored: floating-point operations of products in float32, of those that add up
#: Gram matrices, of those that move tokens, and of Cholesky factorizations; moved, streamed: bytes that
#: elementwise ops read and write, of activations and of weights, which are too large for caches; clipped:
#: weights times clipping candidates; columns, elements: steps of compensated rounding, each of one column,
#: and the weights in them; calls: ops that compute, however small; read, written: bytes of files on disk;
#: loaded, paged: bytes of files that the system has in memory, brought to the device, through page-locked
#: memory or through any other; unloaded: bytes brought from the device to the host; packed: weights that a
#: backend packs; starts: what is done once in a process that uses the device, in times.
Unit = Literal[
    "flops",
    "grams",
    "rounded",
    "moved",
    "streamed",
    "clipped",
    "columns",
    "elements",
    "factored",
    "calls",
    "read",
    "loaded",
    "paged",
    "unloaded",
    "written",
    "packed",
    "starts",
]
Work = Counter[Unit]


def matrices_of(view: Linear | ExpertLinear) -> int:
    """How many matrices ``view`` holds: one, or one for each expert."""
    return view.count if isinstance(view, ExpertLinear) else 1


def gram_rows(width: int, kind: Kind) -> int:
    """Rows that an error ``(N, K)`` is multiplied with for its loss: of the Gram matrix, or of a sample."""
    return width if kind != "sampled" else SAMPLED_ROWS


def quantized_views(
    observers: Iterable[Observer], schemes: Schemes
) -> list[tuple[Observer, Linear | ExpertLinear, Scheme]]:
    """The linears and stacks that are to be quantized, with what observes their input."""
    return [(o, v, schemes[v.parameter]) for o in observers for v in o.views if v.parameter in schemes]


def rows(view: Linear | ExpertLinear) -> int:
    """Rows of input that ``view`` multiplies for one sample, of all experts together."""
    return math.prod(shape(view.x)[:-1])


def run(nodes: Iterable[fx.Node], rounded: bool) -> Work:
    """Executing ``nodes`` once; products of linears in the dtype that moves tokens if ``rounded``."""
    work = Work()
    for node in nodes:
        if node.op != "call_function":
            continue
        work["calls"] += 1
        view = linear(node) or expert_linear(node)
        if view is not None:
            unit: Unit = "rounded" if rounded else "flops"
            work[unit] += 2 * rows(view) * view.out_features * view.in_features
            continue
        packet, value = getattr(node.target, "overloadpacket", None), node.meta["val"]
        formula = flop_registry.get(packet)
        if packet is torch.ops.aten.scaled_dot_product_attention:
            q, k, v = (shape(operand(node, i)) for i in range(3))
            work["flops"] += sdpa_flop_count(q, k, v)
            work["moved"] += 6 * value.element_size() * math.prod(q[:-1]) * k[-2]  # scores and softmax
        elif formula is not None:
            operands = tree_map_only(fx.Node, lambda n: n.meta["val"], (node.args, dict(node.kwargs)))
            work["flops"] += int(formula(*operands[0], **operands[1], out_val=value))
        elif not is_view(node.target):
            work["moved"] += _bytes(node)
    return work


def weights_read(nodes: Iterable[fx.Node]) -> Work:
    """Making the weights of the linears in ``nodes``: dequantized from their codes, and cast."""
    views = [view for node in nodes if (view := linear(node) or expert_linear(node)) is not None]
    weights = sum(matrices_of(view) * view.out_features * view.in_features for view in views)
    return Work({"streamed": 30 * weights})


def _bytes(node: fx.Node) -> int:
    """Bytes of the tensors that ``node`` reads and writes."""
    values = [n.meta["val"] for n in (node, *node.all_input_nodes) if n.op != "get_attr"]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def is_view(op: object) -> bool:
    """Whether ``op`` computes nothing: its result is a view of what it is given, or no tensor op made it."""
    schema = getattr(op, "_schema", None)
    return schema is None or any(
        r.alias_info is not None and not r.alias_info.is_write for r in schema.returns
    )
