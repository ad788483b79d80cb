"""Sites: parameters, and invertible expressions of one parameter, that a scale can be folded into.

A fold divides a *site*. For most the site is the parameter itself. Where a forward multiplies by
``1 + w``, the site is ``e = 1 + w``: dividing ``e`` by ``s`` means storing ``w' = (1 + w) / s - 1``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from awqc.errors import VerifyError
from awqc.graph import Graph
from awqc.quantized import QuantizedWeight
from awqc.views import is_parameter, scalar_operand
from awqc.weights import Rounded, Weights


@dataclass(frozen=True)
class Site:
    """``offset + factor * parameter``, computed by ``node``.

    Args:
        parameter: the parameter's name.
        node: the graph node that computes the expression (the ``get_attr`` itself when trivial).
        factor, offset: the affine expression.
    """

    parameter: str
    node: fx.Node
    factor: float = 1.0
    offset: float = 0.0

    def solve(self, value: Tensor, divisor: Tensor) -> Tensor:
        """The parameter for which this expression is ``(offset + factor * value) / divisor``; ``value`` may
        be overwritten."""
        if self.offset == 0.0:
            return value.div_(divisor)
        expression = self.offset + self.factor * value.double()
        return ((expression / divisor.double() - self.offset) / self.factor).to(value.dtype)


class Sites:
    """All sites of a graph.

    Args:
        expressions: the non-trivial ones; every other parameter is a site of its own.
    """

    def __init__(self, expressions: Iterable[Site] = ()) -> None:
        self.expressions = {site.node: site for site in expressions}
        self._inside = {site.parameter for site in self.expressions.values()}

    def of(self, node: fx.Node) -> Site | None:
        """The site that ``node`` computes, if it is one."""
        if node in self.expressions:
            return self.expressions[node]
        if is_parameter(node) and node.target not in self._inside:
            return Site(str(node.target), node)
        return None


@dataclass(frozen=True)
class Part:
    """How a scale vector acts on one parameter: ``site / s[ids] ** degree``.

    Args:
        site: what is divided.
        ids: integer tensor that broadcasts to the parameter's shape; -1 where nothing divides.
        degree: 1 where an activation scales along, -1 where a consumer undoes it, 2 through a square, ...
    """

    site: Site
    ids: Tensor
    degree: float

    @property
    def parameter(self) -> str:
        """Name of the parameter that changes."""
        return self.site.parameter


def divisor(part: Part, scales: Tensor) -> Tensor:
    """``s[ids] ** degree`` with 1 where nothing divides; broadcasts to the parameter's shape."""
    padded = torch.cat([scales, scales.new_ones(1)])  # id -1 picks the last element
    ids = part.ids.to(scales.device)
    return padded[ids] ** part.degree


def fold(part: Part, scales: Tensor, weights: Weights) -> None:
    """Divide ``part``'s parameter by ``scales`` ``(channels,)`` in ``weights``.

    A weight that is already quantized takes the scale in its group scales, which is exact up to their
    rounding to half precision; its codes do not change.

    Raises:
        VerifyError: if a quantized weight would need a scale that differs along its columns.
    """
    name = part.parameter
    by = divisor(part, scales)
    rounded = weights.rounded(name)
    if rounded is None:
        weights.change(name, lambda value: part.site.solve(value, by.to(value.device, value.dtype)))
        return
    by = by.mT if rounded.transposed else by
    if part.site.offset or by.shape[-1] != 1:
        raise VerifyError(
            f"{name!r} is quantized already and cannot take a scale along its columns: fold before rounding"
        )
    old = rounded.weight
    scales = old.scales.float() / by.to(old.scales.device)
    weights[name] = Rounded(
        QuantizedWeight(old.codes, scales.to(old.scales.dtype), old.zeros, old.scheme), rounded.transposed
    )


def find_sites(graph: Graph) -> Sites:
    """Affine expressions with an offset of a parameter that nothing else reads."""
    found = []
    for attr in filter(is_parameter, graph.parameters().values()):
        node, factor, offset = attr, 1.0, 0.0
        while len(node.users) == 1:
            step = _affine_step(next(iter(node.users)), node)
            if step is None:
                break
            times, plus = step
            node, factor, offset = next(iter(node.users)), factor * times, offset * times + plus
        if offset != 0.0 and factor != 0.0 and math.isfinite(factor):
            found.append(Site(str(attr.target), node, factor, offset))
    return Sites(found)


def _affine_step(node: fx.Node, operand: fx.Node) -> tuple[float, float] | None:
    """(times, plus) if ``node`` computes ``times * operand + plus`` with numbers; None otherwise."""
    aten = torch.ops.aten
    target = node.target
    if target in (aten.to.dtype, aten._to_copy.default, aten.to.device, aten.to.dtype_layout):
        return 1.0, 0.0
    number = scalar_operand(node, operand)
    if number is None:
        return None
    if target in (aten.add.Tensor, aten.add.Scalar):
        return 1.0, number
    if target in (aten.sub.Tensor, aten.sub.Scalar):
        return 1.0, -number
    if target in (aten.rsub.Scalar,):
        return -1.0, number
    if target in (aten.mul.Tensor, aten.mul.Scalar):
        return number, 0.0
    return None
