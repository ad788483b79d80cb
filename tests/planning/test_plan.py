"""A plan against the compile that it foretells."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import awqc
from awqc import Context, Pass, Pipeline, Plan, QuantConfig
from awqc.errors import ConfigError
from awqc.graph import Graph
from awqc.memory import MemoryLimit
from awqc.needs import Needs, StageNeeds
from awqc.planning import Rates, measure
from awqc.planning.plan import _memory
from awqc.runtime.compiled import CompiledModel
from awqc.storage.source import skeleton
from tests import mixtures

CONFIG = QuantConfig(group_size=32, keep=("*.0.self_attn.q_proj",))


@pytest.fixture(scope="module")
def rates() -> Rates:
    return measure()


@pytest.fixture(scope="module")
def directory(tiny_llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_llama.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def compiled(directory: Path, token_ids: Tensor) -> CompiledModel:
    return awqc.compile(directory, token_ids, backend="reference", config=CONFIG)


@pytest.fixture(scope="module")
def planned(directory: Path, token_ids: Tensor, rates: Rates) -> Plan:
    samples, tokens = token_ids.shape
    return awqc.plan(
        directory,
        backend="reference",
        config=CONFIG,
        max_calib_samples=samples,
        max_calib_seq_len=tokens,
        rates=rates,
    )


def test_decisions_are_those_of_the_compile(planned: Plan, compiled: CompiledModel) -> None:
    report = compiled.report
    assert planned.tokens == report.calibration["tokens"]
    assert planned.report.linears.keys() == report.linears.keys()
    for name, row in planned.report.linears.items():
        done = report.linears[name]
        assert (row.decision, row.reason, row.group) == (done.decision, done.reason, done.group)
    assert {n: g.alive for n, g in planned.report.groups.items()} == {
        n: g.alive for n, g in report.groups.items()
    }
    assert planned.report.coverage == report.coverage


def test_sizes_are_those_of_the_compile(planned: Plan, compiled: CompiledModel, directory: Path) -> None:
    for name, size in compiled.report.sizes.items():
        assert planned.sizes.get(name, size) == size
    assert planned.sizes["stored"] == (directory / "model.safetensors").stat().st_size


def test_every_pass_that_takes_time_is_foretold(planned: Plan, compiled: CompiledModel) -> None:
    staged = {each.name for each in Pipeline.default() if each.scope == "stage"} | {"run-tokens"}
    assert staged <= planned.seconds.keys()
    assert all(planned.seconds[name] > 0 for name in staged)
    assert sum(stage.matrices for stage in planned.stages) == len(list(compiled.report.quantized()))
    assert planned.notes == []


def test_tokens_cost_what_tokens_do(directory: Path, planned: Plan, rates: Rates) -> None:
    more = awqc.plan(
        directory, config=CONFIG, max_calib_samples=32, max_calib_seq_len=planned.seq_len, rates=rates
    )
    ratio = 32 / planned.samples
    assert more.seconds["search-scales"] == pytest.approx(planned.seconds["search-scales"])
    for name in ("calibrate", "run-tokens"):
        assert planned.seconds[name] < more.seconds[name] <= ratio * planned.seconds[name]


def test_no_weight_is_read(directory: Path, planned: Plan, rates: Rates, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    bare = awqc.plan(tmp_path, config=CONFIG, max_calib_seq_len=planned.seq_len, rates=rates)
    assert bare.report.linears == planned.report.linears
    # The files have headers.
    assert 0 < planned.sizes["stored"] - bare.sizes["stored"] < 4096
    on_meta = awqc.plan(skeleton(directory), config=CONFIG, rates=rates)
    assert on_meta.report.linears == planned.report.linears


def test_experts_are_matrices(rates: Rates) -> None:
    model = mixtures.build("mixtral")
    planned = awqc.plan(model, config=QuantConfig(group_size=32), max_calib_seq_len=16, rates=rates)
    stacks = [row for row in planned.report.quantized() if row.expert_count]
    dense = [row for row in planned.report.quantized() if not row.expert_count]
    assert sum(s.matrices for s in planned.stages) == len(dense) + sum(r.expert_count or 0 for r in stacks)
    assert sum(s.parameters for s in planned.stages) == sum(r.parameters for r in planned.report.quantized())


@dataclass(frozen=True)
class Silent(Pass):
    name: ClassVar[str] = "silent"
    scope: ClassVar = "stage"

    def run(self, graph: Graph, context: Context) -> None:
        raise AssertionError("a plan runs no pass on a stage")


def test_what_is_not_known_is_said(directory: Path, rates: Rates) -> None:
    pipeline = Pipeline.default().insert_before("clip-weights", Silent())
    planned = awqc.plan(directory, config=CONFIG, pipeline=pipeline, rates=rates)
    assert planned.notes == ["silent does not say what it will do: its time is not in the estimate"]


def test_cheaper_pipelines_are_foretold_to_be(directory: Path, planned: Plan, rates: Rates) -> None:
    cheap = Pipeline.default().with_options("round-weights", method="nearest").remove("clip-weights")
    found = awqc.plan(directory, config=CONFIG, pipeline=cheap, rates=rates)
    assert "clip-weights" not in found.seconds
    assert found.seconds["round-weights"] < planned.seconds["round-weights"]


def test_a_pipeline_without_calibration(directory: Path, rates: Rates) -> None:
    bare = Pipeline(Pipeline.default().passes[:2])
    with pytest.raises(ConfigError, match="calibrates nothing"):
        awqc.plan(directory, config=CONFIG, pipeline=bare, rates=rates)


def test_rates_are_measured_where_none_are_given(directory: Path) -> None:
    found: Any = awqc.plan(directory, config=CONFIG, max_calib_samples=1, max_calib_seq_len=16)
    assert found.total_seconds > 0
    assert replace(found, seconds={}).total_seconds == 0
    assert torch.device(found.device).type == "cpu"


def test_checks_on_made_up_weights_take_longer(directory: Path, planned: Plan, rates: Rates) -> None:
    """They are made for every op that reads them; with all else known, that is the difference."""
    found = awqc.plan(directory, config=CONFIG, max_calib_seq_len=16, max_memory="100KB", rates=rates)
    whole = awqc.plan(directory, config=CONFIG, max_calib_seq_len=16, rates=rates)
    assert found.seconds["check"] > whole.seconds["check"]
    weights, made = whole.sizes["model_before"] // 2, 4 * rates.streamed
    # Two runs in float32, of which each makes what it reads: written, scaled and read, in place of read once.
    difference = found.seconds["check"] - whole.seconds["check"]
    assert difference == pytest.approx(2 * 4 * made * weights)


def test_what_is_read_in_the_background_waits_for_slow_disks_alone(directory: Path, rates: Rates) -> None:
    def seconds(read: float) -> dict[str, float]:
        slow = replace(rates, read=read)
        return awqc.plan(directory, config=CONFIG, max_calib_seq_len=16, rates=slow).seconds

    assert seconds(0.0)["read"] == 0.0
    found = seconds(1.0)
    # Tracing takes another time each time; it is among what reading does not wait for.
    assert sum(found.values()) == pytest.approx((directory / "model.safetensors").stat().st_size)


def test_memory_of_the_host_beside_a_gpu() -> None:
    """Two shards while a checkpoint is written; a large table once while it is read back; Gram matrices that
    are kept from the device."""
    gigabyte = 10**9
    sizes = {"model_after": 40 * gigabyte, "linears_after": 36 * gigabyte, "largest": gigabyte}

    def host(offloaded: int, **changed: int) -> int:
        stage = StageNeeds("down", "full", 0, 0, offloaded, 0, 0)
        needs = Needs([stage], "device", 0)
        found = _memory(gigabyte, 0, needs, sizes | changed, MemoryLimit(), torch.device("cuda"))
        return found["host"] // gigabyte

    assert host(0) == 1 + 4 + 2
    assert host(9 * gigabyte) == 1 + 9
    assert host(0, model_after=3 * gigabyte, linears_after=gigabyte) == 1 + 3
    assert host(0, largest=3 * gigabyte) == 1 + 12
