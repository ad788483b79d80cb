"""Capture: names, ties, buffers, constants; the module is not touched; frozen values are noticed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import awqc
from awqc.capture import CaptureReport, capture, check_against_eager
from awqc.errors import CaptureError, ConfigError
from awqc.functional import functionalize
from awqc.graph import Graph
from awqc.passes.canonicalize import Canonicalize
from awqc.storage.source import from_module
from awqc.views import is_parameter, linears
from tests.golden.compare import check_golden
from tests.nets import WIDTH, Net, inputs, linear, norm, refusals
from tests.zoo.models import build, token_ids


def graph_of(module: nn.Module, **batch: Tensor) -> Graph:
    return capture(from_module(module), batch or inputs())


def llama(layers: int = 1, **settings: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )


# -- names -----------------------------------------------------------------------------------------------


def test_the_graph_of_a_small_llama_is_the_golden_text() -> None:
    """Other versions of torch and transformers write other ops, so these alone are compared."""
    versions = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    if not versions.startswith("torch 2.13.0, transformers 5.23"):
        pytest.skip(f"the golden graph was written with torch 2.13.0 and transformers 5.23, not {versions}")
    graph = graph_of(transformers.LlamaForCausalLM(llama()), input_ids=torch.arange(6)[None])
    Canonicalize().run(graph, awqc.context.Context(awqc.QuantConfig()))
    check_golden("llama_graph.txt", graph.text())


def test_the_text_is_the_same_each_time() -> None:
    module = transformers.LlamaForCausalLM(llama())
    texts = {graph_of(module, input_ids=torch.arange(6)[None]).text() for _ in range(2)}
    assert len(texts) == 1


def test_tied_tensors_are_one_parameter_under_their_first_name() -> None:
    module = transformers.LlamaForCausalLM(llama(tie_word_embeddings=True))
    graph = graph_of(module, input_ids=torch.arange(6)[None])
    assert graph.weights.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    names = list(graph.parameters())
    assert names.count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in names
    assert [view.parameter for view in linears(graph)][-1] == "model.embed_tokens.weight"


def test_one_module_under_two_names_is_one_parameter() -> None:
    shared = linear()
    graph = graph_of(Net(lambda m, x: m.b(m.a(x)), a=shared, b=shared))
    assert list(graph.parameters()) == ["a.weight"]
    assert [view.parameter for view in linears(graph)] == ["a.weight", "a.weight"]


def test_buffers_that_are_not_stored_are_read_like_others() -> None:
    net = Net(lambda m, x: m.a(x) * m.factor, a=linear())
    net.register_buffer("factor", torch.tensor(3.0), persistent=False)
    assert "factor" not in net.state_dict()
    graph = graph_of(net)
    assert "factor" in graph.parameters()
    assert not is_parameter(graph.parameters()["factor"])
    assert check_against_eager(graph, net, {"inputs": inputs()})[0][1] == 0.0


def test_a_plain_tensor_attribute_is_a_constant() -> None:
    net = Net(lambda m, x: m.a(x) * m.table, a=linear())
    net.table = torch.arange(8.0)
    graph = graph_of(net)
    assert torch.equal(graph.weights["table"], torch.arange(8.0))
    assert not is_parameter(graph.parameters()["table"])


def test_outputs_that_are_no_tensors_are_left_out() -> None:
    net = Net(lambda m, x: {"y": m.a(x), "nothing": None, "three": 3, "same": x}, a=linear())
    graph = graph_of(net)
    assert len(graph.run(inputs())) == 2
    check_against_eager(graph, net, {"inputs": inputs()})


# -- the module ------------------------------------------------------------------------------------------


def state(module: nn.Module) -> dict[str, Any]:
    """Everything a capture could leave behind: tensors by identity and value, attributes, modes."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        "identity": {name: id(tensor) for name, tensor in tensors.items()},
        "attributes": {name: sorted(child.__dict__) for name, child in module.named_modules()},
        "modes": {name: child.training for name, child in module.named_modules()},
    }


