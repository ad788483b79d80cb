"""Limits of memory: what is stated, what is chosen under them, and compiles that run within one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import awqc
from awqc import QuantConfig
from awqc.errors import ConfigError
from awqc.memory import (
    ROUNDED_AT_ONCE,
    MemoryLimit,
    choose_kind,
    memory_limit,
    rounded_at_once,
    stage_bytes,
)
from awqc.observers.activations import Activations
from awqc.observers.grams import SampledGram
from awqc.observers.input_statistics import InputStatistics
from awqc.observers.samples import Samples
from awqc.passes.round_weights import RoundWeights
from awqc.quantization.loss import gram_blocks, output_loss
from tests.test_streaming import MODELS, compile_to, tensors

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
CONFIG = QuantConfig(group_size=32)


@pytest.fixture
def any_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of tests are smaller than the least that statistics take: no limit would fit them that does
    anything. Whether a stage fits is another test's matter (test_needs.py)."""
    monkeypatch.setattr("awqc.pipeline.check_fits", lambda *_: None)


# -- what is stated ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "device", "limit"),
    [
        (None, CPU, (None, None)),
        ("1.5GB", CPU, (1_500_000_000, 1_500_000_000)),
        ("2GiB", GPU, (2 << 30, None)),
        (4096, GPU, (4096, None)),
        ("4096", CPU, (4096, 4096)),
        ({"cuda:1": "10GB", "cpu": "30GB"}, GPU, (10**10, 3 * 10**10)),
        ({1: "10GB"}, GPU, (10**10, None)),
        ({0: "10GB", "cpu": "1GB"}, GPU, (None, 10**9)),
        ({"cpu": "1GB"}, CPU, (10**9, 10**9)),
    ],
)
def test_limits_are_read(stated: Any, device: torch.device, limit: tuple[int | None, int | None]) -> None:
    assert memory_limit(stated, device) == MemoryLimit(*limit)


@pytest.mark.parametrize("stated", ["ten", "-1", "0", {"cpu": "much"}, {"nowhere:": "1GB"}])
def test_limits_that_are_none(stated: Any) -> None:
    with pytest.raises(ConfigError, match="max_memory"):
        memory_limit(stated, CPU)


def observer(width: int, *rows: int) -> Any:
    """Linears ``(rows, width)`` that read one activation."""
    views = tuple(SimpleNamespace(out_features=n, in_features=width) for n in rows)
    return SimpleNamespace(views=views, linears=views, stacks=(), in_features=width)


@pytest.mark.parametrize(
    ("linears", "limit", "device", "kind"),
    [
        # The down projection of 8 and of 70 billion parameters, and the pair in front of it.
        ((14336, 4096), 8.5, GPU, "full"),
        ((14336, 4096), 5.5, GPU, "offloaded"),
        ((14336, 4096), 5.5, CPU, "sampled"),
        ((4096, 14336, 14336), 8.5, GPU, "full"),
        ((28672, 8192), 20.4, GPU, "full"),
        ((28672, 8192), 16.0, GPU, "offloaded"),
        ((28672, 8192), 80.0, GPU, "full"),
        ((28672, 8192), 10.0, GPU, "sampled"),
    ],
)
def test_the_most_exact_statistics_that_fit(
    linears: tuple[int, ...], limit: float, device: torch.device, kind: str
) -> None:
    activations = 65536 * 2 * 4 * (8192 if 28672 in linears else 4096)
    limits = MemoryLimit(int(limit * 1e9), None if device.type == "cuda" else int(limit * 1e9))
    assert choose_kind([observer(*linears)], limits, device, 128, True, activations) == kind


def test_without_a_limit_all_is_held() -> None:
    assert choose_kind([observer(28672, 8192)], MemoryLimit(), CPU, 128, True, 1 << 40) == "full"


def test_a_small_host_takes_no_gram_matrices() -> None:
    limits = MemoryLimit(55 * 10**8, 10**9)
    assert choose_kind([observer(14336, 4096)], limits, GPU, 128, True, 1 << 31) == "sampled"


