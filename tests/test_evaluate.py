"""Perplexity and KL divergence against computations made another way, and the trained model's figure."""

import copy
import math
import os
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from awqc import evaluate
from awqc.calibration import all_tokens
from awqc.errors import ConfigError, NonFiniteError
from awqc.evaluate import compare, kl_divergence, perplexity

VOCABULARY = 100
#: A mean of float32 log-probabilities computed in another order: a few roundings of values below log(V).
TOLERANCE = 8 * torch.finfo(torch.float32).eps * math.log(VOCABULARY)


def tiny_llama(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def other():
    return tiny_llama(seed=1)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(VOCABULARY, (83,), generator=torch.Generator().manual_seed(0))


def windows(ids, window):
    return [part.unsqueeze(0) for part in ids.split(window) if len(part) > 1]


@torch.no_grad()
def independent_nll(model, ids, window):
    """All windows' ``F.cross_entropy`` in float64."""
    losses = [
        F.cross_entropy(model(input_ids=w).logits[0, :-1].double(), w[0, 1:], reduction="none")
        for w in windows(ids, window)
    ]
    return torch.cat(losses)


@pytest.mark.parametrize("length", [83, 80, 81, 20, 21, 7, 2])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_agrees_with_cross_entropy(model, ids, length, batch_size):
    ids = ids[:length]
    expected = independent_nll(model, ids, window=20)
    found = perplexity(model, ids, window=20, batch_size=batch_size)
    assert found.tokens == expected.numel() == length - math.ceil(length / 20)
    assert abs(found.nll - expected.mean().item()) < TOLERANCE
    assert found.value == math.exp(found.nll)


def test_a_batch_of_one_is_a_text(model, ids):
    assert perplexity(model, ids.unsqueeze(0), window=20) == perplexity(model, ids, window=20)


def test_logits_are_read_in_pieces(model, ids, monkeypatch):
    whole = compare(model, model, ids, window=20)
    monkeypatch.setattr(evaluate, "_LOGITS_AT_ONCE", 7 * VOCABULARY)
    pieces = compare(model, model, ids, window=20)
    assert pieces.perplexity.tokens == whole.perplexity.tokens
    assert pieces.perplexity.nll == pytest.approx(whole.perplexity.nll, rel=0, abs=TOLERANCE)


def test_comparison_agrees_with_an_independent_one(model, other, ids):
    found = compare(model, other, ids, window=20, batch_size=3)
    divergences, agreements = [], []
    with torch.no_grad():
        for window in windows(ids, 20):
            log_q = F.log_softmax(model(input_ids=window).logits[0, :-1].double(), -1)
            log_p = F.log_softmax(other(input_ids=window).logits[0, :-1].double(), -1)
            divergences.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
            agreements.append(log_q.argmax(-1) == log_p.argmax(-1))
    expected = torch.cat(divergences).mean().item()
    # Each term p * (log p - log q) is rounded in float32, where a log-probability reaches tens.
    assert found.kl == pytest.approx(expected, rel=64 * torch.finfo(torch.float32).eps)
    assert found.kl > 0.1
    assert found.top1_agreement == torch.cat(agreements).double().mean().item() < 1
    assert found.perplexity == perplexity(model, ids, window=20, batch_size=3)
    assert found.reference == perplexity(other, ids, window=20, batch_size=3)
    assert kl_divergence(model, other, ids, window=20, batch_size=3) == found.kl
    assert kl_divergence(other, model, ids, window=20) != pytest.approx(found.kl, rel=1e-3)


def test_a_model_is_at_no_distance_from_itself(model, ids):
    found = compare(model, copy.deepcopy(model), ids, window=20)
    assert found.kl == 0
    assert found.top1_agreement == 1
    assert found.perplexity == found.reference


def test_each_model_runs_once_on_each_window(model, other, ids):
    calls = []

    def counted(inner):
        return lambda input_ids: calls.append(tuple(input_ids.shape)) or inner(input_ids=input_ids)

    compare(counted(model), counted(other), ids, window=20, batch_size=3)
    assert calls == [(3, 20), (3, 20), (1, 20), (1, 20), (1, 3), (1, 3)]


def test_half_precision_logits_are_normalized_in_float32(ids):
    logits = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1)).bfloat16()

    def bigram(input_ids):
        return SimpleNamespace(logits=logits[input_ids])

    expected = F.cross_entropy(logits.double()[ids[:-1]], ids[1:]).item()
    assert abs(perplexity(bigram, ids, window=len(ids)).nll - expected) < TOLERANCE


