"""The read that floors come from."""

from __future__ import annotations

import pytest
import torch

from awqc.kernels import nvrtc, streaming_read
from awqc.kernels.cuda_launch import read_source
from awqc.kernels.streaming_read import call_seconds, streaming_seconds


def test_more_bytes_take_longer() -> None:
    """By far: what is asked for is 64 times as much."""
    device = torch.device("cpu")
    assert 0 < streaming_seconds(1 << 18, device) < streaming_seconds(1 << 24, device)


def test_calls_go_round_more_than_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    read: list[int] = []

    def watched(copies: list[torch.Tensor]) -> float:
        seen.update(copy.data_ptr() for copy in copies)
        read.append(sum(copy.nbytes for copy in copies))
        return 1.0

    monkeypatch.setattr(streaming_read, "_by_reduction", watched)
    streaming_seconds(1 << 22, torch.device("cpu"))
    assert len(seen) == 80
    assert read == [streaming_read.ROTATED]


def test_the_first_call_does_not_count() -> None:
    called: list[int] = []
    assert len(call_seconds(called.append, budget=0.0)) == 3
    assert called == [0, 1, 2, 3]


@pytest.mark.skipif(not nvrtc.available(), reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_kernel_compiles(arch: str) -> None:
    source = read_source("streaming_read.cu")
    assert b"read_all" in nvrtc.compile_source(source, arch, {"UNROLL": 4}, name="streaming_read.cu")