def test_what_ran_out_of_memory_is_not_tried_again_on_what_needs_as_much() -> None:
    def chosen(width: int, limits: MemoryLimit) -> str:
        return choose_kind([observer(width, 8192)], limits, GPU, 128, True, 0)

    need = stage_bytes([observer(28672, 8192)], "full", 128, True, 0)
    for limits in (MemoryLimit(), MemoryLimit(80 * 10**9)):
        short = limits.without("full", need)
        assert [chosen(width, short) for width in (28544, 28672, 32768)] == ["full", "offloaded", "offloaded"]
        assert short.without("full", 2 * need) == short
        # Of two kinds that did not fit, each is remembered for itself.
        shorter = short.without("offloaded", stage_bytes([observer(30720, 8192)], "offloaded", 128, True, 0))
        found = [chosen(width, shorter) for width in (28544, 28672, 32768)]
        assert found == ["full", "offloaded", "sampled"]


def test_as_many_rows_are_rounded_at_once_as_there_is_room_for() -> None:
    """More on a GPU, within the limit; the least on a CPU, and where a stage has run out of memory."""
    stage, activations = [observer(8192, 28672, 28672)], 65536 * 2 * 4 * 8192
    need = stage_bytes(stage, "full", 128, True, activations)
    before = ROUNDED_AT_ONCE
    for size in (need - 1, need, need + 10**9, need + 10**10):
        limits = MemoryLimit(size)
        found = rounded_at_once(stage, "full", limits, GPU, 128, activations)
        assert found >= before
        assert (found > ROUNDED_AT_ONCE) == (size > need)
        assert stage_bytes(stage, "full", 128, True, activations, found) <= max(size, need)
        short = limits.without("sampled", 1)
        assert rounded_at_once(stage, "full", short, GPU, 128, activations) == ROUNDED_AT_ONCE
        assert rounded_at_once(stage, "full", limits, CPU, 128, activations) == ROUNDED_AT_ONCE
        before = found


# -- sampled Gram matrices ---------------------------------------------------------------------------------


def both(tokens: int, width: int = 96, group: int = 32) -> tuple[InputStatistics, InputStatistics]:
    """The same tokens in full and sampled statistics."""
    generator = torch.Generator().manual_seed(0)
    found = (
        InputStatistics.empty(width, CPU),
        InputStatistics.empty(width, CPU, "sampled", group, tokens),
    )
    for index in range(8):
        x = torch.randn(tokens // 8, width, generator=generator) * torch.logspace(-1, 1, width)
        for one in found:
            one.add(x, held_out=index == 7)
    for one in found:
        one.finish()
    return found


@pytest.mark.parametrize("width", [96, 80])
def test_blocks_are_exact_and_losses_estimates(width: int) -> None:
    full, sampled = both(64 * 512, width)
    assert isinstance(full.gram, Tensor)
    assert isinstance(sampled.gram, SampledGram)
    eps = 64 * torch.finfo(torch.float32).eps
    expected = gram_blocks(full.gram, 32)
    assert (gram_blocks(sampled.gram, 32) - expected).abs().max() <= 2 * 512 * eps * expected.max()
    assert torch.allclose(sampled.gram.diagonal(), full.gram.diagonal(), rtol=512 * eps)
    assert (full.tokens, sampled.tokens) == (64 * 448, 64 * 448)
    assert sampled.gram.taken <= 2048 < 64 * 448
    error = torch.randn(16, width, generator=torch.Generator().manual_seed(1)) / 16
    for a, b in ((full.gram, sampled.gram), (full.held_out, sampled.held_out)):
        exact, estimate = output_loss(error, a), output_loss(error, b)
        # The mean of so many squares of normal numbers, over 16 rows that are nearly independent.
        assert abs(float(estimate / exact) - 1) < 5 * (2 / 2048) ** 0.5


def test_few_tokens_are_all_in_the_sample() -> None:
    full, sampled = both(1024)
    error = torch.randn(16, 96, generator=torch.Generator().manual_seed(1))
    for a, b in ((full.gram, sampled.gram), (full.held_out, sampled.held_out)):
        assert torch.allclose(output_loss(error, a), output_loss(error, b), rtol=1e-4)
    assert isinstance(sampled.gram, SampledGram)
    assert isinstance(full.gram, Tensor)
    assert torch.allclose(sampled.gram.diagonal_blocks(48), gram_blocks(full.gram, 48), rtol=1e-3, atol=1e-2)


def test_a_fold_of_a_sampled_one_is_exact() -> None:
    full, sampled = both(1024)
    scales = torch.exp2((torch.arange(96) % 5 - 2).float())
    error = torch.randn(16, 96, generator=torch.Generator().manual_seed(1))
    before = output_loss(error, sampled.gram)
    sampled.fold(scales)
    full.fold(scales)
    # Powers of two: a weight that undoes the scales loses the same to the last bit.
    assert torch.equal(output_loss(error * scales, sampled.gram), before)
    assert torch.equal(sampled.mean_abs, full.mean_abs)


# -- samples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_samples_come_back_as_they_were(place: Any, tmp_path: Path) -> None:
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(name) for name in "abc"]
    samples = Samples(3, CPU, place, tmp_path)
    given = [
        {nodes[0]: torch.randn(4, i + 1), nodes[1]: torch.arange(i)[1:], nodes[2]: torch.tensor(i == 1)}
        for i in range(3)
    ]
    for index, env in enumerate(given):
        samples[index] = env
    for _ in range(2):
        for env, found in zip(given, samples, strict=True):
            assert all(torch.equal(value, found[node]) for node, value in env.items())
    changed = samples[1]
    samples[1] = {nodes[0]: changed[nodes[0]] * 2}
    assert torch.equal(samples[1][nodes[0]], given[1][nodes[0]] * 2)
    assert len(list(tmp_path.iterdir())) == (place == "disk")
    samples.close()
    assert list(tmp_path.iterdir()) == []


