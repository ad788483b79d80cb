"""Timing launch configurations against each other on the device at hand.

Nothing is tuned unless ``AWQC_AUTOTUNE=1``: kernels come with configurations that were measured. Then the
first call of a shape tunes it and the result is kept on disk (:mod:`awqc.kernels.configs`). A call that is
being captured into a CUDA graph, or traced, never tunes.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

#: Times that each configuration runs over all copies of the operands; the median counts.
REPEATS = 5

C = TypeVar("C")


def may_tune(device: torch.device) -> bool:
    """Whether a call on ``device`` may stop to tune: asked for, on a GPU, and not being captured."""
    return (
        os.environ.get("AWQC_AUTOTUNE") == "1"
        and device.type == "cuda"
        and not torch.cuda.is_current_stream_capturing()
    )


def fastest(runs: Mapping[C, Callable[[int], object]], copies: int) -> C:
    """The configuration whose ``run(i)``, ``i`` in ``range(copies)``, takes the least time in a CUDA graph.

    Args:
        runs: what to run by configuration. One that asks for more than the device has is left out.
        copies: copies of the operands, together larger than the cache, so that each run reads memory.

    Raises:
        ValueError: if no configuration runs.
    """
    from triton.runtime.errors import OutOfResources

    times: dict[C, float] = {}
    for config, run in runs.items():
        try:
            times[config] = graph_milliseconds(run, copies)
        except OutOfResources:
            continue
    if not times:
        raise ValueError(f"none of {len(runs)} configurations runs on {torch.cuda.get_device_name()}")
    return min(times, key=times.__getitem__)


def graph_milliseconds(run: Callable[[int], object], copies: int) -> float:
    """Milliseconds that ``run(0)`` to ``run(copies - 1)`` take together in one CUDA graph: a median."""
    run(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            run(i)
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # what is launched behind it does not wait for the host
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
