"""Sums by expert: against those of each expert's rows alone, with too few rows, and through a fold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from awqc.graph import Graph
from awqc.memory import Kind
from awqc.observers.activations import Activations
from awqc.observers.expert_statistics import ExpertStatistics
from awqc.observers.expert_sums import ExpertSums, adding_work, joins
from awqc.observers.grams import SampledGram
from awqc.observers.input_statistics import InputStatistics
from awqc.observers.stages import Stages
from awqc.observers.statistics import Statistics
from awqc.quantization.loss import output_loss
from awqc.quantization.matrices import Matrix
from awqc.views import expert_linears
from awqc.work import is_view
from tests.mixtures import EXPERTS, Mixture
from tests.passes.graphs import ANALYSIS, Look, run, samples

K = 6
VIEW: Any = SimpleNamespace(count=4, in_features=K)
#: (search rows, held-out rows) of each expert.
COUNTS = [(40, 8), (7, 5), (0, 0), (30, 0)]


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, K, generator=torch.Generator().manual_seed(seed))


def filled(least: int, kind: Kind = "full") -> ExpertStatistics:
    statistics = ExpertStatistics(VIEW, least, torch.device("cpu"), kind, 3, 100)
    for expert, pair in enumerate(COUNTS):
        for held_out, count in enumerate(pair):
            counts = [count * (e == expert) for e in range(4)]
            statistics.add(rows(count, 10 * expert + held_out), counts, bool(held_out))
    statistics.finish()
    return statistics


def divisors(alike: bool) -> Tensor:
    found = torch.rand(4, K, generator=torch.Generator().manual_seed(5)) + 0.5
    return found[:1].expand(4, K) if alike else found


def gram(*x: Tensor) -> Tensor:
    return sum((part.T @ part for part in x), torch.zeros(K, K))


SEARCH = [rows(n, 10 * e) for e, (n, _) in enumerate(COUNTS)]
HELD_OUT = [rows(n, 10 * e + 1) for e, (_, n) in enumerate(COUNTS)]


def test_each_expert_has_the_sums_of_its_rows() -> None:
    found = filled(least=0)
    assert found.tokens == [40, 7, 0, 30]
    assert found.borrowing == 0
    for expert in (0, 1, 3):
        torch.testing.assert_close(found[expert].gram, gram(SEARCH[expert]))
        torch.testing.assert_close(found[expert].held_out, gram(HELD_OUT[expert]))
        torch.testing.assert_close(found[expert].mean_abs, SEARCH[expert].abs().mean(0))
        assert found[expert].share == 1
    torch.testing.assert_close(found.layer.gram, gram(*SEARCH))
    torch.testing.assert_close(found.layer.mean_abs, torch.cat(SEARCH).abs().mean(0))
    assert (found.layer.tokens, found.layer.held_out_tokens) == (77, 13)


def test_with_too_few_rows_it_has_those_of_the_layer() -> None:
    found = filled(least=16)
    assert found.borrowing == 2
    for expert in (1, 2):
        assert torch.equal(found[expert].gram, found.layer.gram)
        assert torch.equal(found[expert].mean_abs, found.layer.mean_abs)
        assert found[expert].tokens == found.tokens[expert] == COUNTS[expert][0]
        assert found[expert].share == COUNTS[expert][0] / 77
    for expert in (0, 3):
        torch.testing.assert_close(found[expert].gram, gram(SEARCH[expert]))
    # 16 / 8 held-out rows are enough: the second has 5, the last none.
    torch.testing.assert_close(found[1].held_out, gram(HELD_OUT[1]))
    for expert in (2, 3):
        assert torch.equal(found[expert].held_out, found.layer.held_out)


@pytest.mark.parametrize("kind", ["offloaded", "sampled"])
@pytest.mark.parametrize("alike", [True, False])
def test_what_all_share_stays_shared_where_they_are_divided_alike(kind: Kind, alike: bool) -> None:
    shared = filled(least=0, kind=kind)
    assert shared.borrowing == 4
    weight = torch.randn(4, 2, K, generator=torch.Generator().manual_seed(6))
    before = output_loss(weight, shared.batch(range(4)).gram)
    scales = divisors(alike)
    shared.fold(scales)
    batch = shared.batch(range(1, 3))
    apart = batch.gram.blocks.ndim == 4 if isinstance(batch.gram, SampledGram) else batch.gram.ndim == 3
    assert apart == (not alike)
    torch.testing.assert_close(output_loss((weight * scales[:, None])[1:3], batch.gram), before[1:3])
    torch.testing.assert_close(output_loss(weight[2] * scales[2], shared[2].gram), before[2])
    assert batch.shares.tolist() == pytest.approx([7 / 77, 0])


@pytest.mark.parametrize("together", [True, False])
def test_rows_are_added_up_the_same_however_many_come_at_once(together: bool) -> None:
    counts = [[5, 0, 3, 1], [0, 0, 40, 2], [1, 7, 0, 0]]
    sums = ExpertSums(4, K, torch.device("cpu"), together)
    alone: list[list[Tensor]] = [[], [], [], []]
    for seed, each in enumerate(counts):
        x = rows(sum(each), seed)
        sums.add(x, each)
        for expert, part in enumerate(x.split(each)):
            alone[expert].append(part)
    sums.add_up()
    assert sums.tokens == [6, 7, 43, 3]
    for expert, parts in enumerate(alone):
        torch.testing.assert_close(sums.gram[expert].triu(), gram(*parts).triu())
        torch.testing.assert_close(sums.magnitude[expert], torch.cat(parts).abs().sum(0))


@pytest.mark.parametrize("alike", [True, False])
def test_a_fold_is_exact(alike: bool) -> None:
    found, before = filled(least=16), filled(least=16)
    scales = divisors(alike)
    found.fold(scales)
    for expert, by in enumerate(scales):
        torch.testing.assert_close(found[expert].gram, before[expert].gram / by[:, None] / by)
        torch.testing.assert_close(found[expert].held_out, before[expert].held_out / by[:, None] / by)
        torch.testing.assert_close(found[expert].mean_abs, before[expert].mean_abs / by)


def observed(**options: Any) -> tuple[Graph, list[Statistics]]:
    """A mixture, and the statistics of the stages in which its experts' two linears are."""
    found: list[Statistics] = []

    def see(graph: Graph, context: Any) -> None:
        found.append(graph.facts[Activations].observe(context.stage))

    options = {"group_size": 32, "min_expert_tokens": 0, **options}
    graph, _ = run(Mixture(), samples(8, width=32), *ANALYSIS, Look(see), **options)
    return graph, [statistics for statistics in found if statistics.by_expert]


