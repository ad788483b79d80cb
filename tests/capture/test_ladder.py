"""Each rung of the ladder on a module that needs it: the same Graph, equal to eager, and what is reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import awqc
from awqc.capture import capture, relative_error
from awqc.capture.regions import in_float64
from awqc.capture.scans import longest, reads_steps
from awqc.errors import CaptureError
from awqc.graph import Graph
from awqc.storage.source import from_module
from awqc.views import linears
from tests.nets import WIDTH, Net, inputs, linear, norm

IDS = torch.randint(3, 64, (1, 16), generator=torch.Generator().manual_seed(0))


class Picky(nn.Module):
    """Runs only the rows that are positive, one by one: a loop that no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index in (x.sum(-1) > 0).nonzero():
            row = tuple(index)
            out[row] = self.inner(x[row])
        return out


class Glued(nn.Module):
    """A forward that branches on values between two blocks that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(), block()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if h.abs().max() < 1e9:
            h = h * 2
        return self.second(h)


def block() -> nn.Module:
    return nn.Sequential(norm(), linear(), nn.ReLU(), linear())


def analyzed(module: nn.Module, **batch: Tensor) -> awqc.Analysis:
    found = awqc.analyze(module, batch or inputs())
    assert all(error < 1e-4 for _, error in found.capture.checks)
    assert len(found.capture.checks) == 2
    return found


def test_a_module_that_needs_values_becomes_a_region() -> None:
    net = Net(
        lambda m, x: m.b(m.a(m.n(x)).relu()) + m.picky(x), n=norm(), a=linear(), b=linear(), picky=Picky()
    )
    found = analyzed(net)
    assert found.capture.rung == "torch.export with regions"
    assert found.capture.notes[0].startswith("torch.export: Net could not be traced by torch.export: ")
    assert found.capture.notes[-1] == "run as they are: all modules of class Picky"
    assert [g.linears for g in found.groups] == [("a.weight",), ("b.weight",)]
    assert found.prove(inputs()) < 1e-9


def test_a_linear_in_a_region_is_seen_and_has_a_reason() -> None:
    found = analyzed(Net(lambda m, x: m.picky(m.a(x)), a=linear(), picky=Picky()))
    assert set(found.linears) == {"a.weight", "picky.inner.weight"}
    assert "no scale passes through" in str(found.linears["picky.inner.weight"])
    assert [view.parameter for view in linears(found.graph)] == ["a.weight", "picky.inner.weight"]


def test_a_region_runs_on_the_weights_that_the_graph_has() -> None:
    net = Net(lambda m, x: m.picky(x), picky=Picky())
    graph = capture(from_module(net), inputs(), rung="eager")
    before = graph.run(inputs())[0]
    graph.weights["picky.inner.weight"] = 2 * graph.weights["picky.inner.weight"]
    assert relative_error(graph.run(inputs())[0], 2 * before) < 1e-6


def test_a_region_is_as_precise_as_the_graph() -> None:
    """So that a proof in float64 can go through one, whatever its forward casts to."""

    def compute(m: Net, x: Tensor) -> Tensor:
        return m.a(x.float() if x.sum() > 0 else x.to(torch.float32))

    graph = capture(from_module(Net(compute, a=linear())), inputs(), rung="eager").retyped(torch.float64)
    x = inputs()["x"].double()
    assert graph.run({"x": x})[0].dtype == torch.float64
    expected = F.linear(x, graph.weights["a.weight"])
    assert relative_error(graph.run({"x": x})[0], expected) < 1e-15


def test_a_mask_that_the_forward_would_make_up_is_given_to_it() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a = nn.Embedding(64, WIDTH), linear()

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            if attention_mask is None:  # what tracing freezes
                even = torch.compiler.is_exporting() or False
                attention_mask = torch.zeros_like(input_ids) if even else torch.ones_like(input_ids)
            return self.a(self.embed(input_ids) * attention_mask[..., None])

    found = analyzed(Masked(), input_ids=IDS)
    assert found.capture.rung == "torch.export with attention_mask"
    assert [str(n.target) for n in found.graph.inputs] == ["input_ids"]


def test_what_can_be_traced_is_a_piece() -> None:
    found = analyzed(Glued())
    assert found.capture.rung == "pieces"
    assert "2 calls of modules traced, 1 forwards run as they are" in found.capture.notes
    assert [g.linears for g in found.groups] == [
        (f"{name}.{i}.weight",) for name in ("first", "second") for i in (1, 3)
    ]
    assert found.prove(inputs()) < 1e-9


@pytest.mark.filterwarnings("ignore:Converting a tensor")
def test_a_tape_is_for_analysis() -> None:
    def compute(m: Net, x: Tensor) -> Tensor:
        h = F.relu(F.linear(m.n(x), m.a.weight))
        return F.linear(h, m.b.weight) if float(h.max()) < 1e9 else h

    net = Net(compute, n=norm(), a=linear(), b=linear())
    graph = capture(from_module(net), inputs(), purpose="analyze", rung="tape")
    assert relative_error(graph.run(inputs())[0], net(**inputs())) < 1e-6
    with pytest.raises(CaptureError, match=r"^there is no rung 'tape' to compile with$"):
        capture(from_module(net), inputs(), purpose="compile", rung="tape")


def test_without_a_graph_linears_are_still_quantized() -> None:
    class Wild(nn.Module):
        """Draws at random on its way."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a, self.b = nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 64)

        def forward(self, input_ids: Tensor) -> Tensor:
            h = self.a(self.embed(input_ids))
            return self.b(h + torch.randn_like(h) * 0.1)

    torch.manual_seed(0)
    compiled = awqc.compile(Wild(), IDS.repeat(4, 1), config=awqc.QuantConfig(group_size=32))
    assert compiled.report.capture["rung"] == "eager"
    assert {row.name for row in compiled.report.quantized()} == {"a", "b"}
    assert set(compiled.quantized_linears()) == {"a", "b"}
    for row in compiled.report.quantized():
        assert row.error is not None
        assert row.nearest_error is not None
        assert 0 < row.error <= row.nearest_error


