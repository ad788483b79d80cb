"""Exported models in ONNX Runtime: logits, generation, sizes, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from awqc.errors import CaptureError, CheckpointError, ConfigError, VerifyError
from awqc.export import onnx as module
from awqc.export.check import run, session
from awqc.export.decoder import interface
from awqc.export.linears import MatMulNBits
from awqc.export.onnx import MODEL_FILE, Exported, OnnxConfig, export_onnx
from tests.export.models import compiled, gemma3, greedy, mixtral, qwen2
from tests.models import llama

#: Relative rounding of float16, within which logits are to agree.
HALF = 2.0**-10


@dataclass
class Case:
    model: Any
    exported: Exported


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A compiled Llama of one layer."""
    model = compiled(llama(num_hidden_layers=1))
    return Case(model, export_onnx(model, tmp_path_factory.mktemp("onnx") / "out"))


def prompt(batch: int = 1, tokens: int = 8) -> torch.Tensor:
    return torch.randint(2, 128, (batch, tokens), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("model", "linears", "count"),
    [
        pytest.param(qwen2, "matmulnbits", 14, id="qwen2-matmulnbits"),
        pytest.param(qwen2, "dequantize", 14, id="qwen2-dequantize"),
        pytest.param(gemma3, "matmulnbits", 14, id="gemma3-matmulnbits"),
        pytest.param(mixtral, "matmulnbits", 12, id="mixtral-matmulnbits"),
    ],
)
def test_generates_what_the_model_generates(model: Any, linears: Any, count: int, tmp_path: Path) -> None:
    model = compiled(model())
    exported = export_onnx(model, tmp_path / "out", OnnxConfig(linears))
    assert sum(exported.forms.values()) == count
    assert exported.error is not None
    assert exported.error <= HALF
    ids = prompt()
    expected = model.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert greedy(exported.path, interface(model, past=True), ids, 32) == expected[0, 8:].tolist()


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 2), (2, 1), (3, 11)])
def test_any_batch_and_length(tiny: Case, batch: int, tokens: int) -> None:
    ids = prompt(batch, tokens)
    feed = interface(tiny.model, past=True).feed(ids)
    logits = run(session(tiny.exported.path / MODEL_FILE), feed)[0]
    expected = tiny.model(ids).logits
    assert (logits - expected).norm() <= HALF * expected.norm()


def test_padded_rows_do_not_see_the_padding(tiny: Case) -> None:
    ids = prompt(2, 10)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    feed = interface(tiny.model, past=True).feed(ids) | {"attention_mask": mask, "position_ids": positions}
    logits = run(session(tiny.exported.path / MODEL_FILE), feed)[0]
    alone = tiny.model(ids[1:, 4:]).logits
    assert (logits[1:, 4:] - alone).norm() <= HALF * alone.norm()