def dispatched(module: Mixture) -> list[Tensor]:
    """What the first linear of each expert reads over the seven samples that searches use."""
    parts: list[list[Tensor]] = [[] for _ in range(EXPERTS)]
    with torch.no_grad():
        for batch in samples(8, width=32)[:7]:
            h = module.norm(batch["x"]).flatten(0, -2)
            chosen = module.chooser(h).topk(2).indices
            for expert in range(EXPERTS):
                parts[expert].append(h[(chosen == expert).any(-1)])
    return [torch.cat(part) for part in parts]


def inner(module: Mixture, x: Tensor, expert: int) -> Tensor:
    with torch.no_grad():
        return torch.relu(x @ module.first[expert].T)


def test_rows_come_to_their_experts() -> None:
    _, (first, second) = observed()
    module, x = Mixture(), dispatched(Mixture())
    (before,), (after,) = first.by_expert.values(), second.by_expert.values()
    assert before.tokens == after.tokens == [len(part) for part in x]
    for expert in range(EXPERTS):
        torch.testing.assert_close(before[expert].gram, x[expert].T @ x[expert], rtol=1e-4, atol=1e-4)
        h = inner(module, x[expert], expert)
        torch.testing.assert_close(after[expert].gram, h.T @ h, rtol=1e-4, atol=1e-4)


def test_every_token_to_every_expert_if_asked_for() -> None:
    graph, (first, second) = observed(calibrate_all_experts=True)
    module = Mixture()
    with torch.no_grad():
        x = torch.cat([module.norm(batch["x"]).flatten(0, -2) for batch in samples(8, width=32)[:7]])
    (before,), (after,) = first.by_expert.values(), second.by_expert.values()
    assert before.tokens == after.tokens == [len(x)] * EXPERTS
    for expert in range(EXPERTS):
        torch.testing.assert_close(before[expert].gram, x.T @ x, rtol=1e-4, atol=1e-4)
        h = inner(module, x, expert)
        torch.testing.assert_close(after[expert].gram, h.T @ h, rtol=1e-4, atol=1e-4)
    # What moves on is routed as ever.
    assert len(list(graph.facts[Stages])) >= 2


def test_statistics_of_a_matrix() -> None:
    graph, (first, _) = observed()
    view = next(expert_linears(graph))
    node = next(iter(first.by_expert))
    assert node is view.x
    assert torch.equal(first.of(node, Matrix(view, 2)).gram, first.by_expert[node][2].gram)
    assert torch.equal(first.batch(node, view, range(1, 3)).gram[1], first.by_expert[node][2].gram)
    assert all(isinstance(found, InputStatistics) for found in first.values())


@pytest.mark.gpu
def test_sums_on_a_gpu_are_those_of_the_cpu() -> None:
    width, places = 512, ("cpu", "cuda")
    counts = [[300, 0, 5, 40], [1, 0, 700, 0]]
    found = [ExpertSums(4, width, torch.device(place)) for place in places]
    for seed, each in enumerate(counts):
        x = torch.randn(sum(each), width, generator=torch.Generator().manual_seed(seed))
        for sums, place in zip(found, places, strict=True):
            sums.add(x.to(place), each)
    for sums in found:
        sums.add_up()
    here, there = found
    # Sums of at most 705 products, in another order.
    eps = 705 * torch.finfo(torch.float32).eps
    assert (there.gram.cpu().triu() - here.gram.triu()).abs().max() <= eps * here.gram.abs().amax()
    torch.testing.assert_close(there.magnitude.cpu(), here.magnitude, rtol=eps, atol=0)


class Counted(TorchDispatchMode):
    """Counts the ops that compute."""

    ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += not is_view(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("experts", "width", "tokens", "count"), [(64, 128, 400, 16), (32, 256, 900, 8)])
def test_work_of_sums_is_what_a_plan_says(
    together: bool, experts: int, width: int, tokens: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows that are spread as by a router without training: some experts have a few times the mean."""
    generator = torch.Generator().manual_seed(1)
    share = torch.randn(experts, generator=generator).softmax(0)
    sums, times = ExpertSums(experts, width, torch.device("cpu"), together), []
    join = ExpertSums._joined
    monkeypatch.setattr(ExpertSums, "_joined", lambda self: times.append(1) or join(self))
    with Counted() as counted:
        for _ in range(count):
            chosen = torch.multinomial(share, tokens, True, generator=generator)
            sums.add(torch.zeros(tokens, width), chosen.bincount(minlength=experts).tolist())
        sums.add_up()
    assert len(times) == joins(experts, width, tokens, count)
    foretold = adding_work(experts, width, tokens, count, together)
    assert 0.5 < foretold["calls"] / counted.ops < 2