def test_a_model_that_does_not_run_is_an_error() -> None:
    with pytest.raises(CaptureError) as error:
        awqc.analyze(Net(lambda m, x: m.a(x[..., :2]), a=linear()), inputs())
    assert str(error.value) == (
        "Net does not run on such inputs: RuntimeError: mat1 and mat2 shapes cannot be multiplied (6x2 and "
        "8x8); give inputs that its forward takes"
    )


@pytest.mark.parametrize("failing", ["torch.export", "torch.export with regions"])
def test_a_model_on_meta_climbs_too(failing: str) -> None:
    with torch.device("meta"):
        net = Net(lambda m, x: m.picky(m.a(x)), a=nn.Linear(WIDTH, WIDTH), picky=Picky())
    found = awqc.analyze(net, inputs())
    assert found.capture.rung == "torch.export with regions"
    assert found.capture.checks == []


# -- loops over time ---------------------------------------------------------------------------------------


def scan(m: Any, x: Tensor) -> Tensor:
    state, states = torch.zeros_like(x[:, 0]), []
    for step in range(x.shape[1]):
        state = state * 0.5 + x[:, step]
        states.append(state)
    return m.a(torch.stack(states, dim=1))


def graph_of_scan(steps: int, compute: Any = scan) -> Graph:
    return capture(from_module(Net(compute, a=linear())), {"x": torch.randn(1, steps, WIDTH)})


def test_a_loop_over_time_is_noticed() -> None:
    assert reads_steps(graph_of_scan(16), 16)
    assert not reads_steps(graph_of_scan(16, lambda m, x: m.a(x) + x[:, :1] + x[:, 3]), 16)


def test_how_long_a_sequence_may_be_follows_from_two_lengths() -> None:
    assert longest((16, 400), (24, 400), 512) == 512
    assert longest((16, 400), (24, 480), 512) == 512
    assert longest((16, 2400), (24, 3600), 512) == 16 + (20_000 - 2400) // 150


