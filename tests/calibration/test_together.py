"""Sequences that move together: which, how many, and that what is found is what one by one finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import awqc
from awqc import QuantConfig
from awqc.calibration import together as module
from awqc.calibration.together import members, rows_together, together
from awqc.memory import MemoryLimit
from awqc.observers.input_statistics import split_sample
from tests import mixtures

CONFIG = QuantConfig(group_size=32, propagate_dtype="float32")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}


def held_out(index: int, count: int) -> bool:
    ((_, found),) = split_sample(torch.empty(1, 1), index, count)
    return found


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_all_of_a_batch_are_held_out_or_none_and_each_as_if_alone(rows: int) -> None:
    count = 64
    seen = []
    for index in range(count // rows):
        for each in members(index, rows):
            assert held_out(each, count) == held_out(index, count // rows)
            seen.append(each)
    assert sorted(seen) == list(range(count))


def test_batches_are_joined_in_rows() -> None:
    batches = [{"x": torch.full((1, 3), i)} for i in range(32)]
    found = together(batches, 2)
    assert len(found) == 16
    assert found[9]["x"][:, 0].tolist() == members(9, 2) == [17, 25]
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(together(batches, 1), batches, strict=True))


@pytest.mark.parametrize(
    ("count", "tokens", "limit", "rows"),
    [
        (128, 512, None, 4),
        (128, 2048, None, 1),
        (128, 64, None, 16),  # no more, or fewer would be held out
        (100, 512, None, 1),
        (16, 512, None, 2),
        (128, 512, 8 * 4 * 64 * 2048 * 8, 4),
        (128, 512, 8 * 4 * 64 * 2048 * 8 - 1, 2),
        (128, 512, 1, 1),
    ],
)
def test_as_many_as_go_evenly_and_fit(count: int, tokens: int, limit: int | None, rows: int) -> None:
    assert rows_together(count, tokens, nn.Linear(64, 8), MemoryLimit(limit)) == rows


def compiled(model: nn.Module, ids: Tensor) -> Any:
    return awqc.compile(model, ids, config=CONFIG, backend="reference")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@pytest.mark.parametrize("make", [llama, lambda: mixtures.build("mixtral")])
def test_what_is_found_is_what_one_by_one_finds(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = mixtures.token_ids(3, 16, 40)
    both = compiled(make(), ids)
    monkeypatch.setattr(module, "TOKENS", 40)
    alone = compiled(make(), ids)
    inputs = [next(n for n in each.graph.graph.nodes if n.op == "placeholder") for each in (both, alone)]
    assert [len(node.meta["val"]) for node in inputs] == [2, 1]
    assert both.report.calibration == alone.report.calibration
    assert both.report.notes == alone.report.notes
    for name, row in alone.report.groups.items():
        found = both.report.groups[name]
        assert (found.tokens, found.held_out_tokens) == (row.tokens, row.held_out_tokens)
    # Sums in another order: by what sums of so many float32 differ, of the energy of the outputs.
    bound = 64 * torch.finfo(torch.float32).eps * ids.numel() ** 0.5
    first = next(iter(alone.report.linears))  # what no rounding has gone before
    want, found = alone.report.linears[first], both.report.linears[first]
    assert found.energy == pytest.approx(want.energy, rel=bound)
    assert found.nearest_error == pytest.approx(want.nearest_error, rel=bound)


def test_a_model_that_takes_one_sequence_alone() -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**SIZES, pad_token_id=None)).eval()
    report = compiled(model, mixtures.token_ids(3, 16, 40)).report
    (said,) = [text for _, text in report.notes if "one by one" in text]
    assert "batch sizes > 1" in said
    assert list(report.quantized())
    assert report.capture["rung"] == "torch.export"
