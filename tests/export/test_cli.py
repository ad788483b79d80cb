"""``awqc export``."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from awqc.cli.main import app
from tests.export.models import compiled
from tests.models import llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = compiled(llama(num_hidden_layers=1)).save(tmp_path_factory.mktemp("awqc") / "q", "awqc")
    return path


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_what_it_prints(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke(checkpoint, "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed.pop("error") <= 2.0**-10
    assert printed == {
        "path": str(out),
        "bytes": (out / "model.onnx").stat().st_size,
        "forms": {"MatMulNBits": 7},
        "notes": [f"no tokenizer: {printed['notes'][0].removeprefix('no tokenizer: ')}"],
    }
    lines = invoke(checkpoint, "-o", out, "--no-past", "--overwrite").stdout.splitlines()
    assert lines[0].startswith(f"{out}: ")
    assert lines[0].endswith(" kB, 7 linears as MatMulNBits")
    assert lines[1].startswith("logits in ONNX Runtime differ by ")
    assert lines[2] == "note: no genai_config.json: onnxruntime-genai needs past keys and values of one shape"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "gguf"], "error: --format gguf: awqc exports to onnx"),
        (["--linears", "int4"], "error: linears='int4': choose one of matmulnbits, dequantize"),
        (["--accuracy-level", 9], "error: accuracy_level=9: ONNX Runtime knows 0, 1, 2, 3 and 4"),
        (
            ["--dtype", "bfloat16"],
            "error: LlamaForCausalLM computes in torch.bfloat16: ONNX Runtime needs float32, or float16 on a "
            "GPU",
        ),
    ],
)
def test_options_out_of_range(checkpoint: Path, options: list[Any], message: str, tmp_path: Path) -> None:
    result = invoke(checkpoint, "-o", tmp_path / "out", *options)
    assert result.exit_code == 1
    assert result.stderr == f"{message}\n"
    assert list(tmp_path.iterdir()) == []


def test_no_checkpoint(tmp_path: Path) -> None:
    result = invoke(tmp_path / "nothing", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {tmp_path / 'nothing'} is not a directory: give a local Hugging Face model directory, or a "
        "module in memory\n"
    )


def test_onto_itself(checkpoint: Path) -> None:
    result = invoke(checkpoint, "-o", checkpoint, "--overwrite")
    assert result.exit_code == 1
    assert result.stderr == f"error: {checkpoint} is the model itself: choose another output path\n"


def test_without_the_packages(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find(name, *rest)
    )
    result = invoke(checkpoint, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr == "error: onnx is not installed: run pip install 'awqc[onnx]'\n"
