"""Typed views of nodes: the one place where ``node.args[i]`` is spelled out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from awqc.graph import Graph
from awqc.grouped import split_rows

aten = torch.ops.aten

#: Rows sorted by expert times the weights of the experts.
GROUPED_LINEAR = torch.ops.awqc.grouped_linear.default
#: What a ``get_attr`` node reads, as ``meta["role"]``; a parameter unless it says otherwise.
PARAMETER, BUFFER, CONSTANT = "parameter", "buffer", "constant"
#: Ops whose only operand, when it is two-dimensional, comes out transposed.
_TRANSPOSES = (aten.t.default, aten.numpy_T.default)
#: Ops that keep the values of every last-dimension vector and only regroup the leading dimensions.
REGROUPS = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
)


def operand(node: fx.Node, index: int, name: str | None = None, default: Any = None) -> Any:
    """Argument ``index`` of ``node``, also when passed by ``name``; ``default`` when left out."""
    if index < len(node.args):
        return node.args[index]
    return node.kwargs.get(name, default) if name else default


def call_on(node: fx.Node, first: Any) -> Any:
    """What the op of ``node`` makes of ``first`` in place of its first operand."""
    function: Any = node.target
    return function(first, *node.args[1:], **node.kwargs)


def scalar_operand(node: fx.Node, other: fx.Node) -> float | None:
    """The number in a binary op whose tensor operand is ``other``; None if there is none or ``alpha``
    scales it."""
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) < 2:
        return None
    left, right = node.args[0], node.args[1]
    number = right if left is other else left
    return float(number) if isinstance(number, (int, float)) else None


def shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of the tensor that ``node`` computes."""
    return tuple(node.meta["val"].shape)


def dtype(node: fx.Node) -> torch.dtype:
    """Dtype of the tensor that ``node`` computes."""
    result: torch.dtype = node.meta["val"].dtype
    return result


def is_parameter(node: fx.Node) -> bool:
    """Whether ``node`` reads a parameter, not a buffer or a constant written in the forward: those are
    computed anew when the model is built, so a change to them would be lost."""
    return node.op == "get_attr" and node.meta.get("role", PARAMETER) == PARAMETER


def weight_behind(node: fx.Node, ndim: int = 2) -> tuple[fx.Node, bool] | None:
    """The parameter of ``ndim`` axes behind ``node``, and whether ``node`` is its transpose, or None."""
    transposed = is_transpose(node)
    attr = node.args[0] if transposed else node
    if not isinstance(attr, fx.Node) or not is_parameter(attr) or len(shape(attr)) != ndim:
        return None
    return attr, transposed


def is_transpose(node: fx.Node) -> bool:
    """Whether ``node`` swaps the last two dimensions of its operand and leaves the others in place."""
    if node.op != "call_function" or not isinstance(node.meta["val"], Tensor):
        return False
    ndim = len(shape(node))
    if ndim < 2:
        return False
    if node.target is aten.permute.default:
        order = [dim % ndim for dim in operand(node, 1, "dims")]
        return order == [*range(ndim - 2), ndim - 1, ndim - 2]
    if node.target in (aten.transpose.int, aten.swapaxes.default):
        return {operand(node, 1) % ndim, operand(node, 2) % ndim} == {ndim - 2, ndim - 1}
    return node.target is aten.mT.default or (ndim == 2 and node.target in _TRANSPOSES)