def test_names_of_inputs_and_outputs(tiny: Case) -> None:
    model = onnx.load(tiny.exported.path / MODEL_FILE)

    def shapes(values: Any) -> dict[str, list[Any]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    seen, new = "past_sequence_length", "sequence_length"
    assert shapes(model.graph.input) == {
        "input_ids": ["batch_size", new],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", new],
        "past_key_values.0.key": ["batch_size", 2, seen, 16],
        "past_key_values.0.value": ["batch_size", 2, seen, 16],
    }
    assert shapes(model.graph.output) == {
        "logits": ["batch_size", new, 128],
        "present.0.key": ["batch_size", 2, f"{seen} + {new}", 16],
        "present.0.value": ["batch_size", 2, f"{seen} + {new}", 16],
    }


def test_nodes_and_weights_have_the_names_of_modules(tiny: Case) -> None:
    graph = onnx.load(tiny.exported.path / MODEL_FILE).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    linears = [node.name for node in graph.node if node.op_type == "MatMulNBits"]
    assert linears == [
        "/model/layers.0/self_attn/q_proj/MatMulNBits",
        "/model/layers.0/self_attn/k_proj/MatMulNBits",
        "/model/layers.0/self_attn/v_proj/MatMulNBits",
        "/model/layers.0/self_attn/o_proj/MatMulNBits",
        "/model/layers.0/mlp/gate_proj/MatMulNBits",
        "/model/layers.0/mlp/up_proj/MatMulNBits",
        "/model/layers.0/mlp/down_proj/MatMulNBits",
    ]
    weights = {tensor.name for tensor in graph.initializer}
    assert {f"model.layers.0.mlp.up_proj.{part}" for part in ("weight", "scales", "zero_points")} <= weights
    assert "model.embed_tokens.weight" in weights
    assert not any(node.doc_string or node.metadata_props for node in graph.node)


def test_without_past(tmp_path: Path) -> None:
    model = compiled(llama(num_hidden_layers=1))
    exported = export_onnx(model, tmp_path / "out", OnnxConfig(past=False))
    assert exported.error is not None
    assert exported.error <= HALF
    runtime = session(exported.path / MODEL_FILE)
    assert [i.name for i in runtime.get_inputs()] == ["input_ids", "attention_mask", "position_ids"]
    assert [o.name for o in runtime.get_outputs()] == ["logits"]
    assert "no genai_config.json: onnxruntime-genai needs past keys and values of one shape" in exported.notes


def test_a_float_model_in_half_precision(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1).half()
    exported = export_onnx(model, tmp_path / "out")
    assert exported.forms == {}
    logits = next(o for o in session(exported.path / MODEL_FILE).get_outputs() if o.name == "logits")
    assert logits.type == "tensor(float16)"


def test_large_weights_go_to_a_file_of_their_own(
    tiny: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = ir.load(tiny.exported.path / MODEL_FILE)
    monkeypatch.setattr(module, "EXTERNAL_ABOVE", 1000)
    size = module._save(program, tmp_path / MODEL_FILE)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert size == sum(file.stat().st_size for file in tmp_path.iterdir())
    feed = interface(tiny.model, past=True).feed(prompt())
    pair = [run(session(path / MODEL_FILE), feed)[0] for path in (tmp_path, tiny.exported.path)]
    assert torch.equal(*pair)


def test_settings_of_onnxruntime_genai(tiny: Case) -> None:
    settings = json.loads((tiny.exported.path / "genai_config.json").read_text())
    decoder = settings["model"].pop("decoder")
    assert settings["model"] == {
        "type": "decoder",
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "context_length": 64,
        "vocab_size": 128,
    }
    assert decoder == {
        "filename": "model.onnx",
        "head_size": 16,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    assert "quantization_config" not in json.loads((tiny.exported.path / "config.json").read_text())


def test_the_model_is_as_it_was(tiny: Case) -> None:
    """Tracing puts nodes in the place of its linears, for a while."""
    for linear in tiny.model.quantized_linears().values():
        assert "forward" not in vars(linear)
        assert not any(name.startswith("_") for name in linear._buffers)


def test_a_wrong_result_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = MatMulNBits.write

    def doubled(self: MatMulNBits, linear: Any, graph: Any) -> Any:
        return graph.node("Add", [write(self, linear, graph)] * 2)

    monkeypatch.setattr(MatMulNBits, "write", doubled)
    with pytest.raises(VerifyError, match=r"^logits of ONNX Runtime differ from the model's by \S+, where"):
        export_onnx(compiled(llama(num_hidden_layers=1)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"linears": "gguf"}, "linears='gguf': choose one of matmulnbits, dequantize"),
        ({"accuracy_level": 5}, "accuracy_level=5: ONNX Runtime knows 0, 1, 2, 3 and 4"),
        (
            {"linears": "dequantize", "accuracy_level": 4},
            "accuracy_level=4 is stored with MatMulNBits only: for dequantize it is an option of the "
            "session, session.qdq_matmulnbits_accuracy_level",
        ),
    ],
)
def test_settings_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        OnnxConfig(**fields)
    assert str(error.value) == message


def refusal(model: nn.Module, out: Path) -> str:
    with pytest.raises((ConfigError, CaptureError, CheckpointError)) as error:
        export_onnx(model, out)
    assert not list(out.parent.glob(f".{out.name}.*"))
    return str(error.value)


def test_states_that_are_no_keys_and_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1)).eval()
    assert refusal(model, tmp_path / "out") == (
        "MambaForCausalLM returns no cache, where an export with past needs keys and values of each layer: "
        "export it without past (past=False, --no-past)"
    )


def test_models_that_are_no_causal_language_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    for model in (nn.Linear(4, 4), T5ForConditionalGeneration(config)):
        assert refusal(model, tmp_path / "out") == (
            f"{type(model).__name__} does not go from input_ids to the logits of the next token: only causal "
            "language models of transformers are exported"
        )


def test_bfloat16(tmp_path: Path) -> None:
    assert refusal(llama(num_hidden_layers=1).bfloat16(), tmp_path / "out") == (
        "LlamaForCausalLM computes in torch.bfloat16: ONNX Runtime needs float32, or float16 on a GPU"
    )


class Branching(nn.Module):
    """A forward that asks for a value."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = model, model.config
        self.get_input_embeddings = model.get_input_embeddings

    def forward(
        self, input_ids: Any, attention_mask: Any = None, past_key_values: Any = None, **rest: Any
    ) -> Any:
        if input_ids.sum() > 7:
            input_ids = input_ids + 1
        return self.inner(input_ids, attention_mask, past_key_values=past_key_values, use_cache=True)


def test_a_forward_that_cannot_be_traced(tmp_path: Path) -> None:
    message = refusal(Branching(llama(num_hidden_layers=1)), tmp_path / "out")
    assert message.startswith(
        "Branching could not be traced by torch.export for all batch sizes and lengths: GuardOnDataDependent"
    )
    assert "\n" not in message


def test_an_existing_directory_is_kept(tiny: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(tiny.exported.path, out)
    assert refusal(tiny.model, out) == (
        f"{out} already exists and is not empty: choose another output path, or pass overwrite=True "
        "(--overwrite) to replace it"
    )
