"""Measured times of nodes, each alone, on the device that the graph is on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from awqc.inspection.cost import Cost, Rates
from awqc.inspection.subject import Subject
from awqc.kernels.autotune import graph_milliseconds
from awqc.kernels.hardware import hardware
from awqc.kernels.streaming_read import ROTATED, call_seconds, streaming_seconds
from awqc.runtime.lowered_graph import node_name

#: Bytes of the read that tells the bandwidth.
_READ = 64 << 20
#: Weights smaller than this share a cache line or a page with their copies; they are not copied.
_SMALL = 1 << 12
#: Seconds for each distinct call.
_BUDGET = 0.1
_MOST_COPIES = 4096


def is_here(subject: Subject) -> bool:
    """Whether the device that ``subject`` is for is one of this machine's."""
    if subject.device.type == "cuda" and not torch.cuda.is_available():
        return False
    return hardware(subject.device) == subject.hardware


def measured_rates(subject: Subject) -> Rates:
    """What the device of ``subject`` reads, measured now, and what its data sheet says of products."""
    read = _READ / streaming_seconds(_READ, subject.device)
    found = f"a streaming read on this {subject.device.type} device reaches {read / 1e9:.1f} GB/s"
    return Rates(read, subject.hardware.product_rate, found)


def sheet_rates(subject: Subject) -> Rates | None:
    """What the data sheet of the hardware says; None if there is none."""
    at = subject.hardware
    if at.read_rate is None:
        return None
    text = f"data sheet of {at.name}: {at.read_rate / 1e12:g} TB/s"
    if at.product_rate:
        text += f", {at.product_rate / 1e12:g} dense 16-bit TFLOP/s"
    return Rates(at.read_rate, at.product_rate, text)


def measure(
    subject: Subject, found: list[Cost], progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Fill in the seconds of ``found``: calls that are alike are timed once.

    A call's weight is one of so many copies that it is read from memory, as it is when a whole model runs;
    its input is random, and in the cache if it fits.
    """
    nodes = {node_name(node): node for node in subject.graph.nodes if node.op == "call_function"}
    known: dict[object, tuple[float | None, str]] = {}
    for done, cost in enumerate(found):
        progress(done, len(found))
        node = nodes[cost.name]
        key = _signature(node)
        if key not in known:
            known[key] = _time(subject, node)
        cost.seconds, cost.note = known[key]
    progress(len(found), len(found))


def _signature(node: fx.Node) -> object:
    """The same for calls of one op on tensors of the same shapes and dtypes and the same numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            item = value.meta.get("val")
            if isinstance(item, Tensor):
                return "tensor", tuple(item.shape), item.dtype, value.op
            return "value", str(item)
        return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else ("constant", str(value))

    return node.target, plain(node.args), plain(tuple(sorted(node.kwargs.items())))


def _time(subject: Subject, node: fx.Node) -> tuple[float | None, str]:
    """Seconds of one call, or why there are none."""
    call: Any = node.target
    try:
        with torch.no_grad():
            operands = {n: _value(subject, n) for n in node.all_input_nodes}
            weights = [n for n in node.all_input_nodes if n.op == "get_attr" and _size(operands[n]) > _SMALL]
            size = sum(_size(operands[n]) for n in weights)
            count = min(math.ceil(ROTATED / size), _MOST_COPIES) if weights else 1
            copies = [{n: operands[n].clone() for n in weights} for _ in range(count)]

            def run(i: int) -> object:
                values = {**operands, **copies[i % count]}
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                return call(*args, **kwargs)

            if subject.device.type == "cuda":
                calls = max(20, min(count, 200))
                return graph_milliseconds(run, calls) / calls / 1e3, ""
            return statistics.median(call_seconds(run, _BUDGET)), ""
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())}"


def _size(value: Any) -> int:
    return value.nbytes if isinstance(value, Tensor) else 0


def _value(subject: Subject, node: fx.Node) -> Any:
    if node.op == "get_attr" and not subject.tensors[str(node.target)].is_meta:
        return subject.tensors[str(node.target)]
    return _made_up(node.meta.get("val"), subject.device)


def _made_up(value: Any, device: torch.device) -> Any:
    """Values like ``value``: numbers about zero; indices that are zero; true."""
    if isinstance(value, (list, tuple)):
        return type(value)(_made_up(item, device) for item in value)
    if not isinstance(value, Tensor):
        return value
    if value.dtype.is_floating_point:
        return torch.randn(tuple(value.shape), device=device).to(value.dtype)
    if value.dtype in (torch.uint8, torch.int32, torch.int16):
        # Codes: what they are decides nothing but must not be all alike.
        return torch.randint(0, 120, tuple(value.shape), device=device).to(value.dtype)
    fill = torch.ones if value.dtype == torch.bool else torch.zeros
    return fill(tuple(value.shape), dtype=value.dtype, device=device)
