"""Which groups there are, which are refused and why, on modules small enough to read."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import awqc
from awqc.errors import VerifyError
from awqc.scaleflow.groups import ScaleGroup
from awqc.scaleflow.proof import prove
from tests.nets import WIDTH, Net, analyze, fold_error, inputs, linear, members, norm, refusals


def the_group(found: dict[str, ScaleGroup | str], name: str) -> ScaleGroup:
    group = found[name]
    assert isinstance(group, ScaleGroup), group
    return group


def test_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        analyze(Net(lambda m, x: m.a(m.n(x)), n=norm(), a=linear()))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# -- found -----------------------------------------------------------------------------------------------


def test_every_reader_of_a_norm_is_a_consumer() -> None:
    net = Net(lambda m, x: m.a(m.n(x)) * m.b(m.n(x)).tanh(), n=norm(), a=linear(), b=linear())
    analysis = analyze(net)
    assert members(analysis) == {"n.weight": ("a.weight", "b.weight")}
    assert [p.parameter for p in analysis.groups[0].producers] == ["n.weight", "n.bias"]
    assert refusals(analysis) == {}


def test_a_norm_applied_twice_scales_both_results() -> None:
    net = Net(lambda m, x: m.a(m.n(x)) + m.b(m.n(x + 1)), n=norm(), a=linear(), b=linear())
    assert members(analyze(net)) == {"n.weight": ("a.weight", "b.weight")}


def test_fused_gate_and_up_give_up_alone() -> None:
    def compute(m: Net, x: Tensor) -> Tensor:
        gate, up = m.gate_up(x).chunk(2, dim=-1)
        return m.down(F.silu(gate) * up)

    analysis = analyze(Net(compute, gate_up=linear(WIDTH, 2 * WIDTH, bias=True), down=linear()))
    group = the_group(analysis.linears, "down.weight")
    assert group.channels == 2 * WIDTH
    assert torch.equal(group.alive.nonzero().flatten(), torch.arange(WIDTH, 2 * WIDTH))
    assert [p.parameter for p in group.producers] == ["gate_up.weight", "gate_up.bias"]
    assert [str(refusal) for refusal in group.refused] == [
        "aten.silu (silu): no scale passes through aten.silu"
    ]


def test_fused_relu_gate_scales_one_factor() -> None:
    def compute(m: Net, x: Tensor) -> Tensor:
        gate, up = m.gate_up(x).chunk(2, dim=-1)
        return m.down(F.relu(gate) * up)

    analysis = analyze(Net(compute, gate_up=linear(WIDTH, 2 * WIDTH), down=linear()))
    assert torch.equal(
        the_group(analysis.linears, "down.weight").alive.nonzero().flatten(), torch.arange(WIDTH)
    )


def test_readers_may_see_the_channels_in_different_order() -> None:
    net = Net(lambda m, x: m.a(m.n(x)) + m.b(m.n(x).flip(-1)), n=norm(), a=linear(), b=linear())
    analysis = analyze(net)
    assert members(analysis) == {"n.weight": ("a.weight", "b.weight")}
    maps = {p.parameter: p.ids[0].tolist() for p in analysis.groups[0].consumers}
    assert maps == {"a.weight": [0, 1, 2, 3, 4, 5, 6, 7], "b.weight": [7, 6, 5, 4, 3, 2, 1, 0]}


def test_a_channel_that_is_stopped_does_not_stop_the_others() -> None:
    def compute(m: Net, x: Tensor) -> Tensor:
        left, right = m.n(x).split([3, 5], dim=-1)
        return m.a(torch.cat([F.silu(left), right], dim=-1))

    group = the_group(analyze(Net(compute, n=norm(), a=linear())).linears, "a.weight")
    assert group.alive.tolist() == [False] * 3 + [True] * 5
    assert group.consumers[0].ids.tolist() == [[-1, -1, -1, 3, 4, 5, 6, 7]]


def test_in_place_relu_is_followed() -> None:
    net = Net(lambda m, x: m.b(m.r(m.a(x))), a=linear(bias=True), r=nn.ReLU(inplace=True), b=linear())
    assert members(analyze(net)) == {"a.weight": ("b.weight",)}


def test_a_square_doubles_the_degree() -> None:
    net = Net(lambda m, x: m.b(m.a(x).relu().square()), a=linear(), b=linear())
    assert [(p.parameter, p.degree) for p in analyze(net).groups[0].parts] == [
        ("a.weight", 1.0),
        ("b.weight", -2.0),
    ]


def test_value_projection_is_followed_through_attention_written_out() -> None:
    def compute(m: Net, x: Tensor) -> Tensor:
        q, k, v = m.q(x), m.k(x), m.v(x)
        return m.o(torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v)

    net = Net(compute, q=linear(), k=linear(), v=linear(bias=True), o=linear())
    analysis = analyze(net)
    assert members(analysis) == {"v.weight": ("o.weight",)}
    assert refusals(analysis) == dict.fromkeys(
        ["q.weight", "k.weight", "v.weight"],
        "its input x is an input of the model: nothing before it can absorb a scale",
    )


# -- chosen ----------------------------------------------------------------------------------------------


def test_the_handle_that_reaches_most_linears_wins() -> None:
    scale, gain = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))
    net = Net(
        lambda m, x: m.a(x * m.early * m.late) + m.b(x * m.late),
        early=scale,
        late=gain,
        a=linear(),
        b=linear(),
    )
    assert members(analyze(net)) == {"late": ("a.weight", "b.weight")}


def test_among_equals_the_first_in_the_graph_wins() -> None:
    parts = {name: nn.Parameter(torch.ones(WIDTH)) for name in ("second", "first")}
    net = Net(lambda m, x: m.a(x * m.first * m.second), **parts, a=linear())
    assert members(analyze(net)) == {"second": ("a.weight",)}  # parameters come in the order of the module
    parts = {name: nn.Parameter(torch.ones(WIDTH)) for name in ("first", "second")}
    net = Net(lambda m, x: m.a(x * m.first * m.second), **parts, a=linear())
    assert members(analyze(net)) == {"first": ("a.weight",)}


def test_among_equals_the_one_that_keeps_most_channels_wins() -> None:
    def compute(m: Net, x: Tensor) -> Tensor:
        h = x * m.partial
        return m.a(torch.cat([F.silu(h[..., :2]), h[..., 2:]], dim=-1) * m.whole)

    parts = {name: nn.Parameter(torch.ones(WIDTH)) for name in ("partial", "whole")}
    assert members(analyze(Net(compute, **parts, a=linear()))) == {"whole": ("a.weight",)}


# -- refused ---------------------------------------------------------------------------------------------


def test_a_norm_read_by_a_nonlinearity_is_refused() -> None:
    net = Net(lambda m, x: m.a(m.n(x)) + F.silu(m.n(x)), n=norm(), a=linear())
    assert refusals(analyze(net)) == {"a.weight": "aten.silu (silu): no scale passes through aten.silu"}


def test_a_norm_read_by_the_residual_is_refused() -> None:
    def compute(m: Net, x: Tensor) -> Tensor:
        h = m.n(x)
        return x + m.a(h) + h

    analysis = analyze(Net(compute, n=norm(), a=linear()))
    assert refusals(analysis) == {"a.weight": "aten.add (add_1): is added to add, which is not scaled along"}


def test_a_norm_that_is_also_an_output_is_refused() -> None:
    def compute(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        h = m.n(x)
        return m.a(h), h

    analysis = awqc.analyze(Net(compute, n=norm(), a=linear()), inputs())
    assert refusals(analysis) == {"a.weight": "output (output): the model's output would change"}


def test_a_tied_embedding_that_would_have_to_change_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.n, self.head = nn.Embedding(10, WIDTH), norm(), linear(WIDTH, 10)
            self.head.weight = self.embed.weight

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.n(self.embed(input_ids)))

    analysis = awqc.analyze(Tied(), torch.arange(6)[None])
    assert analysis.groups == []
    assert refusals(analysis) == {
        "embed.weight": "its weight is also read by aten.embedding (embedding), which would change: "
        "aten.layer_norm (layer_norm): a normalization mixes all its channels"
    }


def test_a_bias_that_is_a_buffer_does_not_join() -> None:
    net = Net(
        lambda m, x: m.b(F.linear(x, m.a.weight, m.bias)), a=linear(), bias=torch.ones(WIDTH), b=linear()
    )
    assert refusals(analyze(net))["b.weight"] == "aten.linear (linear): the bias bias is not scaled along"


def test_a_buffer_absorbs_no_scale() -> None:
    net = Net(lambda m, x: m.a(x * m.gain), gain=torch.full((WIDTH,), 2.0), a=linear())
    assert refusals(analyze(net)) == {"a.weight": "aten.mul (mul): no parameter scales its result"}


def test_a_constant_in_the_forward_absorbs_no_scale() -> None:
    net = Net(lambda m, x: m.a(x * torch.tensor([2.0] * WIDTH)), a=linear())
    assert refusals(analyze(net)) == {"a.weight": "aten.mul (mul): no parameter scales its result"}


def test_a_computed_bias_does_not_join() -> None:
    net = Net(lambda m, x: m.b(F.linear(x, m.a.weight, m.a.bias.tanh())), a=linear(bias=True), b=linear())
    assert refusals(analyze(net))["b.weight"] == "aten.linear (linear): the bias tanh is not scaled along"


def test_an_unknown_op_is_refused_by_name() -> None:
    net = Net(lambda m, x: m.b(m.a(x).cosh()), a=linear(), b=linear())
    assert refusals(analyze(net))["b.weight"] == "aten.cosh (cosh): no scale passes through aten.cosh"


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        (lambda h: h + h.flip(-1), "aten.add (add): channels scaled by different factors are added"),
        (lambda h: h * h.roll(1, -1), "aten.mul (mul): another factor is scaled already"),
        (lambda h: h + h.square(), "aten.add (add): channels scaled by different factors are added"),
        (lambda h: h + 1.5, "aten.add (add): the constant 1.5 is added"),
        (lambda h: h.clamp(max=6), "aten.clamp (clamp): clamps to [None, 6]"),
        (lambda h: h.mean(-1, True) + h, "aten.mean (mean): sums over channels that carry different scales"),
        (lambda h: h.masked_fill(h > 1, 0.0), "aten.gt (gt): is compared with 1, which is not scaled along"),
    ],
)
def test_channels_that_disagree_are_refused(mix: object, reason: str) -> None:
    net = Net(lambda m, x: m.a(mix(m.n(x))), n=norm(), a=linear())
    assert refusals(analyze(net)) == {"a.weight": reason}


def test_one_weight_cannot_undo_two_layouts() -> None:
    net = Net(lambda m, x: m.a(m.n(x)) + m.a(m.n(x).flip(-1)), n=norm(), a=linear())
    assert refusals(analyze(net)) == {
        "a.weight": "aten.linear (linear_1): the weight that reads it is scaled otherwise"
    }


def test_a_weight_used_on_its_own_result_is_refused() -> None:
    net = Net(lambda m, x: m.a(m.a(m.n(x))), n=norm(), a=linear())
    assert refusals(analyze(net)) == {
        "a.weight": "aten.linear (linear_1): the channels that are summed carry different scales"
    }


def test_a_weight_shared_with_an_unscaled_reader_is_refused() -> None:
    net = Net(lambda m, x: m.a(m.n(x)) + m.a(x), n=norm(), a=linear())
    assert refusals(analyze(net)) == {
        "a.weight": "aten.linear (linear_1): the channels that are summed carry different scales"
    }


def test_a_scale_that_differs_from_token_to_token_is_refused() -> None:
    net = Net(lambda m, x: m.a(x * m.gain), gain=nn.Parameter(torch.ones(3, 1)), a=linear())
    assert refusals(analyze(net)) == {
        "a.weight": "aten.linear (linear): its scale differs from token to token"
    }


def test_a_parameter_is_scaled_along_the_axis_that_a_linear_can_undo() -> None:
    net = Net(lambda m, x: m.a(x * m.gain), gain=nn.Parameter(torch.ones(3, WIDTH)), a=linear())
    analysis = analyze(net)
    assert members(analysis) == {"gain": ("a.weight",)}
    assert analysis.groups[0].producers[0].ids.tolist() == [list(range(WIDTH))]


def test_a_mutated_view_stops_the_channels_it_holds() -> None:
    def compute(m: Net, x: Tensor) -> Tensor:
        h = m.n(x)
        h[..., :2] = x[..., :2]
        return m.a(h)

    group = the_group(analyze(Net(compute, n=norm(), a=linear())).linears, "a.weight")
    assert group.alive.tolist() == [False] * 2 + [True] * 6
    assert [str(r) for r in group.refused] == ["aten.copy_ (copy_): no scale passes through aten.copy_"]


def test_dropout_that_is_active_would_be_refused() -> None:
    net = Net(lambda m, x: m.a(F.dropout(m.n(x), 0.5, training=True)), n=norm(), a=linear())
    found = awqc.analyze(net, inputs())
    assert found.capture.rung == "eager"
    assert "differs from eager" in found.capture.notes[0]
    assert found.groups == []


# -- proven ----------------------------------------------------------------------------------------------


def test_the_proof_names_the_group_that_is_wrong() -> None:
    net = Net(lambda m, x: m.b(m.a(m.n(x)).relu()), n=norm(), a=linear(), b=linear())
    analysis = analyze(net)
    good, bad = analysis.groups
    with pytest.raises(VerifyError) as error:
        prove(analysis.graph, [good, replace(bad, consumers=())], inputs())
    assert "folding scale group 'a.weight' changes the model's output by " in str(error.value)
    assert fold_error(net, analysis) < 1e-12