def picked(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(what, by) if ``node`` is ``what[by]`` for integers ``by`` along the first dimension, or None."""
    if node.target is aten.embedding.default:
        return operand(node, 0), operand(node, 1)
    if node.target is not aten.index.Tensor:
        return None
    what, indices = operand(node, 0), operand(node, 1)
    if len(indices) != 1 or not isinstance(indices[0], fx.Node) or dtype(indices[0]) == torch.bool:
        return None
    return what, indices[0]


@dataclass(frozen=True)
class Linear:
    """``y = x @ W.T + b`` in the canonical form ``aten.linear(x, W, b)``.

    Args:
        node: the call.
        parameter: name of the weight.
        transposed: True if the parameter is stored ``(K, N)`` and permuted before the call.
    """

    node: fx.Node
    parameter: str
    transposed: bool

    @property
    def name(self) -> str:
        """The module name that the field uses: the parameter's name without ``.weight``."""
        return self.parameter.removesuffix(".weight")

    @property
    def x(self) -> fx.Node:
        """The input, ``(..., K)``."""
        x = self.node.args[0]
        assert isinstance(x, fx.Node)
        return x

    @property
    def bias(self) -> fx.Node | None:
        """The bias ``(N,)``, or None."""
        bias = operand(self.node, 2, "bias")
        return bias if isinstance(bias, fx.Node) else None

    @property
    def out_features(self) -> int:
        """``N``."""
        return shape(self.node)[-1]

    @property
    def in_features(self) -> int:
        """``K``."""
        return shape(self.x)[-1]

    @property
    def input(self) -> fx.Node:
        """The tensor whose rows are this linear's inputs, regroupings of rows looked through."""
        node = self.x
        while node.target in REGROUPS:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if not shape(source) or shape(source)[-1] != shape(node)[-1]:
                break
            node = source
        return node

    @property
    def other_readers(self) -> list[fx.Node]:
        """Nodes besides this linear that read its weight."""
        return _other_readers(self.node)

    def weight(self, stored: Tensor) -> Tensor:
        """The ``(N, K)`` weight for the parameter as it is stored."""
        return stored.t() if self.transposed else stored


def _other_readers(node: fx.Node) -> list[fx.Node]:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    nodes = [weight, *weight.all_input_nodes]  # the parameter, or its transpose and the parameter
    readers = [user for n in nodes for user in n.users if user not in (node, weight)]
    return [user for user in readers if not _runs(user, node)]


def _runs(reader: fx.Node, node: fx.Node) -> bool:
    """Whether ``reader`` runs the module whose linear ``node`` stands for, or gives what it reads."""
    inside = {node, *(n for x in node.all_input_nodes for n in (x, *x.all_input_nodes))}
    return getattr(reader.target, "runs_module", False) and (
        reader in inside or node in reader.all_input_nodes
    )


def linear(node: fx.Node) -> Linear | None:
    """``node`` as a :class:`Linear` over a parameter, or None."""
    if node.target is not aten.linear.default:
        return None
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    found = weight_behind(weight)
    if found is None:
        return None
    attr, transposed = found
    return Linear(node, str(attr.target), transposed)


def linears(graph: Graph) -> Iterator[Linear]:
    """All linears over a parameter, in execution order."""
    for node in graph.fx.nodes:
        if node.op == "call_function":
            view = linear(node)
            if view is not None:
                yield view


@dataclass(frozen=True)
class ExpertLinear:
    """The linears of all experts in one call, on a weight that stacks theirs.

    Either ``awqc.grouped_linear(x, W, offsets)`` on rows sorted by expert, ``x`` (S, K), or
    ``aten.bmm(x, permute(W))`` on a block of rows for each expert, ``x`` (E, T, K).

    Args:
        node: the call; (S, N) or (E, T, N).
        parameter: name of the weight.
        transposed: True if the parameter is stored ``(E, K, N)``, False for ``(E, N, K)``.
    """

    node: fx.Node
    parameter: str
    transposed: bool

    @property
    def name(self) -> str:
        """The parameter's name without ``.weight``."""
        return self.parameter.removesuffix(".weight")

    @property
    def x(self) -> fx.Node:
        """The input, ``(S, K)`` or ``(E, T, K)``."""
        x = self.node.args[0]
        assert isinstance(x, fx.Node)
        return x

    @property
    def offsets(self) -> fx.Node | None:
        """``(E,)``, the first row after those of each expert; None if ``x`` has a block for each."""
        offsets = operand(self.node, 2) if self.node.target is GROUPED_LINEAR else None
        return offsets if isinstance(offsets, fx.Node) else None

    @property
    def count(self) -> int:
        """``E``, the number of experts."""
        weight = self.node.args[1]
        assert isinstance(weight, fx.Node)
        return shape(weight)[0]

    @property
    def out_features(self) -> int:
        """``N``."""
        return shape(self.node)[-1]

    @property
    def in_features(self) -> int:
        """``K``."""
        return shape(self.x)[-1]

    @property
    def other_readers(self) -> list[fx.Node]:
        """Nodes besides this one that read its weight."""
        return _other_readers(self.node)

    def weight(self, stored: Tensor) -> Tensor:
        """The ``(E, N, K)`` weight for the parameter as it is stored."""
        return stored.mT if self.transposed else stored

    def rows(self, x: Tensor, offsets: Tensor | None) -> list[Tensor]:
        """The inputs of each expert, E views ``(n_e, K)``, given the values of :attr:`x` and
        :attr:`offsets`."""
        return list(x) if offsets is None else split_rows(x, offsets)


def expert_linear(node: fx.Node) -> ExpertLinear | None:
    """``node`` as an :class:`ExpertLinear` over a parameter, or None."""
    if node.target not in (GROUPED_LINEAR, aten.bmm.default):
        return None
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    found = weight_behind(weight, 3)
    if found is None:
        return None
    attr, permuted = found
    return ExpertLinear(node, str(attr.target), permuted == (node.target is GROUPED_LINEAR))


def expert_linears(graph: Graph) -> Iterator[ExpertLinear]:
    """All linears of experts over a parameter, in execution order."""
    for node in graph.fx.nodes:
        if node.op == "call_function":
            view = expert_linear(node)
            if view is not None:
                yield view


@dataclass(frozen=True)
class QLinear:
    """``y = awqc.qlinear(x, codes, scales, zeros, b, group_size)``, codes a tensor of the graph.

    Args:
        node: the call.
    """

    node: fx.Node

    @property
    def name(self) -> str:
        """The module name of the linear."""
        return str(operand(self.node, 1).target).removesuffix(".codes")

    @property
    def x(self) -> fx.Node:
        """The input, ``(..., K)``."""
        x = self.node.args[0]
        assert isinstance(x, fx.Node)
        return x

    @property
    def bias(self) -> fx.Node | None:
        """The bias ``(N,)``, or None."""
        bias = operand(self.node, 4)
        return bias if isinstance(bias, fx.Node) else None

    @property
    def inputs(self) -> tuple[fx.Node | None, ...]:
        """Operands that stay when the weight is packed."""
        return (self.x,)

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """``(N, K)``."""
        return tuple(operand(self.node, 1).meta["val"].shape)


@dataclass(frozen=True)
class QExperts:
    """``y = awqc.qexperts(x, offsets, codes, scales, zeros, group_size)``, codes a tensor of the graph.

    Args:
        node: the call.
    """

    node: fx.Node

    @property
    def name(self) -> str:
        """The name of the parameter that held the weights."""
        return str(operand(self.node, 2).target).removesuffix(".codes")

    @property
    def bias(self) -> None:
        """A bias of experts is added apart."""
        return None

    @property
    def inputs(self) -> tuple[fx.Node | None, ...]:
        """Operands that stay when the weight is packed."""
        return operand(self.node, 0), operand(self.node, 1)

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """``(E, N, K)``."""
        return tuple(operand(self.node, 2).meta["val"].shape)
