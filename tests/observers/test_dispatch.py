"""Which linears route tokens to experts, and which tensor holds their decision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awqc.graph import Graph
from awqc.observers.dispatch import Rerouting, choice, routers
from awqc.passes.canonicalize import Canonicalize
from awqc.views import expert_linears
from tests.mixtures import EXPERTS, MIXTURES, Mixture, build, token_ids
from tests.passes.graphs import context_of, graph_of, samples


def canonical(module: nn.Module, **inputs: Tensor) -> Graph:
    graph = graph_of(module, **inputs)
    Canonicalize().run(graph, context_of([]))
    return graph


def test_the_router_is_the_linear_in_front_of_the_offsets() -> None:
    graph = canonical(Mixture(), **samples(1)[0])
    assert routers(graph) == {"chooser.weight": "first"}
    views = list(expert_linears(graph))
    (chosen,) = {choice(view) for view in views}
    assert chosen is not None
    assert (tuple(chosen.meta["val"].shape), chosen.meta["val"].dtype) == ((8, 2), torch.int64)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_layer_has_one(name: str) -> None:
    model: Any = build(name)
    model.set_experts_implementation("grouped_mm")
    graph = canonical(model, input_ids=token_ids(0, 1, 8))
    views = list(expert_linears(graph))
    assert len(routers(graph)) == len(views) / 2
    for view in views:
        chosen = choice(view)
        assert chosen is not None
        assert tuple(chosen.meta["val"].shape) == (8, 2)


class Everyone(nn.Module):
    """All experts see all tokens, weighed by what the router thinks of them."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.opinion = nn.Linear(width, EXPERTS)
        self.other = nn.Linear(width, width)
        self.weight = nn.Parameter(torch.randn(EXPERTS, width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.other(x).flatten(0, -2)
        weighed = h * torch.sigmoid(self.opinion(h)).T[:, :, None]
        return torch.bmm(weighed, self.weight).sum(0)


def test_without_offsets_it_is_what_gives_a_number_for_every_expert() -> None:
    graph = canonical(Everyone(), **samples(1)[0])
    assert routers(graph) == {"opinion.weight": "weight"}
    (view,) = expert_linears(graph)
    assert choice(view) is None


def test_a_dense_model_has_no_routers() -> None:
    assert (
        routers(canonical(nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 32)), input=torch.zeros(2, 32))) == {}
    )


def test_rerouting_needs_what_is_not_behind_the_choice() -> None:
    graph = canonical(Mixture(), **samples(1)[0])
    view = next(iter(expert_linears(graph)))
    chosen = choice(view)
    assert chosen is not None
    rerouting = Rerouting(view, chosen)
    order = graph.order()
    assert rerouting.needs
    assert all(order[node] < order[chosen] for node in rerouting.needs)
    env = dict(zip(graph.inputs, samples(1)[0].values(), strict=True))
    seen: list[Tensor] = []

    def evaluate(wanted: Any, known: Any) -> Any:
        seen.append(known[chosen])
        return {view.x: torch.zeros(16, 32), view.offsets: torch.tensor([4, 8, 12, 16])}

    found = list(rerouting.rows({**env, chosen: torch.zeros(8, 2).long()}, evaluate))
    assert len(found) == EXPERTS
    assert [ids[0].tolist() for ids in seen] == [[0, 1], [2, 3]]
