"""Mixtures of experts end to end: compiled, generating, saved as one linear an expert, loaded again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import awqc
from awqc import CompiledModel, Pipeline, QuantConfig
from awqc.quantized import QuantizedWeight
from awqc.runtime.experts import QuantExperts
from tests.checkpoints import specification
from tests.mixtures import EXPERTS, MIXTURES, build, token_ids

CONFIG = QuantConfig(group_size=32, min_expert_tokens=16)
#: Round-to-nearest on the min-max grid, nothing searched.
NEAREST = (
    Pipeline.default()
    .remove("search-scales")
    .remove("fold-scales")
    .remove("clip-weights")
    .with_options("round-weights", method="nearest")
)
FORMATS = ("awq", "compressed-tensors", "awqc")


def compiled_from(model: nn.Module, **options: Any) -> CompiledModel:
    return awqc.compile(model, token_ids(1), **{"backend": "reference", "config": CONFIG, **options})


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids).logits
    return result


def divergence(model: nn.Module, original: nn.Module, ids: Tensor) -> float:
    """Mean KL divergence of ``model`` from ``original``."""
    expected, found = (logits(m, ids).log_softmax(-1) for m in (original, model))
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.fixture(scope="module", params=MIXTURES)
def pair(request: pytest.FixtureRequest) -> tuple[str, Any, CompiledModel]:
    """A model and what was compiled from it. Not to be changed."""
    model = build(request.param)
    return request.param, model, compiled_from(model)


def test_experts_are_quantized_and_routers_are_not(pair: tuple[str, Any, CompiledModel]) -> None:
    _, model, compiled = pair
    stacks = {name for name, p in model.named_parameters() if p.ndim == 3}
    assert set(compiled.quantized_experts()) == stacks
    rows = compiled.report.linears
    assert {rows[name].decision for name in stacks} == {"quantized"}
    assert {rows[name].expert_count for name in stacks} == {EXPERTS}
    tokens = {sum(rows[name].expert_tokens) for name in stacks}
    assert tokens == {14 * 32 * 2}, "14 of 16 samples are searched on, each token by two experts"
    routers = [row for row in rows.values() if row.out_features == EXPERTS]
    assert len(routers) == len(stacks) / 2
    for row in routers:
        assert row.decision == "kept"
        assert row.reason.startswith("decides which experts of ")
    assert compiled.report.proof["relative_error"] < 1e-9


def test_closer_to_the_original_than_round_to_nearest(pair: tuple[str, Any, CompiledModel]) -> None:
    _, model, compiled = pair
    unseen = token_ids(2)
    nearest = compiled_from(model, pipeline=NEAREST)
    assert divergence(compiled, model, unseen) < divergence(nearest, model, unseen)


def test_every_implementation_of_the_experts_runs_on_packed_weights(
    pair: tuple[str, Any, CompiledModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same products in another order: at most rounding apart, and nothing is dequantized as a whole."""
    _, _, compiled = pair
    ids = token_ids(3, 2, 12)
    compiled.set_experts_implementation("grouped_mm")
    expected = logits(compiled, ids)
    monkeypatch.setattr(QuantExperts, "dequantize", lambda self: pytest.fail("dequantized"))
    try:
        for implementation in ("batched_mm", "eager"):
            compiled.set_experts_implementation(implementation)
            found = logits(compiled, ids)
            bound = 64 * len(compiled.graph.graph.nodes) ** 0.5 * torch.finfo(torch.float32).eps
            assert (found - expected).norm() <= bound * expected.norm()
    finally:
        compiled.set_experts_implementation("grouped_mm")


def test_generates(pair: tuple[str, Any, CompiledModel]) -> None:
    _, _, compiled = pair
    prompt = token_ids(4, 1, 8)
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    found = compiled.generate(prompt, **options)
    assert found.shape == (1, 24)
    # Without a cache every token is computed from all before it.
    assert torch.equal(found, compiled.generate(prompt, use_cache=False, **options))