def test_a_long_loop_is_calibrated_in_short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    import awqc.capture.scans

    monkeypatch.setattr(awqc.capture.scans, "LARGEST", 1200)
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2)
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config)
    ids = torch.randint(0, 64, (4, 96), generator=torch.Generator().manual_seed(0))
    report = awqc.compile(model, ids, config=awqc.QuantConfig(group_size=32)).report
    (note,) = [what for where, what in report.notes if where == "capture" and "loops over time" in what]
    assert "calibrated on pieces of " in note
    length = int(note.split()[-2])
    assert 16 < length < 96
    assert all(g.tokens + g.held_out_tokens == 4 * (96 // length) * length for g in report.groups.values())


class Sizes(nn.Module):
    """How many rows each expert serves, as numbers: its results are no tensors alone."""

    def forward(self, chosen: Tensor) -> list[int]:
        counted: list[int] = torch.bincount(chosen, minlength=2).tolist()
        return counted


class Dealer(nn.Module):
    """Experts on pieces whose sizes another module has counted. Its first argument has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.sizes = linear(outputs=2), Sizes()
        self.experts = nn.ModuleList([linear(), linear()])

    def forward(me, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen, order = me.router(flat).argmax(-1).sort()
        pieces = flat[order].split(me.sizes(chosen))
        served = torch.cat([expert(piece) for expert, piece in zip(me.experts, pieces, strict=True)])
        return torch.zeros_like(flat).index_copy(0, order, served).view(x.shape)


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = linear(), linear()

    def forward(this, x: Tensor) -> Tensor:
        return this.left(x) if x.sum() > 0 else this.right(x)


def around(body: nn.Module) -> Net:
    """``body`` in the middle of a block, with linears before and after it that have groups."""

    def compute(m: Net, x: Tensor) -> Tensor:
        x = x + m.second(torch.relu(m.first(m.norm(x))))
        return m.last(m.final(x + m.body(x)))

    return Net(compute, norm=norm(), first=linear(), second=linear(), body=body, final=norm(), last=linear())


@pytest.mark.parametrize("kind", [Dealer, Fork])
def test_a_region_is_the_smallest_module_that_holds_the_values(kind: type[nn.Module]) -> None:
    found = awqc.analyze(around(kind()), inputs())
    assert found.capture.rung == "torch.export with regions"
    assert found.capture.notes[-1] == f"run as they are: all modules of class {kind.__name__}"
    grouped = {name for group in found.groups for name in group.linears}
    assert grouped == {"first.weight", "second.weight", "last.weight"}
    assert found.prove(inputs()) < 1e-9


def test_a_grouped_product_in_a_region_is_as_precise_as_a_proof() -> None:
    """torch's own knows no float64."""
    x, stack = torch.randn(6, 16), torch.randn(2, 24, 16)
    ends = torch.tensor([2, 6], dtype=torch.int32)
    expected = torch.cat([x[:2].double() @ stack[0].double().t(), x[2:].double() @ stack[1].double().t()])
    with in_float64():
        found = F.grouped_mm(x.double(), stack.double().mT, offs=ends)
    assert relative_error(found, expected) < 1e-15


@pytest.mark.parametrize("kind", [Dealer, Fork])
def test_a_root_that_needs_values_is_analyzed_all_the_same(kind: type[nn.Module]) -> None:
    found = awqc.analyze(kind(), inputs())
    assert found.groups == []
    assert found.linears


def test_linears_under_vmap_are_seen_with_all_their_rows() -> None:
    def compute(m: Net, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: m.second(torch.relu(m.first(row))), in_dims=1, out_dims=1)(x)

    class Mapped(Net):
        """A class of its own, since a region is made of all modules of a class."""

    body = Mapped(compute, first=linear(), second=linear())
    found = awqc.analyze(around(body), inputs())
    assert {"body.first.weight", "body.second.weight"} <= set(found.linears)
    assert len(found.groups) == 3
    compiled = awqc.compile(around(body), [inputs()] * 2, config=awqc.QuantConfig(bits=8, group_size=WIDTH))
    with torch.no_grad():
        assert relative_error(compiled(**inputs()), around(body)(**inputs())) < 0.05


def test_masked_positions_of_an_encoder_do_not_stop_a_trace() -> None:
    """The second way that nn.TransformerEncoder has of running is left out of account."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    padding = torch.tensor([[False, False, False], [False, False, True]])
    found = awqc.analyze(encoder, {"src": inputs()["x"], "src_key_padding_mask": padding})
    assert found.capture.rung == "torch.export"
    assert "layers.0.self_attn.in_proj_weight" in found.linears
    assert torch.backends.mha.get_fastpath_enabled()