def counting(m: Net, x: Tensor) -> Tensor:
    """A forward that keeps things on its module: a cache, a new buffer and a count."""
    m.cached = m.a(x)
    m.count.add_(1)
    if not hasattr(m, "late"):
        m.register_buffer("late", m.cached.sum())
    return m.cached * m.count


def failing(m: Net, x: Tensor) -> Tensor:
    m.cached = m.a(x)
    raise ValueError("no such thing")


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_capture_and_analysis_leave_the_module_as_it_was() -> None:
    net = Net(counting, a=linear(), count=torch.ones(1))
    net.train()
    net.a.eval()
    before, values = state(net), {n: t.clone() for n, t in net.state_dict().items()}
    awqc.analyze(net, inputs())
    assert state(net) == before
    assert all(torch.equal(values[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_a_capture_that_fails_leaves_the_module_as_it_was() -> None:
    net = Net(failing, a=linear())
    before = state(net)
    with pytest.raises(CaptureError) as error:
        graph_of(net)
    assert str(error.value) == (
        "Net does not run on such inputs: ValueError: no such thing; give inputs that its forward takes"
    )
    assert state(net) == before


def test_inputs_are_left_as_they_were() -> None:
    batch = inputs()
    awqc.analyze(Net(lambda m, x: m.a(x.add_(1)), a=linear()), batch)
    assert torch.equal(batch["x"], inputs()["x"])


# -- models without weights ------------------------------------------------------------------------------


def test_a_model_on_meta_is_captured_like_one_with_weights() -> None:
    real = build("llama")
    with torch.device("meta"):
        module = type(real)(real.config)
    graph = graph_of(module, input_ids=token_ids())
    assert graph.text() == graph_of(real, input_ids=token_ids()).text()
    with pytest.raises(ConfigError) as error:
        graph.weights["lm_head.weight"]
    assert str(error.value) == (
        "parameter 'lm_head.weight' is on the meta device and has no values: awqc.analyze accepts such a "
        "model, awqc.compile needs one with weights or a checkpoint directory"
    )


def test_weights_are_read_when_they_are_needed() -> None:
    source = from_module(Net(lambda m, x: m.b(m.a(x)), a=linear(), b=linear()))
    read, asked = source.read, []

    def recording(name: str) -> Tensor:
        asked.append(name)
        return read(name)

    source.read = recording
    graph = capture(source, inputs())
    assert asked == []
    graph.run(inputs())
    assert asked == ["a.weight", "b.weight"]


# -- frozen values ---------------------------------------------------------------------------------------


def test_the_report_says_what_was_compared() -> None:
    analysis = awqc.analyze(Net(lambda m, x: m.a(x), a=linear()), inputs())
    assert analysis.capture == CaptureReport(
        "torch.export", checks=[("inputs", 0.0), ("reversed", 0.0)], notes=[]
    )


def frozen(m: Net, x: Tensor) -> Tensor:
    """Right on the example input, whatever is traced; wrong on another."""
    rising = torch.compiler.is_exporting() or bool(x[0, 0, 0] < x[1, 0, 0])
    return m.a(x) if rising else m.a(x) * 2


RISING = {"x": torch.arange(float(2 * WIDTH)).reshape(2, 1, WIDTH)}


def test_a_branch_that_tracing_froze_is_caught_on_the_second_input() -> None:
    net = Net(frozen, a=linear())
    graph = capture(from_module(net), RISING, rung="torch.export")
    with pytest.raises(CaptureError) as error:
        check_against_eager(graph, net, {"falling": {"x": RISING["x"].flip(0)}})
    assert re.fullmatch(
        r"the captured graph differs from eager execution on falling: relative error 5\.0e-01, rounding "
        r"explains \d\.\de-05; the forward depends on values that tracing froze",
        str(error.value),
    )


def test_a_graph_that_is_wrong_on_the_second_input_is_not_taken() -> None:
    found = awqc.analyze(Net(frozen, a=linear()), RISING).capture
    assert found.rung == "eager"
    assert found.notes[0].startswith("torch.export: the captured graph differs from eager execution on ")
    assert [error for _, error in found.checks] == [0.0, 0.0]


def test_a_branch_on_values_cannot_be_traced() -> None:
    net = Net(lambda m, x: m.a(x) if x.sum() > 0 else x, a=linear())
    with pytest.raises(CaptureError, match=r"^Net could not be traced by torch.export: GuardOnDataDependent"):
        capture(from_module(net), inputs(), rung="torch.export")


def test_a_region_of_another_precision_is_refused() -> None:
    def compute(m: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.a(x)

    with pytest.raises(CaptureError) as error:
        capture(from_module(Net(compute, a=linear())), inputs(), rung="torch.export")
    assert str(error.value) == (
        "the forward holds a region that awqc does not look into: wrap_with_autocast (linear); remove "
        "torch.autocast from the forward"
    )


# -- in-place ops ----------------------------------------------------------------------------------------


def ops(graph: Graph) -> list[str]:
    return [str(n.target).removeprefix("aten.") for n in graph.nodes if n.op == "call_function"]


def write_chunk(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    h.chunk(2, dim=-1)[1].add_(1)
    return h * 2


def write_view(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    h[..., :2] = 0.0
    return h * 2


def write_after_reading(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    kept = h * 2
    return h.relu_() + kept


def read_view_after_writing(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    view = h[..., :4]
    h.relu_()
    return view


def write_constant(m: Net, x: Tensor) -> Tensor:
    offset = torch.tensor([1.0] * WIDTH)
    offset += x.sum((0, 1))
    return m.a(x) + offset


def write_constant_view(m: Net, x: Tensor) -> Tensor:
    offset = torch.tensor([1.0] * WIDTH)
    offset[2:4] = x.sum()
    return m.a(x) + offset


@pytest.mark.parametrize(
    ("compute", "stays"),
    [
        (lambda m, x: m.a(x).relu_().mul_(2).add_(x), False),
        (write_after_reading, False),
        (write_chunk, True),
        (write_view, True),
        (read_view_after_writing, True),
        (write_constant, False),
        (write_constant_view, True),
    ],
)
def test_in_place_ops_go_where_nothing_else_sees_what_they_write(compute: Any, stays: bool) -> None:
    net = Net(compute, a=linear())
    graph = graph_of(net)
    assert any(op.split(".")[0].endswith("_") for op in ops(graph)) == stays
    batches = {"inputs": inputs(), "again": inputs(), "others": {"x": -inputs()["x"]}}
    check_against_eager(graph, net, batches)
    Canonicalize().run(graph, awqc.context.Context(awqc.QuantConfig()))
    check_against_eager(graph, net, batches)


def test_a_forward_that_writes_into_part_of_a_buffer_is_refused() -> None:
    def compute(m: Net, x: Tensor) -> Tensor:
        m.memory[:2] = x[0, 0, :2]
        return m.a(x) * m.memory

    net = Net(compute, a=linear(), memory=torch.ones(WIDTH))
    with pytest.raises(CaptureError) as error:
        capture(from_module(net), inputs(), rung="torch.export")
    assert str(error.value) == (
        "the forward writes into 'memory' through aten.copy_.default (copy_), which would change what the "
        "next call starts from: write into a copy"
    )


def test_functionalizing_twice_changes_nothing() -> None:
    graph = graph_of(Net(lambda m, x: m.b(m.a(m.n(x)).relu_()), n=norm(), a=linear(), b=linear()))
    text = graph.text()
    functionalize(graph)
    assert graph.text() == text


def test_a_branch_that_stays_in_place_is_refused_by_name() -> None:
    def compute(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        view = h[..., :4]
        h.relu_()
        return m.b(torch.cat([view, view], dim=-1))

    found = refusals(awqc.analyze(Net(compute, a=linear(), b=linear()), inputs()))
    assert found["b.weight"] == "aten.relu_ (relu_): no scale passes through aten.relu_"
