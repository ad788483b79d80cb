"""The abstract values of the flow, and how one flow settles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import awqc
from awqc import rules
from awqc.rules.movement import reshaped
from awqc.scaleflow.flow import Flow, seeds
from awqc.scaleflow.scaled import Scaled, compact
from awqc.scaleflow.sites import find_sites
from tests.nets import WIDTH, Net, analyze, inputs, linear, members, norm, refusals

# -- abstract values -------------------------------------------------------------------------------------


def ids(*size: int) -> Tensor:
    return torch.arange(torch.Size(size).numel(), dtype=torch.int32).reshape(size)


def test_compact_keeps_the_ids_and_drops_the_memory() -> None:
    spread = ids(1, 4, 1).expand(3, 4, 5).contiguous()
    small = compact(spread)
    assert torch.equal(small, spread)
    assert Scaled(small).core().shape == (1, 4, 1)


def test_used_ids_are_those_that_scale_something() -> None:
    assert Scaled(torch.tensor([[-1, 3], [3, 1]])).used().tolist() == [1, 3]


def test_equal_values_are_equal_whatever_their_memory() -> None:
    spread = ids(4).expand(3, 4)
    assert Scaled(spread).same(Scaled(spread.contiguous()))
    assert not Scaled(spread).same(Scaled(spread, 2.0))
    assert not Scaled(spread).same(Scaled(spread.flip(-1)))
    assert not Scaled(spread).same(None)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (ids(1, 1, 8).expand(2, 3, 8), (6, 2, 4)),
        (ids(1, 1, 8).expand(2, 3, 8), (2, 24)),
        (ids(2, 1, 1, 4).expand(2, 3, 5, 4), (6, 5, 2, 2)),
        (ids(1, 2, 1, 1, 4).expand(7, 2, 3, 5, 4), (7, 6, 5, 4)),
        (ids(1, 3, 1).expand(1, 3, 4), (3, 1, 4, 1)),
        (ids(1).expand(6), (2, 3)),
    ],
)
def test_reshaped_ids_are_the_reshape_of_the_ids(value: Tensor, size: tuple[int, ...]) -> None:
    assert torch.equal(reshaped(value, size), value.reshape(size))


def test_reshape_does_not_spread_tokens_to_merge_heads() -> None:
    repeated = ids(1, 2, 1, 1, 4).expand(1, 2, 3, 1000, 4)
    assert Scaled(reshaped(repeated, (1, 6, 1000, 4))).core().numel() == 6 * 4


def test_a_site_is_seeded_along_each_axis_that_has_a_length() -> None:
    net = Net(lambda m, x: x * m.gain, gain=nn.Parameter(torch.ones(3, 1, WIDTH)))
    analysis = awqc.analyze(net, {"x": torch.randn(2, 3, 4, WIDTH)})
    sites = find_sites(analysis.graph)
    site = sites.of(analysis.graph.parameters()["gain"])
    assert site is not None
    found = list(seeds(site))
    assert [seed.shape for seed in found] == [(3, 1, WIDTH)] * 3
    assert torch.equal(found[0], ids(3, 1, 1).expand(3, 1, WIDTH))
    assert torch.equal(found[1], ids(1, 1, WIDTH).expand(3, 1, WIDTH))
    assert torch.equal(found[2], ids(3, 1, WIDTH))


# -- one flow --------------------------------------------------------------------------------------------


def follow(net: nn.Module, parameter: str, axis: int = 0) -> tuple[Flow, dict[str, torch.fx.Node]]:
    """The flow of ``parameter`` scaled along ``axis``, and the nodes of the graph by name."""
    graph = awqc.analyze(net, inputs()).graph
    node = graph.parameters()[parameter]
    sites = find_sites(graph)
    site = sites.of(node)
    assert site is not None
    flow = Flow(graph, sites, graph.order()).run({node: list(seeds(site))[axis]})
    return flow, {n.name: n for n in graph.nodes}


def test_values_say_what_divides_every_tensor_on_the_way() -> None:
    net = Net(lambda m, x: m.b(m.a(x).relu().square().view(2, 3, 2, 4).flatten(2)), a=linear(), b=linear())
    flow, nodes = follow(net, "a.weight")
    degrees = {n.name: v.degree for n, v in flow.values.items() if isinstance(v, Scaled)}
    assert degrees == {
        "a_weight": 1.0,
        "linear": 1.0,
        "relu": 1.0,
        "square": 2.0,
        "view": 2.0,
        "flatten": 2.0,
        "b_weight": -2.0,
    }
    view = flow.values[nodes["view"]]
    assert isinstance(view, Scaled)
    assert torch.equal(view.core()[0, 0], ids(2, 4))


def test_a_refusal_is_known_for_each_channel() -> None:
    def compute(m: Net, x: Tensor) -> Tensor:
        a, b, c = m.n(x).split([2, 2, 4], dim=-1)
        return m.a(torch.cat([F.silu(a), b.cos(), c], dim=-1))

    flow, nodes = follow(Net(compute, n=norm(), a=linear()), "n.weight")
    assert flow.alive.tolist() == [False] * 4 + [True] * 4
    assert [r.op for r in flow.refusals] == ["aten.silu", "aten.cos"]
    assert str(flow.refusal(nodes["layer_norm"])) == "aten.silu (silu): no scale passes through aten.silu"
    assert flow.refusal(nodes["a_weight"]) is None
    assert flow.refusal(nodes["x"]) is None


def test_the_columns_of_a_weight_are_no_handle() -> None:
    flow, _ = follow(Net(lambda m, x: m.b(m.a(x)), a=linear(), b=linear()), "a.weight", axis=1)
    assert not flow.alive.any()
    assert [str(r) for r in flow.refusals] == [
        "aten.linear (linear): the channels that are summed carry different scales"
    ]


def test_a_later_reader_of_a_joined_parameter_is_judged_too() -> None:
    """The bias joins at the first sum; the second reads it unscaled, and stops everything."""
    net = Net(
        lambda m, x: m.a((m.n(x) + m.c) * (x + m.c)), n=norm(), c=nn.Parameter(torch.ones(WIDTH)), a=linear()
    )
    flow, _ = follow(net, "n.weight")
    assert not flow.alive.any()
    assert [str(r) for r in flow.refusals] == ["aten.add (add_1): is added to x, which is not scaled along"]


def test_an_operand_that_a_rule_does_not_ask_about_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a rule that forgets one refuses too much, and never too little."""
    net = Net(
        lambda m, x: m.second(torch.mul(x, m.gain)), gain=nn.Parameter(torch.ones(WIDTH)), second=linear()
    )
    assert members(analyze(net)) == {"gain": ("second.weight",)}
    monkeypatch.setitem(rules._RULES, torch.ops.aten.mul.Tensor, lambda op: op.value(op.args[0]))
    assert refusals(analyze(net)) == {
        "second.weight": "aten.mul (mul): what a scale of gain does to the result is not followed"
    }
