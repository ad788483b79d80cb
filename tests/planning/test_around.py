"""What a plan counts beside the passes."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

import awqc
from awqc import QuantConfig
from awqc.planning import Rates, around
from awqc.quantized import Scheme, packed_bytes
from awqc.report import Report
from awqc.work import Unit, is_view
from tests import mixtures

CONFIG = QuantConfig(group_size=32)
SAMPLES = 64


def one(unit: Unit) -> Rates:
    """Rates at which seconds are units of one kind of work."""
    return Rates(**{field: float(field == unit) for field in Rates.__dataclass_fields__})


def planned(model: Any, unit: Unit, **options: Any) -> awqc.Plan:
    return awqc.plan(model, config=CONFIG, max_calib_seq_len=16, rates=one(unit), **options)


class Counted(TorchDispatchMode):
    """Ops that compute, by what the report times."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.timed = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[self.timed] += not is_view(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_ops_are_as_many_as_are_foretold(
    kind: str, tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a factor of two; where a pass finds out by itself what it does, a plan knows no better."""
    model = tiny_llama if kind == "dense" else mixtures.build("mixtral")
    ids = torch.randint(2, 60, (SAMPLES, 16), generator=torch.Generator().manual_seed(1))
    counted = Counted()

    @contextmanager
    def timed(report: Report, name: str) -> Iterator[None]:
        before, counted.timed = counted.timed, name
        try:
            yield
        finally:
            counted.timed = before

    monkeypatch.setattr(Report, "timed", timed)
    with counted:
        awqc.compile(model, ids, backend="reference", config=CONFIG)
    plan = planned(model, "calls", max_calib_samples=SAMPLES)
    for name in ("run-tokens", "calibrate", "fold-scales", "clip-weights"):
        assert 0.5 < plan.seconds[name] / counted.found[name] < 2, name


def test_codes_of_every_stage_are_brought_to_the_host(tiny_llama: LlamaForCausalLM) -> None:
    plan = planned(tiny_llama, "unloaded")
    packed = sum(packed_bytes(r.out_features, r.in_features, Scheme(4, 32)) for r in plan.report.quantized())
    assert plan.seconds["journal"] == pytest.approx(packed)
    assert plan.seconds["save"] == pytest.approx(packed)


def test_large_weights_and_stacks_are_read_through_memory_that_is_not_page_locked(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert planned(tiny_llama, "paged").seconds["check"] == 0
    assert planned(mixtures.build("mixtral"), "paged").seconds["check"] > 0
    loaded = planned(tiny_llama, "loaded").seconds["check"]
    assert loaded > 0
    monkeypatch.setattr(around, "LOCKED_MOST", 0)
    assert planned(tiny_llama, "paged").seconds["check"] == pytest.approx(loaded)


def test_what_is_done_once_is_counted_once(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    plan = planned(tiny_llama, "starts")
    assert plan.seconds["start"] == pytest.approx(1, abs=0.01)  # no code has to be imported for a module
    tiny_llama.config.save_pretrained(tmp_path)
    assert planned(tmp_path, "starts").seconds["start"] > 1
