"""Scale groups through experts: which channels belong to whom, and what must not be taken for that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awqc.scaleflow.flow import Flow
from awqc.scaleflow.groups import ScaleGroup
from awqc.scaleflow.sites import find_sites
from awqc.views import expert_linears
from tests.nets import WIDTH, Net, analyze, inputs, linear, members, norm, refusals

EXPERTS, INNER, TOKENS, CHOSEN = 3, 5, 6, 2


def stack(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(EXPERTS, *size))


def dispatch(m: Net, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of ``h`` sorted by the expert that serves them, the experts, the order and the offsets."""
    chosen = m.router(h).topk(CHOSEN)[1].flatten()
    experts, order = chosen.sort()
    counts = torch.histc(experts.float(), EXPERTS, 0, EXPERTS - 1)
    return h[order // CHOSEN], experts, order, counts.cumsum(0, dtype=torch.int32)


def collect(h: Tensor, order: Tensor) -> Tensor:
    """The sum of the rows of each token."""
    return torch.zeros(TOKENS, h.shape[-1], dtype=h.dtype).index_add(0, order // CHOSEN, h)


def product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return torch.ops.awqc.grouped_linear(x, weight, offsets)


def swiglu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def mixture(between: Any = swiglu, bias: bool = False) -> Net:
    """norm -> router and experts, with ``between`` in the middle of each expert."""

    def compute(m: Net, x: Tensor) -> Tensor:
        h, experts, order, offsets = dispatch(m, m.n(x.flatten(0, 1)))
        h = product(h, m.up, offsets)
        if bias:
            h = h + m.bias[experts]
        h = product(between(h), m.down, offsets)
        return collect(h, order)

    parts = {"bias": stack(2 * INNER)} if bias else {}
    width = INNER if between is swiglu else 2 * INNER
    return Net(
        compute,
        n=norm(),
        router=linear(WIDTH, EXPERTS),
        up=stack(2 * INNER, WIDTH),
        down=stack(WIDTH, width),
        **parts,
    )


def the_group(net: nn.Module, name: str) -> ScaleGroup:
    found = analyze(net).linears[name]
    assert isinstance(found, ScaleGroup), found
    return found


# -- found -----------------------------------------------------------------------------------------------


def test_one_vector_for_all_readers_of_a_norm_and_one_for_each_expert_inside() -> None:
    analysis = analyze(mixture())
    assert members(analysis) == {"n.weight": ("router.weight", "up"), "up": ("down",)}
    outer, inner = analysis.groups
    assert outer.channels == WIDTH
    assert inner.channels == EXPERTS * 2 * INNER
    alive = inner.alive.reshape(EXPERTS, 2, INNER)
    assert alive[:, 1].all()
    assert not alive[:, 0].any()
    (part,) = inner.consumers
    expected = torch.arange(EXPERTS * 2 * INNER).reshape(EXPERTS, 2, INNER)[:, 1]
    assert torch.equal(part.ids.long(), expected[:, None])


def test_the_group_says_what_divides_the_input_of_each_expert() -> None:
    analysis = analyze(mixture())
    up, down = expert_linears(analysis.graph)
    outer, inner = analysis.groups
    ids, degree = outer.at_experts(up)
    assert degree == 1.0
    assert torch.equal(ids, torch.arange(WIDTH).expand(EXPERTS, WIDTH))
    ids, degree = inner.at_experts(down)
    assert degree == 1.0
    assert torch.equal(ids, inner.consumers[0].ids[:, 0].long())


def test_what_divides_a_tensor_follows_the_expert_of_each_row() -> None:
    analysis = analyze(mixture())
    _, down = expert_linears(analysis.graph)
    inner = analysis.groups[1]
    routing = inner.values[down.x].routing
    assert routing is not None
    chosen = torch.arange(TOKENS * CHOSEN) % EXPERTS
    scales = torch.arange(1.0, inner.channels + 1)
    divisor = inner.divisor(down.x, scales)
    ids, _ = inner.at_experts(down)
    assert divisor is not None
    assert torch.equal(divisor.at({routing.key: chosen}), scales[ids[chosen]])
    assert divisor.values.shape == (EXPERTS, len(inner.values[down.x].used())), "not a number for every row"


def test_a_bias_that_each_row_picks_by_its_expert_joins() -> None:
    group = the_group(mixture(bias=True), "down")
    assert [p.parameter for p in group.producers] == ["up", "bias"]
    assert group.producers[1].ids.shape == (EXPERTS, 2 * INNER)


def test_relu_of_all_channels() -> None:
    group = the_group(mixture(F.relu), "down")
    assert bool(group.alive.all())


def test_rows_may_be_rearranged_and_put_back() -> None:
    def there_and_back(h: Tensor) -> Tensor:
        h = h.view(2, -1, h.shape[-1]).transpose(0, 1)
        return F.relu(h).transpose(0, 1).reshape(TOKENS * CHOSEN, -1)

    assert bool(the_group(mixture(there_and_back), "down").alive.all())


def test_a_block_of_rows_for_each_expert() -> None:
    def compute(m: Net, x: Tensor) -> Tensor:
        h = m.n(x.flatten(0, 1))
        weights = m.router(h).softmax(-1).t()[..., None]
        h = h.expand(EXPERTS, TOKENS, WIDTH)
        h = torch.bmm(h, m.up.mT) + m.bias[:, None]
        return (torch.bmm(swiglu(h), m.down.mT) * weights).sum(0)

    net = Net(
        compute,
        n=norm(),
        router=linear(WIDTH, EXPERTS),
        up=stack(2 * INNER, WIDTH),
        bias=stack(2 * INNER),
        down=stack(WIDTH, INNER),
    )
    analysis = analyze(net)
    assert members(analysis) == {"n.weight": ("router.weight", "up"), "up": ("down",)}
    _, down = expert_linears(analysis.graph)
    ids, _ = analysis.groups[1].at_experts(down)
    assert torch.equal(ids, torch.arange(EXPERTS * 2 * INNER).reshape(EXPERTS, 2, INNER)[:, 1])


PICKED = {
    "bmm": lambda h, w: torch.bmm(w, h[..., None])[..., 0],
    "matmul": lambda h, w: (h[:, None] @ w.mT)[:, 0],
    "einsum": lambda h, w: torch.einsum("sk,snk->sn", h, w),
}


@pytest.mark.parametrize("how", PICKED)
def test_weights_picked_for_each_row(how: str) -> None:
    """The weights are no linears that awqc quantizes, but the scale flows through and is undone."""

    def compute(m: Net, x: Tensor) -> Tensor:
        h = m.n(x.flatten(0, 1))
        chosen = m.router(h).argmax(-1)
        up = PICKED[how](h, m.up[chosen]) + m.bias[chosen]
        return m.out(PICKED[how](swiglu(up), m.down[chosen]))

    net = Net(
        compute,
        n=norm(),
        router=linear(WIDTH, EXPERTS),
        up=stack(2 * INNER, WIDTH),
        bias=stack(2 * INNER),
        down=stack(WIDTH, INNER),
        out=linear(),
    )
    group = the_group(net, "router.weight")
    assert [p.parameter for p in group.consumers] == ["router.weight", "up"]


# -- refused ---------------------------------------------------------------------------------------------


def refused(net: nn.Module) -> list[str]:
    """Why the inner channels of one expert cannot differ from those of another."""
    graph = analyze(net).graph
    sites = find_sites(graph)
    node = graph.parameters()["up"]
    seed = torch.arange(EXPERTS * node.meta["val"].shape[1], dtype=torch.int32).reshape(EXPERTS, -1, 1)
    flow = Flow(graph, sites, graph.order()).run({node: seed.expand(node.meta["val"].shape)})
    assert not flow.alive.any()
    return [str(refusal) for refusal in flow.refusals]


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (
            lambda h: h.flip(0).relu(),
            "awqc.grouped_linear (grouped_linear_1): its scale differs from row to row",
        ),
        (
            lambda h: h[h.norm(dim=0).argsort()[:1]].expand(len(h), -1),
            "aten.linalg_vector_norm (linalg_vector_norm): rows that different experts serve are mixed: "
            "sums over channels that carry different scales",
        ),
        (
            lambda h: h + h.flip(0),
            "aten.add (add): rows that different experts serve are mixed: "
            "channels scaled by different factors are added",
        ),
        (
            lambda h: h - h.mean(0),
            "aten.mean (mean): rows that different experts serve are mixed: "
            "sums over channels that carry different scales",
        ),
        (
            lambda h: h.cumsum(0),
            "aten.cumsum (cumsum_1): rows that different experts serve are mixed: "
            "sums over channels that carry different scales",
        ),
        (
            lambda h: torch.softmax(h.new_ones(12, 12), -1) @ h,
            "aten.matmul (matmul): which expert serves a row is not known any more",
        ),
    ],
    ids=["flip", "pick", "add flipped", "mean", "cumsum", "attend"],
)
def test_where_rows_of_several_experts_meet_all_share_one_vector(between: Any, reason: str) -> None:
    net = mixture(between)
    assert reason in refused(net)
    found = analyze(net).linears["down"]
    if isinstance(found, ScaleGroup):  # what one expert may not, all may together
        assert found.channels == 2 * INNER
        assert found.consumers[0].ids.shape == (1, 1, 2 * INNER)


