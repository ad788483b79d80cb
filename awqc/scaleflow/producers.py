"""Which parameters would have to be divided for a tensor to be divided by given channels.

Behind a term of a sum stands a parameter (a bias), a movement of one, or another linear whose rows can be
divided along: then both terms are, and what reads the sum undoes the scale of both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from awqc.scaleflow.routing import Families
from awqc.scaleflow.scaled import Scaled, compact, unexpanded
from awqc.scaleflow.sites import Site, Sites
from awqc.views import is_transpose, operand, picked, shape

aten = torch.ops.aten

#: Index tensors larger than this are not built to invert a movement of a parameter.
_LARGEST_INVERSE = 1 << 22

Plan = list[tuple[Site, Scaled]]


def producers(
    node: fx.Node, wanted: Scaled, sites: Sites, families: Families, computed: bool = False
) -> Plan | None:
    """How each parameter behind ``node`` must be scaled for it to become ``wanted``; None if it cannot.

    The flow will follow the parameters from there, and judges what ``node`` really becomes.

    Args:
        node: a parameter, a movement of one, or what is picked from one by the routing of ``wanted``.
        wanted: of the shape of ``node``.
        sites, families: those of the flow.
        computed: ``node`` may also be a linear over a parameter, or a sum of such.
    """
    if picked(node) is not None:
        table = _picked(node, wanted, families)
        return None if table is None else producers(*table, sites, families)
    if is_transpose(node):
        return producers(operand(node, 0), wanted.transposed(), sites, families)
    if families.hold(unexpanded(wanted.ids)):
        return None
    moved = _moved_site(node, wanted, sites)
    if moved is not None:
        return moved
    # A tensor that others read too would change for them.
    if not computed or len(node.users) != 1 or node.target not in (aten.linear.default, aten.add.Tensor):
        return None
    if node.target is aten.linear.default:
        if not all(wanted.constant_along(dim) for dim in range(wanted.ids.ndim - 1)):
            return None
        weight = operand(node, 1)
        rows = wanted.ids[(0,) * (wanted.ids.ndim - 1)][:, None].expand(shape(weight))
        return producers(weight, Scaled(rows, wanted.degree), sites, families)
    terms = [operand(node, 0), operand(node, 1)]
    if not all(isinstance(term, fx.Node) and shape(term) == shape(node) for term in terms):
        return None
    plans = [producers(term, wanted, sites, families, computed) for term in terms]
    return None if None in plans else [step for plan in plans for step in plan or ()]


def _picked(node: fx.Node, wanted: Scaled, families: Families) -> tuple[fx.Node, Scaled] | None:
    """The table that ``node`` picks entries of, and how that is scaled: all entries alike, or, where
    ``wanted`` holds families, each expert's entry by its own channels."""
    found = picked(node)
    assert found is not None
    table, by = found
    rows = range(len(shape(by)))
    if not all(wanted.constant_along(dim) for dim in rows):
        return None
    ids, size = wanted.ids[(0,) * len(rows)], shape(table)
    if not families.hold(unexpanded(ids)):
        return table, Scaled(ids.expand(size), wanted.degree)
    routing = wanted.routing
    if routing is None or by is not routing.key or routing.offsets or not routing.in_place():
        return None
    return table, Scaled(families.table(ids, size[0]), wanted.degree)


def _moved_site(node: fx.Node, wanted: Scaled, sites: Sites) -> Plan | None:
    """The site that ``node`` is a movement of."""
    chain = [node]
    while sites.of(chain[-1]) is None:
        source = operand(chain[-1], 0) if chain[-1].op == "call_function" else None
        if not isinstance(source, fx.Node):
            return None
        chain.append(source)
    site = sites.of(chain.pop())
    assert site is not None
    placed = _invert(site, chain, wanted)
    return None if placed is None else [(site, placed)]


def _invert(site: Site, chain: list[fx.Node], wanted: Scaled) -> Scaled | None:
    """Ids of the site such that the movements of ``chain`` (outermost first) turn them into ``wanted``; None
    if they do more than move, or one element of the site would need two scales."""
    from awqc.rules.movement import replay

    if not chain:
        return Scaled(compact(wanted.ids), wanted.degree)
    count = math.prod(shape(site.node))
    if count > _LARGEST_INVERSE or wanted.ids.numel() > _LARGEST_INVERSE:
        return None
    index: Tensor | None = torch.arange(count).reshape(shape(site.node))
    for node in reversed(chain):
        index = replay(node, index)
        if index is None:
            return None
    assert index is not None
    ids = torch.full((count,), -1, dtype=wanted.ids.dtype)
    ids[index.flatten()] = wanted.ids.flatten()
    if not torch.equal(ids[index], wanted.ids):
        return None
    return Scaled(compact(ids.reshape(shape(site.node))), wanted.degree)