# -- compiles ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("any_limit")
@pytest.mark.parametrize("name", MODELS)
def test_a_compile_within_very_little(name: str, token_ids: Tensor, tmp_path: Path) -> None:
    """Made-up weights in checks, sampled statistics, activations on disk; and still better than rounding."""
    source = tmp_path / "source"
    MODELS[name]().save_pretrained(source)
    ids = token_ids % 90
    written = compile_to(source, tmp_path / "out", ids, max_memory="40KB")
    notes = [what for _, what in written.report.notes]
    assert any("made-up weights" in note for note in notes)
    assert "activations are kept on the disk between stages" in notes
    assert any("only the blocks of quantization groups" in note for note in notes)
    # The group of the last norm is for the head alone, which stays in float and is not observed.
    assert {group.statistics for group in written.report.groups.values()} <= {"sampled", ""}
    assert {row.rounding for row in written.report.quantized()} == {"nearest"}
    rows = list(written.report.quantized())
    losses = [[(row.energy or 0.0) * (e or 0.0) for e in (row.error, row.nearest_error)] for row in rows]
    assert sum(found for found, _ in losses) < sum(nearest for _, nearest in losses)
    assert written.report.proof["relative_error"] < 1e-9
    again = compile_to(source, tmp_path / "again", ids, max_memory="40KB")
    found = tensors(again.path)
    assert all(torch.equal(t, found[n]) for n, t in tensors(written.path).items())


def test_wide_activations_are_computed_twice(
    token_ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And come out as if they had been kept."""
    observe, grams = Activations.observe, list[Tensor]()

    def watch(self: Activations, stage: Any) -> Any:
        found = observe(self, stage)
        grams.extend(one.gram for one in found.values() if isinstance(one.gram, Tensor))
        return found

    monkeypatch.setattr(Activations, "observe", watch)
    ids = token_ids.repeat(4, 1)
    nearest = awqc.Pipeline.default().replace("round-weights", RoundWeights(method="nearest"))
    for name in ("search-scales", "fold-scales", "clip-weights"):
        nearest = nearest.remove(name)
    options = {"config": QuantConfig(group_size=32, propagate_dtype="float32"), "pipeline": nearest}
    compile_to(MODELS["llama"](), tmp_path / "free", ids, **options)
    # 1024 tokens of 64 + 64 channels, between blocks, are 524 kB; of 64 + 128, in front of down, 786 kB. A
    # share of 0.3 of the limit may stay.
    tight = compile_to(MODELS["llama"](), tmp_path / "tight", ids, max_memory="2200KB", **options)
    notes = [what for _, what in tight.report.notes]
    assert "wide activations are computed twice to save memory" in notes
    assert not any("between stages" in note or "only the blocks" in note for note in notes)
    assert len(grams) == 16
    for kept, again in zip(grams[:8], grams[8:], strict=True):
        # A few products more or less in another order, over two layers.
        assert (kept - again).abs().max() <= 1024 * torch.finfo(torch.float32).eps * kept.max()
