"""What a scale rule sees of one call of an op, and what it may do about it."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from awqc.scaleflow.routing import Families, Routing
from awqc.scaleflow.scaled import Scaled, Value
from awqc.views import CONSTANT, operand, shape

if TYPE_CHECKING:
    from awqc.scaleflow.flow import Flow


def op_name(node: fx.Node) -> str:
    """``aten.silu`` and the like."""
    target = node.target
    packet = getattr(target, "overloadpacket", None)
    return str(packet) if packet is not None else getattr(target, "__name__", str(target))


@dataclass(frozen=True)
class Refusal:
    """Why a channel cannot be scaled: the op that stops it and what it does."""

    reason: str
    node: str
    op: str

    def __str__(self) -> str:
        return f"{self.op} ({self.node}): {self.reason}"


class Op:
    """What a rule sees of one node: its operands' abstract values, and the verbs of the flow."""

    #: Whether values are row numbers; see :class:`RowOp`.
    on_rows = False

    def __init__(
        self, node: fx.Node, flow: Flow, routings: Mapping[fx.Node, Routing] = types.MappingProxyType({})
    ) -> None:
        self.node = node
        self._flow = flow
        self._routings = routings
        #: Operands that the rule has asked about.
        self.asked: set[fx.Node] = set()

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of the node."""
        return self.node.args

    def arg(self, index: int, name: str | None = None, default: Any = None) -> Any:
        """Argument ``index``, also when passed by ``name``; ``default`` when left out."""
        return operand(self.node, index, name, default)

    def value(self, operand: Any) -> Scaled | None:
        """Abstract value of an operand node; None when it is not scaled (or not a tensor)."""
        found = self.values(operand)
        return found if isinstance(found, Scaled) else None

    def values(self, operand: Any) -> Value:
        """Like :meth:`value` for operands that are lists of tensors."""
        if not isinstance(operand, fx.Node):
            return None
        self.asked.add(operand)
        return self._flow.values.get(operand)

    def ignore(self, operand: Any) -> None:
        """Say that no scale of ``operand`` changes the result. An operand that a rule neither asks about
        nor ignores is refused."""
        self.values(operand)

    def constant(self, operand: Any) -> Tensor | None:
        """The value of an operand that is written in the forward, such as a list of indices; else None."""
        if isinstance(operand, fx.Node) and operand.op == "get_attr" and operand.meta.get("role") == CONSTANT:
            return self._flow.graph.weights[str(operand.target)]
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the node's result."""
        return shape(self.node)

    def poison(self, value: Scaled | None, reason: str, where: Tensor | None = None) -> None:
        """Refuse to scale the channels of ``value`` (only those at the mask ``where``)."""
        if value is not None:
            ids = value.used() if where is None else torch.unique(value.ids[where])
            self._flow.poison(ids[ids >= 0], Refusal(reason, self.node.name, op_name(self.node)))

    def join(self, operand: Any, ids: Tensor, degree: float, computed: bool = False) -> bool:
        """Scale the parameter behind ``operand`` along: ``ids`` has the operand's shape. False if the
        operand is not a parameter (or a movement of one).

        Args:
            computed: also what linears over parameters compute, see :mod:`awqc.scaleflow.producers`.
        """
        if not isinstance(operand, fx.Node):
            return False
        self.asked.add(operand)
        wanted = Scaled(ids, degree, self._routings.get(operand))
        return self._flow.join(operand, wanted, computed)

    def meet(self, operand: fx.Node, ids: Tensor) -> None:
        """Say that elements of ``operand`` meet elements of a value with ``ids``, of the operand's shape."""

    @property
    def families(self) -> Families:
        """What ids of families stand for, for rules of linears of experts."""
        return self._flow.families


class RowOp(Op):
    """The same op on the row numbers of its routed operands instead of their ids.

    A rule that is right about ids is right about row numbers: the row that it says an element of the result
    comes from is the row whose expert still divides it. What it would refuse, nobody knows the row of.
    """

    on_rows = True

    def __init__(self, node: fx.Node, flow: Flow) -> None:
        super().__init__(node, flow)
        self.reason: str | None = None
        #: operands that are to be divided along -> their row numbers
        self.joined: dict[fx.Node, Tensor] = {}

    def value(self, operand: Any) -> Scaled | None:
        """Row numbers of a routed operand; None for any other."""
        found = super().value(operand)
        return None if found is None or found.routing is None else Scaled(found.routing.rows)

    def poison(self, value: Scaled | None, reason: str, where: Tensor | None = None) -> None:
        """Note that rows are mixed."""
        if value is not None and (where is None or bool(where.any())):
            self.reason = reason

    def meet(self, operand: fx.Node, ids: Tensor) -> None:
        """Note the row numbers of what each element meets."""
        self.joined[operand] = ids

    def join(self, operand: Any, ids: Tensor, degree: float, computed: bool = False) -> bool:
        """Note the row numbers of what is to be divided along."""
        if isinstance(operand, fx.Node):
            self.joined[operand] = ids
        return True


Rule = Callable[[Op], Value]
