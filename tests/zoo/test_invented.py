"""An architecture that nobody has seen, with names that say nothing: its groups follow from what it computes.

``Loom`` is a language model of parallel blocks with three norms: attention whose values are gated, a gated
product, and a mixture of four experts that are multiplied all at once, squared where they are positive, and
weighted by the softmax of the two best. Each group below was derived by hand.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import awqc
from awqc.analysis import Analysis
from awqc.capture import relative_error
from awqc.scaleflow.groups import ScaleGroup
from tests.zoo.build import randomize
from tests.zoo.inputs import token_ids

WIDTH, HEADS, PAIRS, HEAD, INNER, EXPERTS, VOCABULARY = 64, 4, 2, 16, 96, 4, 96


class Sieve(nn.Module):
    """Experts as two tensors; every expert sees every token, and two of them count."""

    def __init__(self) -> None:
        super().__init__()
        self.verdict = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.wide = nn.Parameter(torch.empty(EXPERTS, INNER, WIDTH))
        self.narrow = nn.Parameter(torch.empty(EXPERTS, WIDTH, INNER))

    def forward(self, h: Tensor) -> Tensor:
        flat = h.reshape(-1, WIDTH)
        best, who = self.verdict(flat).topk(2, dim=-1)
        shares = torch.zeros(len(flat), EXPERTS, dtype=h.dtype).scatter(1, who, best.softmax(-1))
        inner = torch.bmm(flat.expand(EXPERTS, -1, -1), self.wide.transpose(1, 2)).relu().square()
        out = torch.bmm(inner, self.narrow.transpose(1, 2))
        return (out * shares.t().unsqueeze(-1)).sum(0).view(h.shape)


class Thread(nn.Module):
    """Three ways side by side, each behind a norm of its own, all added to what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.ochre, self.teal, self.rust = nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.ask = nn.Linear(WIDTH, WIDTH, bias=False)
        self.answer = nn.Linear(WIDTH, 2 * PAIRS * HEAD)  # keys and values in one
        self.valve = nn.Linear(WIDTH, PAIRS * HEAD)
        self.merge = nn.Linear(WIDTH, WIDTH, bias=False)
        self.left, self.right = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER, bias=False)
        self.back = nn.Linear(INNER, WIDTH)
        self.sieve = Sieve()

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        h = self.ochre(x)
        q = self.ask(h).view(batch, tokens, HEADS, HEAD).transpose(1, 2)
        k, v = self.answer(h).chunk(2, dim=-1)
        v = v * torch.sigmoid(self.valve(h))
        k, v = (t.view(batch, tokens, PAIRS, HEAD).transpose(1, 2) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        woven = self.merge(mixed.transpose(1, 2).flatten(2))
        h = self.teal(x)
        return x + woven + self.back(torch.tanh(self.left(h)) * self.right(h)) + self.sieve(self.rust(x))


class Loom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dye = nn.Embedding(VOCABULARY, WIDTH)
        self.threads = nn.ModuleList([Thread(), Thread()])
        self.finish = nn.LayerNorm(WIDTH)
        self.pattern = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.dye(input_ids)
        for thread in self.threads:
            x = thread(x)
        return self.pattern(self.finish(x))


#: Producers -> the weights that read what they scale, within a block.
GROUPS = {
    ("ochre.weight",): {"ask.weight", "answer.weight", "valve.weight"},
    ("answer.weight", "answer.bias"): {"merge.weight"},
    ("teal.weight", "teal.bias"): {"left.weight", "right.weight"},
    ("right.weight",): {"back.weight"},
    ("rust.weight",): {"sieve.verdict.weight", "sieve.wide"},
    ("sieve.wide",): {"sieve.narrow"},
}


@pytest.fixture(scope="module")
def loom() -> Loom:
    torch.manual_seed(0)
    model = Loom().eval()
    randomize(model)
    return model


@pytest.fixture(scope="module")
def found(loom: Loom) -> Analysis:
    return awqc.analyze(loom, token_ids())


def test_all_legal_groups_are_found(found: Analysis) -> None:
    expected = {
        tuple(f"threads.{i}.{name}" for name in producers): {f"threads.{i}.{name}" for name in readers}
        for i in range(2)
        for producers, readers in GROUPS.items()
    } | {("finish.weight", "finish.bias"): {"pattern.weight"}}
    assert {
        tuple(p.parameter for p in g.producers): {p.parameter for p in g.consumers} for g in found.groups
    } == expected
    assert all(isinstance(group, ScaleGroup) for group in found.linears.values())


def test_values_are_scaled_and_keys_are_not(found: Analysis) -> None:
    group = found.linears["threads.1.merge.weight"]
    assert isinstance(group, ScaleGroup)
    values = torch.arange(PAIRS * HEAD, 2 * PAIRS * HEAD)
    assert torch.equal(group.alive.nonzero().flatten(), values)


def test_each_expert_has_inner_channels_of_its_own(found: Analysis) -> None:
    group = found.linears["threads.0.sieve.narrow"]
    assert isinstance(group, ScaleGroup)
    assert int(group.alive.sum()) == EXPERTS * INNER
    assert [part.degree for part in group.parts] == [1.0, -2.0]  # the square


def test_folding_moves_nothing(loom: Loom, found: Analysis) -> None:
    assert found.prove({"input_ids": token_ids()}) < 1e-9
    model = copy.deepcopy(loom).double()
    with torch.no_grad():
        before = model(token_ids())
        found.fold(model)
        assert relative_error(model(token_ids()), before) < 1e-9
    assert not torch.equal(model.threads[0].merge.weight, loom.threads[0].merge.weight.double())
