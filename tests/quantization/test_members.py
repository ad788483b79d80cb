"""Parts of groups that are searched apart: experts together in front of their first linears, apart behind."""

from __future__ import annotations

from typing import Any

import torch

from awqc.context import Context
from awqc.graph import Graph
from awqc.observers.stages import Observers
from awqc.quantization.matrices import BATCHED
from awqc.quantization.members import Member, Parts, Run, _labels, parts
from awqc.quantized import Scheme
from awqc.scaleflow.groups import ScaleGroups
from awqc.views import ExpertLinear
from tests.mixtures import EXPERTS, Mixture
from tests.passes.graphs import ANALYSIS, Look, run, samples


def found() -> list[list[Parts]]:
    """The parts of the groups of a mixture: of its norm, and between the linears of its experts."""
    made: list[list[Parts]] = []

    def see(graph: Graph, context: Context) -> None:
        assert context.stage is not None
        for group in context.stage.groups:
            observers = [o for o in graph.facts[Observers] if o.group is group]
            made.append(parts(graph, observers, group))

    graph, _ = run(Mixture(), samples(2, width=32), *ANALYSIS, Look(see), group_size=32)
    assert len(list(graph.facts[ScaleGroups])) == len(made)
    return made


def test_experts_that_read_the_same_channels_are_one_part() -> None:
    pairs = ((p, m) for group in found() for p in group for m in p.members)
    together, member = next((p, m) for p, m in pairs if len(m.matrices[0]) > 1)
    assert member.matrices == [list(range(EXPERTS))]
    assert together.channels.shape == (1, 32)
    assert member.ids.shape == (1, 1, 32), "ids that are alike are held once"


def test_experts_with_channels_of_their_own_are_parts_that_are_alike() -> None:
    apart = next(p for group in found() for p in group if len(p.channels) > 1)
    (member,) = apart.members
    assert member.matrices == [[e] for e in range(EXPERTS)]
    assert sorted(apart.channels.flatten().tolist()) == sorted(set(apart.channels.flatten().tolist()))
    scales = torch.rand(EXPERTS, 3, apart.channels.shape[1]) + 0.5
    columns = torch.cat([member.columns(scales, each) for each in member.runs()])
    for expert in range(EXPERTS):
        assert torch.equal(columns[expert], scales[expert][:, member.ids[expert, 0]] ** member.degree)


class Stack(ExpertLinear):
    """Eight experts of a graph that there is not."""

    count, in_features, out_features = 8, 0, 0  # type: ignore[assignment]

    def __init__(self, node: Any, width: int, rows: int) -> None:
        super().__init__(node, "stack", transposed=False)
        self.__dict__.update(in_features=width, out_features=rows)


def member(matrices: list[list[int]], ids: Any, width: int = 4, rows: int = 4) -> Member:
    node: Any = None
    return Member(Stack(node, width, rows), node, Scheme(4, 4), matrices, torch.tensor(ids), 1.0)


def test_matrices_are_handled_in_runs_of_neighbours() -> None:
    scattered = member([[0, 1], [2, 5]], [[[0, 1, 2, -1]]] * 2)
    assert scattered.runs() == [Run(range(3), range(3)), Run(range(3, 4), range(5, 6))]
    size = BATCHED // 3
    large = member([[e] for e in range(4)], [[[0]]] * 4, width=1, rows=size)
    assert [len(each.places) for each in large.runs()] == [3, 1]
    assert [len(each.places) for each in large.runs(2 * size)] == [1, 1, 1, 1]


def test_a_column_without_a_channel_keeps_its_scale() -> None:
    one = member([[0, 1], [2, 3]], [[[0, 1, 1, -1]], [[1, 0, -1, 0]]])
    scales = torch.tensor([[[2.0, 3.0]], [[5.0, 7.0]]])
    columns = one.columns(scales, Run(range(1, 4), range(1, 4)))
    assert columns.tolist() == [[[2, 3, 3, 1]], [[7, 5, 1, 5]], [[7, 5, 1, 5]]]


def test_matrices_meet_in_channels_through_others() -> None:
    """The second reader joins two of the first; the last reads nothing, and one channel is unread."""
    labels, of_channel = _labels(
        [torch.tensor([[0, 1], [2, 3], [4, -1]]), torch.tensor([[3, 1]]), torch.tensor([[-1, -1]])], 6
    )
    assert [each.tolist() for each in labels] == [[0, 0, 2], [0], [4]]
    assert of_channel.tolist() == [0, 0, 0, 0, 2, 5]