def half_twin(compiled: CompiledModel) -> nn.Module:
    """``compiled`` with dense tensors as a checkpoint stores them."""
    twin = copy.deepcopy(compiled)
    biases = [b for name, b in twin.named_buffers() if name.endswith(".bias")]  # of quantized linears
    for tensor in (*twin.parameters(), *biases):
        tensor.data = tensor.data.half().to(tensor.dtype)
    return twin


def saved_weights(pair: tuple[str, Any, CompiledModel]) -> dict[str, QuantizedWeight]:
    """The linears on disk that the experts must be stored as, by the names that engines load."""
    name, _, compiled = pair
    found = {}
    for parameter, stack in compiled.quantized_experts().items():
        weight, _ = stack.unpack()
        owner, part = parameter.rsplit(".", 1)
        half = weight.out_features // 2
        for e in range(EXPERTS):
            whole = QuantizedWeight(weight.codes[e], weight.scales[e], weight.zeros[e], weight.scheme)
            gate, up = (
                QuantizedWeight(whole.codes[rows], whole.scales[rows], whole.zeros[rows], whole.scheme)
                for rows in (slice(half), slice(half, None))
            )
            if name == "mixtral":
                prefix = f"{owner.replace('.mlp.', '.block_sparse_moe.')}.{e}"
                pieces = {"w1": gate, "w3": up} if part == "gate_up_proj" else {"w2": whole}
            elif name == "granitemoe":
                prefix = (
                    f"{owner.removesuffix('.experts')}.{'in' if part == 'gate_up_proj' else 'out'}put_linear"
                )
                pieces = {str(e): whole}
            elif name == "gpt_oss":
                prefix, pieces = f"{owner}.{e}", {part: whole}
            else:
                prefix = f"{owner}.{e}"
                pieces = {"gate_proj": gate, "up_proj": up} if part == "gate_up_proj" else {part: whole}
            found |= {f"{prefix}.{piece}": value for piece, value in pieces.items()}
    return found


@pytest.mark.parametrize("format", FORMATS)
def test_saved_under_the_names_of_engines_and_loaded_to_the_same_logits(
    pair: tuple[str, Any, CompiledModel], tmp_path: Path, format: str
) -> None:
    name, _, compiled = pair
    path = compiled.save(tmp_path / "out", format=format)
    files = load_file(path / "model.safetensors")
    for linear, weight in saved_weights(pair).items():
        codes, zeros, scales = unpacked(files, linear, format)
        assert np.array_equal(codes, weight.codes.numpy())
        assert np.array_equal(zeros, weight.zeros.numpy())
        assert torch.equal(scales, weight.scales)
    stacks = tuple(compiled.quantized_experts())
    assert not [file for file in files if file in stacks or file.endswith("experts.gate_up_proj.codes")]
    ids = token_ids(5, 2, 12)
    loaded = awqc.load(path, backend="reference")
    found, expected = logits(loaded, ids), logits(half_twin(compiled), ids)
    assert torch.equal(found, expected), float((found - expected).abs().max())
    if name == "mixtral":
        router = "model.layers.0.block_sparse_moe.gate"
        assert f"{router}.weight" in files
        kept = loaded.config.to_dict().get("quantization_config") or {}
        assert format == "awqc" or router in (kept.get("modules_to_not_convert") or kept["ignore"])


