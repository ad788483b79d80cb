"""End to end: a model in, a quantized model out that behaves like it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

import awqc
from awqc import CompiledModel, Pipeline, QuantConfig, Report, Scheme
from awqc.capture import relative_error
from awqc.passes.clip_weights import ClipWeights
from awqc.runtime.linear import QuantLinear
from tests.models import gpt2, llama, qwen2, ragged_llama

CONFIG = QuantConfig(group_size=32)


def compiled_from(model: Any, ids: Tensor, **options: Any) -> CompiledModel:
    return awqc.compile(model, ids, **{"backend": "reference", "config": CONFIG, **options})


@pytest.fixture(scope="module")
def compiled(tiny_llama: LlamaForCausalLM, token_ids: Tensor) -> CompiledModel:
    """``tiny_llama`` in 4 bits, groups of 32, on the reference backend. Not to be changed."""
    return compiled_from(tiny_llama, token_ids)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids).logits
    return result


def dense_twin(model: CompiledModel, original: nn.Module) -> nn.Module:
    """``original`` with every tensor of ``model``, quantized weights dequantized: what the compiled model
    has to compute, by the code of the original."""
    twin, state = copy.deepcopy(original), dict(model.state_dict())
    for name, linear in model.quantized_linears().items():
        for part in dict(linear.named_buffers()):
            state.pop(f"{name}.{part}", None)
        weight, bias = linear.unpack()
        stored = twin.get_submodule(name).weight
        dense = weight.dequantize(stored.dtype)
        state[f"{name}.weight"] = dense if dense.shape == stored.shape and not _conv(twin, name) else dense.T
        if bias is not None:
            state[f"{name}.bias"] = bias
    twin.load_state_dict(state)
    return twin


def _conv(model: nn.Module, name: str) -> bool:
    return type(model.get_submodule(name)).__name__ == "Conv1D"


#: Every linear rounds its sums of up to 128 products; errors add up over two layers of linears.
ROUNDING = 128 * torch.finfo(torch.float32).eps


# -- the model ---------------------------------------------------------------------------------------------


def test_it_is_a_model_of_the_same_kind(compiled: CompiledModel, tiny_llama: LlamaForCausalLM) -> None:
    assert isinstance(compiled, LlamaForCausalLM)
    assert isinstance(compiled, CompiledModel)
    assert type(compiled).__name__ == "LlamaForCausalLM"
    assert compiled.config is tiny_llama.config or compiled.config.to_dict() == tiny_llama.config.to_dict()
    assert not compiled.training


def test_every_linear_but_the_head_is_quantized(compiled: CompiledModel) -> None:
    linears = [n for n, m in compiled.named_modules() if isinstance(m, nn.Linear)]
    assert linears == ["lm_head"]
    assert len(compiled.quantized_linears()) == 2 * 7
    assert {m.scheme for m in compiled.quantized_linears().values()} == {Scheme(4, 32)}


def test_it_computes_what_its_weights_say(
    compiled: CompiledModel, tiny_llama: LlamaForCausalLM, token_ids: Tensor
) -> None:
    want = logits(dense_twin(compiled, tiny_llama), token_ids)
    assert relative_error(logits(compiled, token_ids), want) <= ROUNDING


def test_it_stays_close_to_the_original(
    compiled: CompiledModel, tiny_llama: LlamaForCausalLM, token_ids: Tensor
) -> None:
    """The relative error of 4-bit rounding is about 2**-4 a weight and averages out; 8 bits are 16 times
    better."""
    want = logits(tiny_llama, token_ids)
    four = relative_error(logits(compiled, token_ids), want)
    eight = compiled_from(tiny_llama, token_ids, config=QuantConfig(bits=8, group_size=32))
    assert 2**-10 < four < 2**-2
    assert relative_error(logits(eight, token_ids), want) < four / 8


def test_the_original_is_not_touched(token_ids: Tensor) -> None:
    model = llama().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {name: type(module) for name, module in model.named_modules()}
    compiled_from(model, token_ids)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_generate_with_a_cache_and_without(compiled: CompiledModel, token_ids: Tensor) -> None:
    prompt = token_ids[:2, :6]
    options: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    cached = compiled.generate(prompt, **options)
    assert cached.shape == (2, 14)
    assert torch.equal(compiled.generate(prompt, use_cache=False, **options), cached)
    # Token by token, by the logits of whole sequences.
    steps = prompt
    for _ in range(8):
        steps = torch.cat([steps, logits(compiled, steps)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, steps)


def test_the_state_goes_through_a_file(
    compiled: CompiledModel, tiny_llama: LlamaForCausalLM, token_ids: Tensor
) -> None:
    file = io.BytesIO()
    torch.save(compiled.state_dict(), file)
    file.seek(0)
    # A compiled model shares what it did not change with its original, which is not to be written to.
    original = copy.deepcopy(tiny_llama)
    other = compiled_from(original, token_ids.flip(0), config=QuantConfig(group_size=32, seed=1))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(logits(other, token_ids), logits(compiled, token_ids))


def test_a_deep_copy_is_a_compiled_model(compiled: CompiledModel, token_ids: Tensor) -> None:
    twin = copy.deepcopy(compiled)
    assert torch.equal(logits(twin, token_ids), logits(compiled, token_ids))
    twin.model.layers[0].self_attn.q_proj.codes.zero_()
    assert not torch.equal(logits(twin, token_ids), logits(compiled, token_ids))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_graph_computes_what_the_modules_compute(
    backend: str, tiny_llama: LlamaForCausalLM, token_ids: Tensor
) -> None:
    model = compiled_from(tiny_llama, token_ids, backend=backend)
    with torch.no_grad():
        found = model.graph(token_ids[3:4])[0]
    assert relative_error(found, logits(model, token_ids[3:4])) <= ROUNDING
    # And with the very same tensors: a change to one is a change to both.
    held = dict(model.graph.named_buffers()) | dict(model.graph.named_parameters())
    own = dict(model.named_buffers()) | dict(model.named_parameters())
    shared = [name for name in held if name in own]
    assert len(shared) > 2 * 7 * 2
    assert all(held[name].data_ptr() == own[name].data_ptr() for name in shared)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_torch_compile_of_the_whole_model(
    backend: str, tiny_llama: LlamaForCausalLM, token_ids: Tensor
) -> None:
    model = compiled_from(tiny_llama, token_ids, backend=backend)
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = logits(whole, token_ids[:1])
    assert relative_error(found, logits(model, token_ids[:1])) <= ROUNDING


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_stays_in_it(
    dtype: torch.dtype, tiny_llama: LlamaForCausalLM, token_ids: Tensor
) -> None:
    model = copy.deepcopy(tiny_llama).to(dtype)
    compiled = compiled_from(model, token_ids)
    assert {p.dtype for p in compiled.parameters()} == {dtype}
    found = logits(compiled, token_ids)
    assert found.dtype == dtype
    want = logits(dense_twin(compiled, model), token_ids)
    # Activations are rounded after each of some twenty ops a layer, in either model.
    assert relative_error(found, want) <= 64 * torch.finfo(dtype).eps


def test_the_same_call_gives_the_same_bits(
    compiled: CompiledModel, tiny_llama: LlamaForCausalLM, token_ids: Tensor
) -> None:
    again = compiled_from(tiny_llama, token_ids)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, compiled.state_dict()[name]), name


# -- the report --------------------------------------------------------------------------------------------


def test_every_linear_of_the_model_has_a_row_with_a_decision(
    compiled: CompiledModel, tiny_llama: LlamaForCausalLM
) -> None:
    rows = {row.name: row for row in compiled.report.linears.values()}
    assert set(rows) == {n for n, m in tiny_llama.named_modules() if isinstance(m, nn.Linear)}
    for name, row in rows.items():
        linear = tiny_llama.get_submodule(name)
        assert (row.out_features, row.in_features) == (linear.out_features, linear.in_features)
        if name == "lm_head":
            assert row.decision == "kept"
            assert row.reason == "computes the model's output (quantize_head=True quantizes it)"
            assert (row.error, row.backend, row.scheme) == (None, "", "")
        else:
            assert (row.decision, row.reason, row.scheme, row.backend) == (
                "quantized",
                "",
                "W4 g32 asym",
                "reference",
            )
            assert row.error is not None
            assert row.nearest_error is not None
            assert 0 < row.error <= row.nearest_error
            assert row.rounding in ("nearest", "compensated")
            assert row.group in compiled.report.groups


def test_the_groups_of_every_layer(compiled: CompiledModel) -> None:
    found = {name: row.linears for name, row in compiled.report.groups.items()}
    for i in range(2):
        layer = f"model.layers.{i}"
        attention = f"{layer}.self_attn"
        assert set(found[f"{layer}.input_layernorm.weight"]) == {f"{attention}.{x}_proj" for x in "qkv"}
        assert found[f"{attention}.v_proj.weight"] == [f"{attention}.o_proj"]
        assert set(found[f"{layer}.post_attention_layernorm.weight"]) == {
            f"{layer}.mlp.gate_proj",
            f"{layer}.mlp.up_proj",
        }
        assert found[f"{layer}.mlp.up_proj.weight"] == [f"{layer}.mlp.down_proj"]


def test_what_else_the_report_tells(compiled: CompiledModel, token_ids: Tensor) -> None:
    report = compiled.report
    assert report.capture["rung"] == "torch.export"
    assert [name for name, _ in report.capture["checks"]] == ["calibration", "reversed"]
    assert report.calibration["samples"] == 16
    assert report.calibration["tokens"] == token_ids.numel()
    assert report.config == CONFIG.as_dict()
    assert report.proof["relative_error"] <= 1e-9
    assert report.proof["groups"] == 2 * 4 + 1  # the last norm and the head, too
    assert {"read-calibration", "capture", *Pipeline.default().names()} <= set(report.seconds)
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    groups = weights // 32
    assert report.sizes["linears_before"] == 2 * weights
    # 4 bits a code and a zero point, 16 a scale.
    assert report.sizes["linears_after"] == weights // 2 + groups // 2 + 2 * groups


def test_the_report_goes_through_json(compiled: CompiledModel) -> None:
    text = compiled.report.to_json()
    assert Report.from_json(text).to_json() == text
    assert Report.from_json(text).linears == compiled.report.linears
    assert Report.from_json(text).groups == compiled.report.groups


# -- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "group_size", "zero_point"),
    [
        (2, 32, True),
        (3, 64, True),
        (4, -1, True),
        (4, 64, False),
        (5, 32, False),
        (6, -1, False),
        (7, 64, True),
        (8, 32, False),
    ],
)
def test_schemes(bits: int, group_size: int, zero_point: bool, token_ids: Tensor) -> None:
    """A sample of their combinations; their parts are tested one by one elsewhere."""
    model = ragged_llama()
    found = compiled_from(model, token_ids[:8], config=QuantConfig(bits, group_size, zero_point))
    assert {m.scheme for m in found.quantized_linears().values()} == {Scheme(bits, group_size, zero_point)}
    down = found.quantized_linears()["model.layers.0.mlp.down_proj"].unpack()[0]
    assert down.scales.shape == (64, {-1: 1, 32: 3, 64: 2}[group_size])
    assert int(down.codes.max()) <= 2**bits - 1
    if not zero_point:
        assert (down.zeros == 2 ** (bits - 1)).all()
    want = logits(dense_twin(found, model), token_ids)
    assert relative_error(logits(found, token_ids), want) <= ROUNDING


def test_more_bits_are_better(token_ids: Tensor) -> None:
    model = ragged_llama()
    want = logits(model, token_ids)
    errors = [
        relative_error(
            logits(compiled_from(model, token_ids[:8], config=QuantConfig(bits, 32)), token_ids), want
        )
        for bits in (2, 4, 8)
    ]
    assert errors[0] > 2 * errors[1] > 8 * errors[2]


def test_propagation(tiny_llama: LlamaForCausalLM, token_ids: Tensor) -> None:
    """The first stage sees the same either way; the later ones do not."""
    models = [
        compiled_from(tiny_llama, token_ids, config=QuantConfig(3, 32, propagate=propagate))
        for propagate in ("quantized", "float")
    ]
    first, last = "model.layers.0.self_attn.q_proj.codes", "model.layers.1.mlp.down_proj.codes"
    states = [m.state_dict() for m in models]
    assert torch.equal(states[0][first], states[1][first])
    assert not torch.equal(states[0][last], states[1][last])
    assert [m.report.config["propagate"] for m in models] == ["quantized", "float"]
    want = logits(tiny_llama, token_ids)
    for model in models:
        assert relative_error(logits(model, token_ids), want) < 0.5


def test_scales_pay_where_there_are_outliers(outlier_llama: LlamaForCausalLM, token_ids: Tensor) -> None:
    want = logits(outlier_llama, token_ids)
    config = QuantConfig(3, 64)
    plain = Pipeline.default().remove("search-scales").remove("fold-scales")
    without = compiled_from(outlier_llama, token_ids, config=config, pipeline=plain)
    found = compiled_from(outlier_llama, token_ids, config=config)
    norms = [row for name, row in found.report.groups.items() if "layernorm" in name]
    assert all(row.applied for row in norms)
    assert all(row.gain > 0.1 for row in norms)
    errors = [relative_error(logits(m, token_ids), want) for m in (without, found)]
    assert errors[1] < 0.9 * errors[0]


def test_linears_that_the_user_keeps(tiny_llama: LlamaForCausalLM, token_ids: Tensor) -> None:
    config = QuantConfig(group_size=32, keep=("*.down_proj", "model.layers.1.*"), quantize_head=True)
    model = compiled_from(tiny_llama, token_ids, config=config)
    kept = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    assert kept == {f"model.layers.1.self_attn.{x}_proj" for x in "qkvo"} | {
        f"model.layers.{i}.mlp.down_proj" for i in range(2)
    } | {f"model.layers.1.mlp.{x}_proj" for x in ("gate", "up")}
    reasons = {row.reason for row in model.report.linears.values() if row.decision == "kept"}
    assert reasons == {"matches keep pattern '*.down_proj'", "matches keep pattern 'model.layers.1.*'"}
    assert isinstance(model.lm_head, QuantLinear)
    # What is kept undoes the scales of its group like any other reader.
    want = logits(dense_twin(model, tiny_llama), token_ids)
    assert relative_error(logits(model, token_ids), want) <= ROUNDING


def test_a_head_that_is_tied_to_the_embedding_is_never_quantized(token_ids: Tensor) -> None:
    model = llama(tie_word_embeddings=True)
    found = compiled_from(model, token_ids, config=QuantConfig(group_size=32, quantize_head=True))
    row = found.report.linears["model.embed_tokens.weight"]
    assert row.decision == "kept"
    assert row.reason == "its weight is also read by embedding, so it must stay in float"
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_a_pipeline_of_one_s_own(
    compiled: CompiledModel, tiny_llama: LlamaForCausalLM, token_ids: Tensor
) -> None:
    pipeline = Pipeline.default().replace("clip-weights", ClipWeights(shrinks=(1.0,)))
    model = compiled_from(tiny_llama, token_ids, pipeline=pipeline)
    assert {row.clipped for row in model.report.quantized()} == {0.0}
    assert {row.clipped for row in compiled.report.quantized()} != {0.0}


def test_progress_is_told(tiny_llama: LlamaForCausalLM, token_ids: Tensor) -> None:
    class Told:
        def __init__(self) -> None:
            self.loops: list[tuple[str, int]] = []

        def track(self, items: Sequence[Any], what: str) -> Iterable[Any]:
            self.loops.append((what, len(items)))
            return items

        def count(self, what: str) -> Callable[[int, int], None]:
            return lambda done, total: None

    told = Told()
    compiled_from(tiny_llama, token_ids, progress=told)
    assert told.loops == [("calibrating", 8)]


# -- other architectures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [gpt2, qwen2])
def test_architectures_with_biases(build: Callable[[], PreTrainedModel], token_ids: Tensor) -> None:
    model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
    found = compiled_from(model, token_ids)
    assert len(found.quantized_linears()) == len(list(found.report.quantized())) > 0
    biased = [m for m in found.quantized_linears().values() if m.unpack()[1] is not None]
    assert len(biased) >= 6
    want = logits(dense_twin(found, model), token_ids)
    assert relative_error(logits(found, token_ids), want) <= ROUNDING
    assert relative_error(logits(found, token_ids), logits(model, token_ids)) < 0.3
    assert any(row.applied for row in found.report.groups.values())