def test_dropout_is_off_and_training_mode_comes_back(ids):
    model = tiny_llama(dropout=0.5)
    expected = perplexity(model, ids, window=20)
    model.train()
    assert perplexity(model, ids, window=20) == expected
    assert model.training
    assert all(module.training for module in model.modules())


def test_progress_counts_tokens(model, ids):
    calls = []
    perplexity(model, ids, window=20, batch_size=3, progress=lambda *call: calls.append(call))
    compare(model, model, ids, window=20, batch_size=3, progress=lambda *call: calls.append(call))
    assert calls == 2 * [(60, 83), (80, 83), (83, 83)]


def test_results_are_plain_data(model, ids):
    found = asdict(compare(model, model, ids, window=20))
    assert set(found) == {"perplexity", "reference", "kl", "top1_agreement"}
    assert set(found["perplexity"]) == {"value", "tokens", "nll"}


@pytest.mark.parametrize(
    ("shape", "window", "message"),
    [
        ((1,), 20, "the text to evaluate has 1 tokens: it takes at least 2"),
        ((0,), 20, "the text to evaluate has 0 tokens: it takes at least 2"),
        ((2, 40), 20, "ids of shape (2, 40): a text to evaluate is (T,) or (1, T)"),
        ((40,), 1, "window=1: a window takes at least 2 tokens"),
        ((40,), 65, "window=65 is longer than the model's limit of 64 tokens: give window=64 or less"),
    ],
)
def test_what_cannot_be_evaluated(model, shape, window, message):
    with pytest.raises(ConfigError) as error:
        perplexity(model, torch.zeros(shape, dtype=torch.int64), window=window)
    assert str(error.value) == message
    with pytest.raises(ConfigError) as error:
        compare(model, model, torch.zeros(shape, dtype=torch.int64), window=window)
    assert str(error.value) == message


def test_models_of_different_vocabularies_are_not_compared(model, ids):
    def larger(input_ids):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCABULARY + 1))

    with pytest.raises(ConfigError) as error:
        compare(model, larger, ids, window=20)
    assert str(error.value) == (
        "the model predicts 100 tokens and its reference 101: compare models of one vocabulary"
    )


def test_logits_that_are_not_finite_are_located(ids):
    def broken(input_ids):
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        logits[input_ids == ids[45]] = float("nan")
        return SimpleNamespace(logits=logits)

    first = int((ids == ids[45]).nonzero()[0]) // 20 * 20
    for run in (perplexity, lambda model, *args, **kw: compare(model, model, *args, **kw)):
        with pytest.raises(NonFiniteError) as error:
            run(broken, ids, window=20, batch_size=1)
        assert str(error.value) == (
            f"the logits for tokens {first} to {first + 19} of the text hold NaN or Inf: "
            "check the model's weights and dtype"
        )


def test_the_trained_model_has_its_reference_perplexity():
    """On the first 4 windows; the whole text gives 40.29 (docs), which takes minutes."""
    shared = Path(os.environ.get("AWQC_SHARED", Path(__file__).parents[2] / "shared"))
    model, text = shared / "models" / "lm28m", shared / "text" / "wikitext2.test.txt"
    if not (model.is_dir() and text.is_file()):
        pytest.skip(f"no trained model and text under {shared}: set AWQC_SHARED")
    ids = all_tokens(text, tokenizer=AutoTokenizer.from_pretrained(model))
    found = perplexity(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), ids[: 4 * 512])
    assert ids.numel() == 358_795
    assert found.tokens == 4 * 511
    # Two builds of the same float32 model differ by its roundings, far less than the last digit given.
    assert found.value == pytest.approx(48.270, abs=5e-3)
