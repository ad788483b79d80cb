"""Modules that hold a weight and do more than a linear with it: no quantized linear can take their place.

A graph shows that a product reads ``a.weight``. What takes the place of ``a`` has to do all that ``a`` does,
and a class derived from ``nn.Linear``, or one of its own with a ``weight``, may well do more.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from awqc.capture.tracing import quiet
from awqc.errors import CaptureError
from awqc.storage.source import swapped_tensors
from awqc.views import operand

aten = torch.ops.aten
_PRODUCTS = (aten.addmm.default, aten.mm.default, aten.linear.default, aten.matmul.default)
_SUMS = (aten.add.Tensor, aten.add_.Tensor)
_MOVES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten._to_copy.default,
)


class MoreThanLinear(dict[str, str]):
    """Names of the weights of such modules -> the class of the module."""


def more_than_linear(model: nn.Module) -> MoreThanLinear:
    """All such modules of ``model``; its weights are not read."""
    known: dict[Any, bool] = {}
    found = MoreThanLinear()
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 2 or type(module).forward is nn.Linear.forward:
            continue
        key = _kind(module)
        if key not in known:
            known[key] = _is_linear(module)
        if not known[key]:
            found[f"{name}.weight"] = type(module).__name__
    return found


def _kind(module: nn.Module) -> Any:
    """What decides how a module computes: its class, and what is assigned to it."""
    plain = (int, float, str, type(None))
    attributes = {n: v if isinstance(v, plain) else id(v) for n, v in vars(module).items()}
    held = {n: attributes.pop(n) for n in list(attributes) if isinstance(vars(module)[n], dict)}
    tensors = {n: None if t is None else tuple(t.shape) for n, t in module._parameters.items()}
    return type(module), len(held), tuple(attributes.items()), tuple(tensors.items())


def _is_linear(module: nn.Module) -> bool:
    """Whether ``module(x)`` is one product of ``x`` with its weight, plus its bias if it has one."""
    weight = module._parameters["weight"]
    assert weight is not None
    if next(module.children(), None) is not None or not _takes_one(module):
        return False
    for width in dict.fromkeys((weight.shape[1], weight.shape[0])):
        with contextlib.suppress(CaptureError):
            return _one_product(_traced(module, width))
    return False


def _traced(module: nn.Module, width: int) -> fx.GraphModule:
    """The ops of ``module(x)`` for ``x`` of ``width`` channels, on fake weights.

    Raises:
        CaptureError: if it does not take such an input.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            new = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
            return nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new

    with swapped_tensors(module, fake), torch.no_grad(), quiet(), mode:
        try:
            traced: fx.GraphModule = make_fx(lambda x: module.forward(x))(torch.empty(2, 3, width))
        except Exception as error:
            raise CaptureError(f"{type(module).__name__} takes no {width} channels") from error
    return traced


def _takes_one(module: nn.Module) -> bool:
    parameters = list(inspect.signature(module.forward).parameters.values())
    return bool(parameters) and all(p.default is not p.empty or p.kind > 1 for p in parameters[1:])


def _one_product(traced: fx.GraphModule) -> bool:
    """Whether a trace holds one product and else only movements, casts and the sum with a parameter."""
    nodes = [n for n in traced.graph.nodes if n.op == "call_function"]
    products = [n for n in nodes if n.target in _PRODUCTS]
    sums = [n for n in nodes if n.target in _SUMS]
    others = [n for n in nodes if n.target not in (*_PRODUCTS, *_SUMS, *_MOVES)]
    (results,) = [n for n in traced.graph.nodes if n.op == "output"]
    if len(products) != 1 or len(sums) > 1 or others or not isinstance(operand(results, 0), fx.Node):
        return False
    return all(any(n.op == "get_attr" for n in total.all_input_nodes) for total in sums)