def unpacked(files: dict[str, Tensor], linear: str, format: str) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Codes, zero points and scales of a stored linear, by the descriptions of the formats."""

    def array(part: str) -> np.ndarray:
        return files[f"{linear}.{part}"].numpy()

    if format == "awq":
        codes, zeros = specification.read_gemm(array("qweight")), specification.read_gemm(array("qzeros"))
        return codes, zeros, files[f"{linear}.scales"].T
    if format == "compressed-tensors":
        codes = specification.read_natural(array("weight_packed"))
        zeros = specification.read_natural(array("weight_zero_point").T).T
        assert array("weight_shape").tolist() == list(codes.shape)
        return codes, zeros, files[f"{linear}.weight_scale"]
    n, k = array("shape").tolist()
    groups = files[f"{linear}.scales"].shape[1]
    codes, zeros = (
        specification.read_bits(array(part), 4, count) for part, count in (("codes", k), ("zeros", groups))
    )
    assert len(codes) == n
    return codes, zeros, files[f"{linear}.scales"]


def test_transformers_finds_every_expert_where_it_looks_for_it(
    pair: tuple[str, Any, CompiledModel], tmp_path: Path
) -> None:
    """The checkpoint, dequantized by the description of its format, is one that transformers reads."""
    name, model, compiled = pair
    if name in ("granitemoe", "gpt_oss"):
        pytest.skip("its float checkpoints hold stacks: there are no names of single experts")
    path = compiled.save(tmp_path / "out", format="compressed-tensors")
    files = load_file(path / "model.safetensors")
    for linear in [file.removesuffix(".weight_packed") for file in files if file.endswith("weight_packed")]:
        codes, zeros, scales = unpacked(files, linear, "compressed-tensors")
        group = torch.arange(codes.shape[1]) // 32
        weight = torch.from_numpy(codes).float() - torch.from_numpy(zeros).float()[:, group]
        for part in ("packed", "scale", "shape", "zero_point"):
            del files[f"{linear}.weight_{part}"]
        files[f"{linear}.weight"] = weight * scales.float()[:, group]
    save_file(files, tmp_path / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(tmp_path)
    read, info = type(model).from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = token_ids(8, 2, 12)
    expected, found = logits(awqc.load(path, backend="reference"), ids), logits(read.eval(), ids)
    bound = 64 * len(compiled.graph.graph.nodes) ** 0.5 * torch.finfo(torch.float32).eps
    assert (found - expected).norm() <= bound * expected.norm()


def test_a_loaded_mixture_is_saved_again_as_it_was(tmp_path: Path) -> None:
    first = compiled_from(build("mixtral")).save(tmp_path / "first", format="awq")
    second = awqc.load(first, backend="reference").save(tmp_path / "second", format="awq")
    expected, found = (load_file(path / "model.safetensors") for path in (first, second))
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_directory_of_experts_is_read_tensor_by_tensor(tmp_path: Path) -> None:
    """What transformers stacks while loading is stacked here when it is needed; the result is the same."""
    model = build("mixtral")
    model.save_pretrained(tmp_path / "float")
    from_disk = compiled_from(tmp_path / "float")
    from_memory = compiled_from(model)
    assert not any("read whole" in what for _, what in from_disk.report.notes)
    ids = token_ids(6, 2, 12)
    assert torch.equal(logits(from_disk, ids), logits(from_memory, ids))
    disk, memory = (m.save(tmp_path / str(i)) for i, m in enumerate((from_disk, from_memory)))
    expected, found = (load_file(path / "model.safetensors") for path in (memory, disk))
    assert sorted(found) == sorted(expected)


def test_experts_on_the_cpu_backend() -> None:
    """Activations and scales are rounded to bfloat16, once a linear."""
    model = build("mixtral")
    fast, compiled = (compiled_from(model, backend=backend) for backend in ("cpu", "reference"))
    assert {row.backend for row in fast.report.quantized()} == {"cpu"}
    layer = next(iter(fast.quantized_experts()))
    x, offsets = torch.randn(20, 64), torch.tensor([5, 5, 12, 20])
    found, expected = (m.quantized_experts()[layer](x, offsets) for m in (fast, compiled))
    assert (found - expected).norm() <= 4 * torch.finfo(torch.bfloat16).eps / 2 * expected.norm()
    generated = fast.generate(token_ids(7, 1, 12), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert generated.shape == (1, 16)
