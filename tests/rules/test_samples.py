"""Every rule's samples: what the rule claims must be what the op computes.

A sample is traced into a graph of that one op. The flow is seeded with the sample's ids, the operands are
divided by random positive scales as the flow says, the op is run in float64 and its result compared with
the result on the undivided operands divided by what the flow claims.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from awqc import rules
from awqc.graph import Graph
from awqc.rules import Sample
from awqc.scaleflow.flow import Flow
from awqc.scaleflow.op import Op
from awqc.scaleflow.scaled import Scaled, Value
from awqc.scaleflow.sites import find_sites
from awqc.views import CONSTANT
from awqc.weights import Weights

aten = torch.ops.aten
CASES = [(op, i, sample) for op, found in rules.samples().items() for i, sample in enumerate(found)]


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


class Call:
    """One call of an op as a graph: ``nodes[i]`` stands for ``tensors[i]``, ``node`` for the call."""

    def __init__(self, op: Any, sample: Sample) -> None:
        nodes = fx.Graph()
        self.nodes: list[fx.Node] = []
        self.tensors: list[Tensor] = []

        def operand(tensor: Tensor) -> fx.Node:
            position = len(self.tensors)
            self.tensors.append(tensor)
            known = position in sample.parameters + sample.constants
            node = nodes.get_attr(f"t{position}") if known else nodes.placeholder(f"t{position}")
            node.meta["val"] = tensor
            if position in sample.constants:
                node.meta["role"] = CONSTANT
            self.nodes.append(node)
            return node

        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, operand, (sample.args, sample.kwargs))
        self.node = nodes.call_function(op, args, kwargs)
        self.node.meta["val"] = op(*sample.args, **sample.kwargs)
        values = {f"t{i}": tensor for i, tensor in enumerate(self.tensors)}
        self.graph = Graph(nodes, Weights(values, values.__getitem__, None))

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        by_node = dict(zip(self.nodes, tensors, strict=True))
        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), by_node.__getitem__)
        result = self.node.target(*args, **kwargs)
        return [result] if isinstance(result, Tensor) else list(result)

    def flow(self, sample: Sample) -> Flow:
        seeds = {self.nodes[i]: ids.expand(self.tensors[i].shape) for i, ids in sample.scale.items()}
        return Flow(self.graph, find_sites(self.graph), self.graph.order()).run(seeds)


def divide(tensor: Tensor, value: Value, flow: Flow, scales: Tensor, known: dict[fx.Node, Tensor]) -> Tensor:
    """``tensor`` divided by what the flow says; refused channels have scale 1. ``known`` are values of the
    graph's nodes."""
    if value is None:
        return tensor
    assert isinstance(value, Scaled)
    assert value.ids.shape == tensor.shape
    ids = value.ids.long()
    if value.routing is not None:
        assert value.routing.rows.shape == tensor.shape
        ids = flow.families.channel(ids, value.routing.served_by(known[value.routing.key]))
    padded = torch.cat([torch.where(flow.alive, scales, 1.0), scales.new_ones(1)])
    return tensor / padded[ids] ** value.degree


def check(op: Any, sample: Sample) -> None:
    """Raise AssertionError if the rule of ``op`` is wrong about ``sample``."""
    call = Call(op, sample)
    flow = call.flow(sample)
    expected = flow.channels if sample.alive is None else sample.alive
    assert int(flow.alive.sum()) == expected, [str(refusal) for refusal in flow.refusals]
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp2(torch.rand(flow.channels, generator=generator, dtype=torch.float64) * 4 - 2)
    before, known = call(call.tensors), dict(zip(call.nodes, call.tensors, strict=True))
    divided = [
        divide(tensor, flow.values.get(node), flow, scales, known)
        for node, tensor in zip(call.nodes, call.tensors, strict=True)
    ]
    after = call(divided)
    claimed = flow.values.get(call.node)
    claims = claimed if isinstance(claimed, list) else [claimed] * len(before)
    for old, new, claim in zip(before, after, claims, strict=True):
        torch.testing.assert_close(new, divide(old, claim, flow, scales, known), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("op", "index", "sample"), CASES, ids=[f"{op}-{i}" for op, i, _ in CASES])
def test_rule_is_right_about_its_sample(op: Any, index: int, sample: Sample) -> None:
    check(op, sample)


def test_every_rule_has_a_sample_in_which_it_is_called() -> None:
    called = set()
    for op, sample in ((op, sample) for op, _, sample in CASES):
        if Call(op, sample).flow(sample).values:
            called.add(op)
    assert called == set(rules._RULES)


def test_a_rule_without_a_sample_cannot_be_registered() -> None:
    with pytest.raises(ValueError, match="a rule needs at least one sample that proves it"):
        rules.rule(aten.silu.default, samples=[])


def test_an_op_has_one_rule() -> None:
    with pytest.raises(
        ValueError, match=r"aten.relu.default has a rule already: awqc.rules.elementwise.homog"
    ):
        rules.rule(aten.relu.default, samples=[Sample((torch.ones(2),), scale={})])(lambda op: None)


@pytest.mark.parametrize(
    ("op", "sample"),
    [
        (aten.silu.default, Sample((torch.randn(3, 4).double(),), scale={0: torch.arange(4)})),
        (aten.pow.Tensor_Scalar, Sample((torch.randn(3, 4).double(), 2), scale={0: torch.arange(4)})),
    ],
)
def test_the_check_finds_a_wrong_rule(monkeypatch: pytest.MonkeyPatch, op: Any, sample: Sample) -> None:
    def passes_unchanged(seen: Op) -> Value:
        return seen.value(seen.args[0])

    monkeypatch.setitem(rules._RULES, op, passes_unchanged)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check(op, sample)


def test_the_check_counts_refused_channels() -> None:
    sample = Sample((torch.randn(3, 4).double(),), scale={0: torch.arange(4)})
    with pytest.raises(
        AssertionError, match=r"aten.silu \(silu_default\): no scale passes through aten.silu"
    ):
        check(aten.silu.default, sample)
