"""Passes that run out of memory: run again with less, without a loss where none is needed, and said so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import awqc
from awqc import QuantConfig
from awqc.observers.activations import Activations
from awqc.passes.round_weights import RoundWeights
from awqc.report import Report
from tests.test_streaming import MODELS, compile_to, tensors

CONFIG = QuantConfig(group_size=32)
#: The gate and up projections of the first layer have most rows, and those of the second as many.
FIRST, SECOND = "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"


@pytest.fixture(autouse=True)
def needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage needs as much as its linears have rows, to be independent of the formulas."""

    def rows(observers: Any, *_: Any) -> int:
        return max(view.out_features for observer in observers for view in observer.views)

    monkeypatch.setattr("awqc.memory.stage_bytes", rows)
    monkeypatch.setattr("awqc.retries.stage_bytes", rows)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics may be offloaded, though that is from the CPU to the CPU here."""
    monkeypatch.setattr("awqc.memory.kinds_on", lambda _: ["full", "offloaded", "sampled"])


def short_in_rounding(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Rounding of the first gate projection runs out of memory so often."""
    rounded, left = RoundWeights._compensated, times

    def short(self: RoundWeights, weights: Any, *rest: Any) -> Any:
        nonlocal left
        if left and weights[0][0].shape[0] == 128:
            left -= 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return rounded(self, weights, *rest)

    monkeypatch.setattr(RoundWeights, "_compensated", short)


def held(report: Report) -> dict[str, str]:
    """How the statistics of each group that was observed were held, by its first linear."""
    return {row.linears[0]: row.statistics for row in report.groups.values() if row.statistics}


def notes(report: Report, where: str) -> list[str]:
    return [what for source, what in report.notes if source == where]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("times", [1, 2])
def test_rounding_goes_on_from_the_host(
    times: int, token_ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compile_to(MODELS["llama"](), tmp_path / "whole", token_ids)
    short_in_rounding(monkeypatch, times)
    found = compile_to(MODELS["llama"](), tmp_path / "out", token_ids)
    assert all(torch.equal(t, tensors(found.path)[n]) for n, t in tensors(whole.path).items())
    again = f"ran out of memory on {FIRST} (CUDA out of memory): done again"
    assert (
        notes(found.report, "round-weights") == [again, f"{again} with its Gram matrices on the host"][:times]
    )
    told = ["inputs of 64 channels: Gram matrices are on the host between passes"]
    assert notes(found.report, "calibrate") == told[: times - 1]
    kind = "offloaded" if times == 2 else "full"
    assert held(found.report) == {n: kind if n in (FIRST, SECOND) else "full" for n in held(whole.report)}


@pytest.mark.usefixtures("as_on_a_gpu")
def test_only_what_needs_as_much_is_sampled(
    token_ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_in_rounding(monkeypatch, 3)
    report = compile_to(MODELS["llama"](), tmp_path / "out", token_ids).report
    assert [note.partition("done again")[2] for note in notes(report, "round-weights")] == [
        "",
        " with its Gram matrices on the host",
        " with a sample of tokens in the place of its Gram matrices",
    ]
    assert {name: kind for name, kind in held(report).items() if kind != "full"} == {
        FIRST: "sampled",
        SECOND: "sampled",
    }
    rounding = {row.name: row.rounding for row in report.quantized()}
    assert {rounding[name] for name in (FIRST, SECOND)} == {"nearest"}
    assert sum(how == "compensated" for how in rounding.values()) >= len(rounding) // 2


@pytest.mark.usefixtures("as_on_a_gpu")
def test_it_ends_where_nothing_is_left_to_do_without(
    token_ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_in_rounding(monkeypatch, 4)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        compile_to(MODELS["llama"](), tmp_path / "out", token_ids)
    # What was finished is continued.
    found = compile_to(MODELS["llama"](), tmp_path / "out", token_ids)
    assert "continued after 2 finished stages" in notes(found.report, "journal")
    assert set(held(found.report).values()) == {"full"}


@pytest.mark.usefixtures("as_on_a_gpu")
def test_tokens_that_have_moved_on_are_not_sampled(
    token_ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of the float model move before weights are rounded: they are behind the stage then."""
    options = {"config": QuantConfig(group_size=32, propagate="float")}
    short_in_rounding(monkeypatch, 2)
    report = compile_to(MODELS["llama"](), tmp_path / "out", token_ids, **options).report
    assert {kind for name, kind in held(report).items() if name == FIRST} == {"offloaded"}
    short_in_rounding(monkeypatch, 3)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        compile_to(MODELS["llama"](), tmp_path / "again", token_ids, **options)


def test_observing_is_done_again(token_ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observe, seen = Activations.observe, 0

    def short(self: Activations, stage: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen in (3, 4):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return observe(self, stage)

    monkeypatch.setattr(Activations, "observe", short)
    report = compile_to(MODELS["llama"](), tmp_path / "out", token_ids).report
    again = f"ran out of memory on {FIRST} (CUDA out of memory): done again"
    sampled = f"{again} with a sample of tokens in the place of its Gram matrices"
    assert notes(report, "calibrate")[:2] == [again, sampled]
    assert {name for name, kind in held(report).items() if kind == "sampled"} == {FIRST, SECOND}


def test_a_pass_that_has_changed_something_is_not_run_again(
    token_ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fold(self: Activations, *_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(Activations, "fold", fold)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        awqc.compile(MODELS["llama"](), token_ids, config=CONFIG)
