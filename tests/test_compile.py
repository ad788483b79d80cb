"""End to end: a model in, a quantized model out that behaves like it, is saved, loaded and lowered again."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

import awqc
from awqc import CompiledModel, Pipeline, QuantConfig, QuantizedWeight, Report, Scheme
from awqc.capture import relative_error
from awqc.checkpoints.awq import AwqFormat
from awqc.errors import CheckpointError
from awqc.observers.activations import Activations
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


# -- checkpoints -------------------------------------------------------------------------------------------


def half_rounded(model: CompiledModel) -> nn.Module:
    """``model`` with its dense tensors rounded as checkpoints of a float32 source store them."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(parameter.half())
        for linear in twin.quantized_linears().values():
            if linear._buffers.get("bias") is not None:
                linear.bias.copy_(linear.bias.half())
    return twin


FORMATS = {
    "awq": QuantConfig(group_size=32),
    "compressed-tensors": QuantConfig(group_size=32),
    "compressed-tensors symmetric": QuantConfig(group_size=32, zero_point=False),
    "awqc": QuantConfig(group_size=32),
    "awqc 3 bits, ragged": QuantConfig(bits=3, group_size=64),
}


@pytest.mark.parametrize("case", FORMATS)
@pytest.mark.parametrize("build", [ragged_llama, qwen2, gpt2])
def test_what_is_saved_is_what_is_loaded(
    case: str, build: Callable[[], PreTrainedModel], token_ids: Tensor, tmp_path: Path
) -> None:
    model = build()
    found = compiled_from(model, token_ids[:8], config=FORMATS[case])
    path = found.save(tmp_path / "out", format=case.split(" ")[0])
    assert path == (tmp_path / "out").resolve()
    loaded = awqc.load(path, backend="reference")
    assert type(loaded).__name__ == type(model).__name__
    twins = loaded.quantized_linears()
    for name, linear in found.quantized_linears().items():
        (weight, _), (again, _) = linear.unpack(), twins[name].unpack()
        for part in ("codes", "scales", "zeros"):
            assert torch.equal(getattr(weight, part), getattr(again, part)), name
    assert torch.equal(logits(loaded, token_ids), logits(half_rounded(found), token_ids))
    with torch.no_grad():
        found = loaded.graph(torch.arange(16)[None])[0]
    assert relative_error(found, logits(loaded, torch.arange(16)[None])) <= ROUNDING


def test_the_report_is_saved_along(compiled: CompiledModel, tmp_path: Path) -> None:
    loaded = awqc.load(compiled.save(tmp_path / "out"), backend="reference")
    assert loaded.report.to_json() == compiled.report.to_json()


def test_an_artifact_is_lowered_again_without_a_search(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token_ids: Tensor
) -> None:
    path = compiled.save(tmp_path / "artifact", format="awqc")

    def no_search(*args: Any) -> None:
        raise AssertionError("loading must not calibrate")

    monkeypatch.setattr(Activations, "observe", no_search)
    for backend in ("reference", "cpu"):
        loaded = awqc.load(path, backend=backend)
        linears = loaded.quantized_linears()
        assert {m.backend.name for m in linears.values()} == {backend}
        assert {row.backend for row in loaded.report.quantized()} == {backend}
        for name, linear in compiled.quantized_linears().items():
            assert torch.equal(linear.unpack()[0].codes, linears[name].unpack()[0].codes)
        # And on to a format that engines load.
        again = awqc.load(loaded.save(tmp_path / backend, format="awq"), backend="reference")
        assert torch.equal(logits(again, token_ids), logits(half_rounded(compiled), token_ids))


def test_from_a_directory_it_is_what_it_is_from_memory(
    compiled: CompiledModel, tiny_llama: LlamaForCausalLM, token_ids: Tensor, tmp_path: Path
) -> None:
    tiny_llama.save_pretrained(tmp_path / "model")
    found = compiled_from(tmp_path / "model", token_ids)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, compiled.state_dict()[name]), name
    assert torch.equal(logits(found, token_ids), logits(compiled, token_ids))
    prompt = token_ids[:1, :4]
    assert found.generate(prompt, max_new_tokens=3, do_sample=False).shape[1] > 4


def test_a_checkpoint_is_not_overwritten_unasked(compiled: CompiledModel, tmp_path: Path) -> None:
    compiled.save(tmp_path / "out")
    with pytest.raises(awqc.AwqcError) as caught:
        compiled.save(tmp_path / "out", format="awqc")
    assert str(caught.value) == (
        f"{(tmp_path / 'out').resolve()} already exists and is not empty: choose another output path, or "
        "pass overwrite=True (--overwrite) to replace it"
    )
    compiled.save(tmp_path / "out", format="awqc", overwrite=True)


def test_a_checkpoint_that_does_not_read_back_is_noticed(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the packing of a format were wrong."""
    encode = AwqFormat.encode

    def transposed(self: AwqFormat, name: str, weight: QuantizedWeight) -> Any:
        return encode(self, name, replace(weight, codes=weight.codes.flip(0)))

    monkeypatch.setattr(AwqFormat, "encode", transposed)
    with pytest.raises(CheckpointError) as caught:
        compiled.save(tmp_path / "out")
    assert re.fullmatch(
        rf"{re.escape(str(tmp_path / 'out'))} does not read back as the model that was saved: its first "
        r"stage differs by \d\.\de[+-]\d\d \(rounding explains 6\.2e-02\); do not use it, and report this",
        str(caught.value),
    )


def test_a_format_that_cannot_carry_the_scheme(
    tiny_llama: LlamaForCausalLM, token_ids: Tensor, tmp_path: Path
) -> None:
    model = compiled_from(tiny_llama, token_ids, config=QuantConfig(bits=3, group_size=32))
    with pytest.raises(awqc.AwqcError) as caught:
        model.save(tmp_path / "out", format="awq")
    assert "'awqc'" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
