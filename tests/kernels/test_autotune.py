"""The autotuner: when it may run, and what it finds on a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from awqc.kernels import autotune, configs, qlinear_triton
from awqc.kernels.autotune import fastest, may_tune
from awqc.kernels.qlinear_triton import TritonGemm
from awqc.kernels.triton_tile import Tile
from awqc.quantized import Scheme, quantize


def test_nothing_is_tuned_unasked_or_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWQC_AUTOTUNE", raising=False)
    assert not may_tune(torch.device("cuda"))
    monkeypatch.setenv("AWQC_AUTOTUNE", "1")
    assert not may_tune(torch.device("cpu"))


def test_a_captured_call_does_not_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWQC_AUTOTUNE", "1")
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda value=capturing: value)
        assert may_tune(torch.device("cuda")) is not capturing


def test_a_configuration_that_runs_out_of_resources_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    def milliseconds(run: Callable[[int], object], copies: int) -> float:
        run(0)
        return 1.0

    def too_large(i: int) -> None:
        raise OutOfResources(233472, 232448, "shared memory")

    monkeypatch.setattr(autotune, "graph_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "this one")
    assert fastest({"large": too_large, "small": lambda i: None}, 2) == "small"
    with pytest.raises(ValueError, match="none of 1 configurations runs on this one"):
        fastest({"large": too_large}, 2)


@pytest.mark.gpu
def test_the_configuration_of_least_time_wins() -> None:
    small, large = torch.ones(1024, device="cuda"), torch.ones(2**26, device="cuda")
    assert fastest({"large": lambda i: large + i, "small": lambda i: small + i}, 2) == "small"


@pytest.mark.gpu
def test_a_shape_is_tuned_once_and_never_while_capturing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWQC_KERNEL_CACHE", str(tmp_path))
    monkeypatch.setenv("AWQC_AUTOTUNE", "1")
    tile = Tile(block_m=8, block_n=32, warps=2, stages=2, programs=4)
    monkeypatch.setattr(qlinear_triton, "candidates", lambda tokens: [tile])
    weight = quantize(torch.randn(128, 512), Scheme(4, 128))
    tensors, constants = TritonGemm.pack(
        weight.codes.cuda(), weight.scales.cuda(), weight.zeros.cuda(), None, 4, 128
    )
    x = torch.randn(1, 512, dtype=torch.float16, device="cuda")
    key = "qlinear_triton 128x512 g128 torch.float16"

    def run() -> torch.Tensor:
        return TritonGemm.op(x, *tensors.values(), *constants)

    monkeypatch.setenv("AWQC_AUTOTUNE", "0")
    run()  # compiled, so that it can be captured
    monkeypatch.setenv("AWQC_AUTOTUNE", "1")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        run()
    assert configs.tuned(key, x.device) is None
    run()
    assert configs.tuned(key, x.device) is not None
    monkeypatch.setattr(qlinear_triton, "tune", None)  # not again
    run()
