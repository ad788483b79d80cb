"""The least time in which a device reads so many bytes from memory: what kernels are held to."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from awqc.kernels.autotune import graph_milliseconds
from awqc.kernels.cuda_launch import CudaKernel, read_source
from awqc.kernels.hardware import hardware
from awqc.kernels.nvrtc import architecture, compile_source

#: Bytes that calls go round, so that each reads memory and not a cache.
ROTATED = 320 << 20
_SOURCE, _THREADS = "streaming_read.cu", 512


def streaming_seconds(size: int, device: torch.device) -> float:
    """Seconds that the best of some ways of reading ``size`` bytes once takes on ``device``.

    On NVIDIA's GPUs a kernel that does nothing else (``streaming_read.cu``), in a CUDA graph; elsewhere the
    fastest of torch's reductions.
    """
    copies = copies_to_read(size, device)
    if device.type == "cuda" and torch.version.hip is None:
        calls = max(20, len(copies))
        return min(graph_milliseconds(read, calls) / calls / 1e3 for read in reads_on_cuda(copies))
    return _by_reduction(copies)


def copies_to_read(size: int, device: torch.device) -> list[Tensor]:
    """Tensors of ``size`` bytes, more of them than a cache holds."""
    count = max(2, -(-ROTATED // size))
    return [torch.ones(size // 16 * 2, dtype=torch.int64, device=device) for _ in range(count)]


def reads_on_cuda(copies: list[Tensor]) -> list[Callable[[int], None]]:
    """Ways of reading the i-th of ``copies`` (modulo their number) and nothing else."""
    device = copies[0].device
    at = hardware(device)
    assert at.capability is not None
    arch = architecture(at.capability)
    found = torch.zeros(1, dtype=torch.int32, device=device)
    ways: list[Callable[[int], None]] = []
    for unroll in (4, 8):
        cubin = compile_source(read_source(_SOURCE), arch, {"UNROLL": unroll}, name=_SOURCE)
        read = CudaKernel(cubin, "read_all", "PPq", device.index or 0)
        for blocks in (1, 2, 4):

            def run(i: int, read: CudaKernel = read, blocks: int = blocks) -> None:
                copy = copies[i % len(copies)]
                arguments = (copy.data_ptr(), found.data_ptr(), copy.nbytes // 16)
                read.launch((at.processors * blocks,), (_THREADS,), arguments)

            ways.append(run)
    return ways


def _by_reduction(copies: list[Tensor]) -> float:
    ways: list[Callable[[Tensor], object]] = [
        lambda data: data.sum(),
        lambda data: data.view(torch.float32).sum(),
        lambda data: data.view(torch.float32).amax(),
    ]
    return min(min(call_seconds(partial(_cycled, way, copies))) for way in ways)


def _cycled(way: Callable[[Tensor], object], copies: list[Tensor], i: int) -> None:
    way(copies[i % len(copies)])


def call_seconds(run: Callable[[int], object], budget: float = 0.2, most: int = 200) -> list[float]:
    """Wall times of ``run(1)``, ``run(2)``, ... within ``budget`` seconds, three at least, but not of
    ``run(0)``."""
    run(0)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 3 or (len(times) < most and time.perf_counter() - begun < budget):
        start = time.perf_counter()
        run(len(times) + 1)
        times.append(time.perf_counter() - start)
    return times
