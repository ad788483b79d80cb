"""The compiled host side of marlin's ops: what it launches, and when it leaves a call to Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from awqc.kernels import extension
from awqc.kernels.extension import BuildError, build
from tests.kernels.on_host import COMPILER

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    script = Path(__file__).with_name("extension_on_cpu.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path_factory.mktemp("extension"))],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_compiler
def test_what_is_launched(run: dict[str, Any]) -> None:
    at = run["addresses"]
    assert (run["shape"], run["dtype"]) == ([1, 3, 100], "torch.float16")
    plain, gated, add = run["launched"]
    for launch in run["launched"]:
        assert launch["sizes"] == [7, 1, 1, 256, 1, 1, 5000]
        assert launch["stream"] == 77
        assert launch["map_aligned"]
        # Tokens, strips of all rows, blocks of channels, rows of a box.
        assert launch["numbers"] == [3, 8, 1, 4]
        assert launch["attributes"] == [[6, 0, 1, 0, 0]]  # a dependent launch
    assert plain["weights"] == [[at["packed"], at["bias"], 0, at["y"], 0, 100]]
    assert gated["weights"] == [[at["packed"], 0, 0, at["z"], 0, 100], [at["up"], 0, 0, at["z"], 0, 100]]
    assert add["weights"] == [[at["packed"], 0, at["residual"], at["w"], 0, 100]]


@needs_compiler
def test_the_tensor_map_is_made_once_and_as_in_python(run: dict[str, Any]) -> None:
    # float16, two dimensions, 128 channels of 3 tokens, rows of 256 bytes, boxes of 64 channels by 4 tokens.
    assert run["encoded"] == [[6, 2, run["addresses"]["x"], 128, 3, 256, 64, 4, 1, 1, 0, 3, 3, 0]]


@needs_compiler
def test_what_has_no_plan_runs_in_python(run: dict[str, Any]) -> None:
    assert run["unplanned"] == [5]
    assert run["fallbacks"] == ["qlinear_marlin"] * 8 + ["qlinear_marlin_add", "qlinear_marlin_gated"]
    assert run["launches_meanwhile"] == 0


def test_without_a_compiler_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(BuildError, match=r"^no C\+\+ compiler: install g\+\+ or clang\+\+, or set CXX$"):
        build()


def test_it_is_not_taken_where_it_is_not_or_not_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"")
    for value, file in (("0", damaged), ("", tmp_path / "nothing.so")):
        monkeypatch.setenv("AWQC_EXTENSION", value)
        monkeypatch.setattr(extension, "LIBRARY_FILE", file)
        assert extension.loaded.__wrapped__() is None
    monkeypatch.setenv("AWQC_EXTENSION", str(damaged))
    with pytest.raises(OSError, match=r"damaged\.so"):
        extension.loaded.__wrapped__()


@pytest.mark.gpu
def test_the_extension_computes_what_python_does(tmp_path: Path) -> None:
    """In a process of its own, since a library's ops stay registered."""
    script = """
import torch
from awqc.kernels import extension
from awqc.kernels.qlinear_marlin import Marlin, qlinear_marlin
assert extension.loaded() is not None
for n, k, tokens in ((4096, 4096, 1), (1000, 264, 5), (14336, 4096, 16), (64, 128, 17), (4096, 14336, 9)):
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    group = 128 if k % 128 == 0 else 64
    scales = (torch.rand(n, -(-k // group), device="cuda") * 0.02 + 0.01).half()
    zeros = torch.randint(0, 16, scales.shape, dtype=torch.uint8, device="cuda")
    tensors, constants = Marlin.pack(codes, scales, zeros, None, 4, group)
    x = torch.randn(2, tokens, k, device="cuda").half()[:1]
    want = qlinear_marlin(x, *tensors.values(), *constants)
    for _ in range(3):
        assert torch.equal(Marlin.op(x, *tensors.values(), *constants), want), (n, k, tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = Marlin.op(x, *tensors.values(), *constants)
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)
print("equal")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment["AWQC_EXTENSION"] = str(build(tmp_path / "launch.so"))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.endswith("equal\n"), done.stderr[-3000:]
