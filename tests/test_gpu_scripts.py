"""The scripts that check kernels on a GPU, where there is none: what they notice, and what they survive."""

from __future__ import annotations

import importlib.util
import random
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.kernels import uninterpreted

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_part_that_fails_or_hangs_hides_no_other(tmp_path: Path) -> None:
    check = script("gpu_check")
    parts = [
        check.Part("bad", ("-c", "raise SystemExit('no')"), 20),
        check.Part("slow", ("-c", "import time; print('begun', flush=True); time.sleep(60)"), 3),
        check.Part("good", ("-c", "print('fine')"), 20),
        check.Part("untold", ("-c", ""), 20, tool=("no-such-tool", "--option")),
        check.Part("timed", ("-c", "print('12 us')"), 20, stage=2),
    ]
    done = check.run(parts, tmp_path, 2, time.monotonic() + 60)
    results = {one.part.name: (one.result, (one.text() or [""])[-1]) for one in done}
    assert results["bad"] == ("exit 1", "no")
    assert results["slow"][0] == "stopped"
    assert results["good"] == ("ok", "fine")
    assert results["untold"] == ("exit 1", "no-such-tool is not installed")
    assert results["timed"] == ("ok", "12 us")
    assert done[-1].part.name == "timed"


def test_nothing_begins_after_the_time_is_up(tmp_path: Path) -> None:
    check = script("gpu_check")
    assert check.run([check.Part("late", ("-c", ""), 20)], tmp_path, 2, time.monotonic() - 1) == []


class Wrong:
    """The reference, one group of one row of whose weights is off by ``factor``."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    @property
    def __name__(self) -> str:
        return "Wrong"

    def pack(self, codes: Any, scales: Any, zeros: Any, bias: Any, bits: int, group_size: int) -> Any:
        changed = scales.float()
        changed[0, 0] *= self.factor
        return {"codes": codes, "scales": changed, "zeros": zeros, "bias": bias}, (group_size,)

    def op(self, *arguments: Any) -> torch.Tensor:
        return torch.ops.awqc.qlinear(*arguments)


@pytest.mark.parametrize(("factor", "noticed"), [(1.0, False), (1.5, True), (float("nan"), True)])
def test_random_shapes_notice_a_wrong_group(factor: float, noticed: bool) -> None:
    shapes = script("random_shapes")
    case = shapes.Case(48, 256, 9, 4, 64, True, True, "fp16", "fp16", 0, 1)
    found = shapes.check(Wrong(factor), case, torch.device("cpu"))
    assert (found is not None) is noticed


def test_random_shapes_are_of_all_kinds() -> None:
    shapes, source = script("random_shapes"), random.Random(0)
    cases = [shapes.draw(source, seed, experts=False) for seed in range(300)]
    for field in ("bits", "group_size", "zero_point", "bias", "dtype", "scales"):
        assert len({getattr(case, field) for case in cases}) > 1, field
    assert any(case.k % case.group_size for case in cases if case.group_size > 0)
    assert any(case.n % 64 for case in cases)


#: What is compiled is asked of a process that does not interpret, as this one may.
ALIKE = """
import itertools, random
import torch
from awqc.kernels.hardware import assumed, known
from awqc.kernels.registry import kernels
from tests.test_gpu_scripts import script

shapes = script("random_shapes")
for name in ("triton", "experts"):
    op, of = shapes.KERNELS[name]
    with assumed(known()["h200"]):
        source, cuda = random.Random(1003), torch.device("cuda")
        problems = shapes.Problems(kernels(op)[of], op == "qexperts", cuda, source, 4e10)
        cases = list(itertools.islice(problems.all(8), 64))
        codes = [shapes.codes_of(problems.kernel, case, known()["h200"]) for case in cases]
    assert all(problems.takes(case) for case in cases)
    variants = [code for i, code in enumerate(codes) if code not in codes[:i]]
    assert len(variants) <= 16, (name, len(variants))
    # What is free within a variant was drawn anew.
    assert len({(case.n, case.k) for case in cases}) >= 60
    for field in ("tokens", "bits", "zero_point", "seed"):
        assert len({getattr(case, field) for case in cases[:8]}) > 1, field
    for field in ("dtype", "scales", "group_size", "tokens"):
        assert len({getattr(case, field) for case in cases}) > 1, field
    assert any(case.n % 16 for case in cases)
    assert any(case.k % 64 for case in cases)
"""


def test_random_shapes_share_machine_code_when_asked() -> None:
    pytest.importorskip("triton")
    uninterpreted.run("-c", ALIKE)


def test_what_a_sweep_tries_begins_with_what_ships() -> None:
    """In a process of its own: the script's neighbour is named as a folder of this project is."""
    command = """
import sys
sys.path.insert(0, sys.argv[1])
import gpu_sweep
for n, k in gpu_sweep.SHAPES:
    for kernel in ("marlin", "wide", "wide-bf16"):
        for m in gpu_sweep.TOKENS[kernel]:
            found = gpu_sweep.CANDIDATES[kernel](n, k, m)
            assert len(set(found)) == len(found) > 1, (n, k, m)
            print(n, k, m, type(found[0].config).__name__)
"""
    lines = set(uninterpreted.run("-c", command, str(BENCHMARKS)).splitlines())
    assert {"4096 4096 128 PairTiling", "14336 4096 128 WideTiling", "4096 4096 512 ManyTiling"} <= lines