def test_a_nonlinearity_inside_an_expert_is_refused() -> None:
    reason = "aten.gelu (gelu): no scale passes through aten.gelu"
    assert refusals(analyze(mixture(F.gelu))) == {"down": reason}


def test_rows_served_by_others_the_second_time_share_one_vector() -> None:
    def compute(m: Net, x: Tensor) -> Tensor:
        h, _, _, offsets = dispatch(m, m.n(x.flatten(0, 1)))
        others = torch.histc(m.other(x.flatten(0, 1)).argmax(-1).float(), EXPERTS, 0, EXPERTS - 1)
        h = F.relu(product(h, m.up, offsets))
        return product(h, m.down, (CHOSEN * others).cumsum(0).int())

    net = Net(
        compute,
        n=norm(),
        router=linear(WIDTH, EXPERTS),
        other=linear(WIDTH, EXPERTS),
        up=stack(INNER, WIDTH),
        down=stack(WIDTH, INNER),
    )
    assert refused(net) == ["awqc.grouped_linear (grouped_linear_1): its scale differs from row to row"]
    assert the_group(net, "down").channels == INNER


def test_offsets_that_count_in_another_order_name_no_experts() -> None:
    """Sorted the other way, offsets that count from the first expert give rows to the wrong ones, while the
    bias is picked by the right ones: nothing says that the two are the same expert."""

    def compute(m: Net, x: Tensor) -> Tensor:
        h = m.n(x.flatten(0, 1))
        experts, order = m.router(h).topk(CHOSEN)[1].flatten().sort(descending=True)
        offsets = torch.histc(experts.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        h = product(h[order // CHOSEN], m.up, offsets) + m.bias[experts]
        return product(F.relu(h), m.down, offsets)

    net = Net(
        compute,
        n=norm(),
        router=linear(WIDTH, EXPERTS),
        up=stack(INNER, WIDTH),
        bias=stack(INNER),
        down=stack(WIDTH, INNER),
    )
    assert refused(net) == ["aten.add (add): is added to index_1, which is not scaled along"]
    assert the_group(net, "down").channels == INNER


def test_a_router_that_no_weight_can_compensate_is_refused() -> None:
    """The reader that implementations by name forget: it would choose other experts."""

    def compute(m: Net, x: Tensor) -> Tensor:
        h = m.n(x.flatten(0, 1))
        chosen = h[:, :EXPERTS].argmax(-1)
        experts, order = chosen.sort()
        offsets = torch.histc(experts.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        return product(h[order], m.up, offsets)

    net = Net(compute, n=norm(), up=stack(INNER, WIDTH))
    group = the_group(net, "up")
    assert group.alive.tolist() == [False] * EXPERTS + [True] * (WIDTH - EXPERTS)
    assert [str(r) for r in group.refused] == [
        "aten.argmax (argmax): sums over channels that carry different scales"
    ]


def test_weights_of_experts_that_are_read_elsewhere_are_refused() -> None:
    def compute(m: Net, x: Tensor) -> Tensor:
        h, _, order, offsets = dispatch(m, m.n(x.flatten(0, 1)))
        return collect(product(h, m.up, offsets), order) + m.up.mean((0, 2))

    net = Net(compute, n=norm(), router=linear(WIDTH, EXPERTS), up=stack(INNER, WIDTH))
    assert refusals(analyze(net)) == {
        "router.weight": "aten.mean (mean): sums over channels that carry different scales",
        "up": "aten.mean (mean): sums over channels that carry different scales",
    }


def test_inputs_are_what_the_tests_assume() -> None:
    assert inputs()["x"].shape[:-1].numel() == TOKENS
