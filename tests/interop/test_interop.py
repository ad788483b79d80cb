"""Checkpoints that awqc writes, loaded by other engines: what they compute is what ``awqc.load`` computes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import awqc
from tests.interop import agreement, tiny
from tests.interop.engines import ENGINES

pytestmark = pytest.mark.interop

SHARED = Path(os.environ.get("AWQC_SHARED", Path(__file__).parents[3] / "shared"))


@dataclass(frozen=True)
class Subject:
    """A dense model, what it is calibrated on, and prompts to choose from; all prompts of one length."""

    path: Path
    group_size: int
    calib: list[list[int]]
    prompts: list[list[int]]


def lm28m(_: Path) -> Subject:
    """The trained 28M-parameter llama; calibration and prompts are different parts of a text."""
    model, text = SHARED / "models" / "lm28m", SHARED / "text" / "wikitext2.valid.txt"
    if not (model.exists() and text.exists()):
        pytest.skip(f"no {model} and {text}: set AWQC_SHARED to the folder that holds models/ and text/")
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text()[:60_000], verbose=False)["input_ids"]
    return Subject(
        model,
        group_size=128,
        calib=[ids[start : start + 256] for start in range(0, 2048, 256)],
        prompts=[ids[start : start + 96] for start in range(4096, 4096 + 16 * 256, 256)],
    )


def qwen2(tmp: Path) -> Subject:
    """Two random layers with biases and a tied head."""
    prompts = tiny.prompts()
    return Subject(tiny.qwen2(tmp / "dense"), group_size=32, calib=prompts[:8], prompts=prompts)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that awqc wrote, and what ``awqc.load`` makes of it."""

    path: Path
    expected: agreement.Yardstick


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[..., Saved]:
    """Compiles, saves and loads each combination once."""
    subjects: dict[Callable, Subject] = {}
    compiled: dict[tuple, awqc.CompiledModel] = {}
    checkpoints: dict[tuple, Saved] = {}

    def make(subject: Callable[[Path], Subject], format: str, zero_point: bool) -> Saved:
        if (subject, format, zero_point) in checkpoints:
            return checkpoints[subject, format, zero_point]
        if subject not in subjects:
            subjects[subject] = subject(tmp_path_factory.mktemp(subject.__name__))
        made = subjects[subject]
        if (subject, zero_point) not in compiled:
            config = awqc.QuantConfig(group_size=made.group_size, zero_point=zero_point)
            compiled[subject, zero_point] = awqc.compile(made.path, made.calib, config=config)
        out = tmp_path_factory.mktemp("saved") / f"{subject.__name__}-{format}"
        compiled[subject, zero_point].save(out, format=format)
        loaded = awqc.load(out, backend="reference", dtype=torch.float32)
        expected = agreement.yardstick(loaded, loaded.config.num_hidden_layers, made.prompts, count=4)
        checkpoints[subject, format, zero_point] = Saved(out, expected)
        return checkpoints[subject, format, zero_point]

    return make


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("zero_point", [True, False], ids=["zero-point", "symmetric"])
@pytest.mark.parametrize("format", ["awq", "compressed-tensors"])
@pytest.mark.parametrize("subject", [lm28m, qwen2])
def test_engine_computes_what_awqc_computes(subject, format, zero_point, engine, saved, tmp_path):
    checkpoint = saved(subject, format, zero_point)
    answer = ENGINES[engine](checkpoint.path, checkpoint.expected.prompts, tmp_path)
    print(agreement.summary(answer, checkpoint.expected))
    agreement.check(answer, checkpoint.expected, checkpoint.path)
