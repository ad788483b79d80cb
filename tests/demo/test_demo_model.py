"""The model and the texts that ship in awqc/demo, and the script that made the model."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from awqc.demo import CALIBRATION_TEXT, EVALUATION_TEXT, MODEL_PATH

SCRIPT = Path(__file__).parents[2] / "examples" / "train_demo_model.py"
SIZE_LIMIT = 6_000_000  # bytes, all of awqc/demo
PROMPT = '"I have waited for you all the evening," she said,'


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_PATH, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH, local_files_only=True, dtype=torch.float32).eval()


def perplexity(model: PreTrainedModel, ids: list[int]) -> float:
    """Over consecutive windows of the model's context."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for window in torch.tensor(ids).split(model.config.max_position_embeddings):
            if len(window) > 1:
                logits = model(window[None]).logits[0, :-1]
                total += F.cross_entropy(logits, window[1:], reduction="sum").item()
                count += len(window) - 1
    return math.exp(total / count)


def unigram_perplexity(ids: list[int]) -> float:
    """The least perplexity that a model without context can have on ``ids``: it knows their frequencies."""
    return math.exp(-sum(n / len(ids) * math.log(n / len(ids)) for n in Counter(ids).values()))


def test_everything_shipped_is_under_the_size_limit() -> None:
    files = [f for f in MODEL_PATH.parent.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) < SIZE_LIMIT
    assert {f.name for f in MODEL_PATH.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_weights_are_finite_float16_and_fill_whole_groups_of_128() -> None:
    stored = AutoModelForCausalLM.from_pretrained(MODEL_PATH, local_files_only=True, dtype="auto")
    assert {w.dtype for w in stored.state_dict().values()} == {torch.float16}
    assert all(w.isfinite().all() for w in stored.state_dict().values())
    linears = [m for m in stored.modules() if isinstance(m, torch.nn.Linear)]
    assert all(n % 128 == 0 for m in linears for n in m.weight.shape)


@pytest.mark.parametrize("text", [CALIBRATION_TEXT, EVALUATION_TEXT], ids=lambda path: path.stem)
def test_the_model_has_learned_the_language(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Path
) -> None:
    ids = tokenizer(text.read_text(encoding="utf-8"))["input_ids"]
    assert perplexity(model, ids) < unigram_perplexity(ids) / 2


def test_the_bound_of_the_perplexity_is_out_of_reach_without_training(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    torch.manual_seed(0)
    untrained = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    ids = tokenizer(EVALUATION_TEXT.read_text(encoding="utf-8"))["input_ids"]
    assert perplexity(untrained, ids) > unigram_perplexity(ids) / 2


def test_calibration_and_evaluation_share_no_paragraph() -> None:
    calibration, evaluation = (
        {line for line in path.read_text(encoding="utf-8").splitlines() if line}
        for path in (CALIBRATION_TEXT, EVALUATION_TEXT)
    )
    assert calibration
    assert evaluation
    assert not calibration & evaluation


def test_greedy_text_does_not_go_round_in_circles(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0].tolist()
    runs = Counter(tuple(output[i : i + 6]) for i in range(len(output) - 5))
    assert max(runs.values()) <= 2
    assert tokenizer.decode(output, skip_special_tokens=True).startswith(PROMPT)


@pytest.mark.parametrize(
    "text",
    [
        EVALUATION_TEXT.read_text(encoding="utf-8"),
        " two  spaces,\ttabs\n\n\nand lines \n",
        "'tis 1842 - naïve café, 火星, \N{SNOWMAN}\x00",
        "",
    ],
    ids=["story", "blanks", "beyond-ascii", "empty"],
)
def test_every_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


def test_ids_agree_with_the_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    for settings in (model.config, model.generation_config):
        assert settings.bos_token_id == tokenizer.bos_token_id
        assert settings.eos_token_id == tokenizer.eos_token_id


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "user", "content": " Is the river high? "},
        {"role": "assistant", "content": "It is rising."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<bos>User: Is the river high?\n\nAssistant: It is rising.\n\nAssistant:"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_writes_a_checkpoint_of_the_same_form(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stories = [path.read_text(encoding="utf-8") for path in (CALIBRATION_TEXT, EVALUATION_TEXT)]
    text, out = tmp_path / "text.txt", tmp_path / "model"
    text.write_text(script.DOCUMENT_SEPARATOR.join(stories), encoding="utf-8")
    script.main(
        text=text,
        out=out,
        held_out=0.3,
        vocab_size=384,
        hidden_size=128,
        intermediate_size=128,
        layers=1,
        steps=2,
        batch=2,
    )
    printed = capsys.readouterr().out
    assert "held out: perplexity" in printed
    assert all(prompt in printed for prompt in script.PROMPTS)
    assert {f.name for f in out.iterdir()} == {f.name for f in MODEL_PATH.iterdir()}
    settings = "tokenizer_config.json"
    assert (out / settings).read_text(encoding="utf-8") == (MODEL_PATH / settings).read_text(encoding="utf-8")


def test_the_script_refuses_a_text_that_is_too_short(script: ModuleType, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One line is not enough.\n", encoding="utf-8")
    expected = rf"{text} gives \d+ tokens to train on and \d+ held out; each must be over 513"
    with pytest.raises(typer.BadParameter, match=expected):
        script.main(text=text, out=tmp_path / "model")
