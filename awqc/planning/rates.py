"""How fast this machine does each unit of work, by doing a little of each."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from awqc.backend import Backend
from awqc.calibration.together import TOKENS
from awqc.checkpoints.tensors import TensorInfo, page_locked, read_tensor
from awqc.memory import added_rows
from awqc.observers.input_statistics import InputStatistics, gram_block
from awqc.observers.products import RoundedLinear, gram_products, propagation_dtype
from awqc.quantization.clipping import clipped_grid
from awqc.quantization.columns import ColumnGrid
from awqc.quantization.loss import gram_blocks
from awqc.quantization.rounding import compensated_codes, feedback, visiting_order
from awqc.quantized import Scheme, minmax_grid, quantize
from awqc.runtime.lowering import lower_linear
from awqc.work import Work, is_view

#: Seconds that one kind of work is repeated for, and times at least; and on a GPU, which works on one while
#: it is given the next, times between two waits for it.
_SECONDS, _TIMES, _QUEUED = 0.15, 3, 8
#: Width of the matrices that are worked on, on the CPU and on a GPU, which is slow on small ones.
_WIDTH = (1024, 4096)
#: Rows of a weight that has few, rows of an input, as many as move together, and inputs.
_FEW, _ROWS, _INPUTS = 64, TOKENS, 4
#: Candidates for the grid of so many rows of one group: small ops as passes run them.
_CANDIDATES, _SMALL_ROWS = (1.0, 0.8), 8
#: Elements of a tensor that no cache holds.
_LARGE = 1 << 24
#: Bytes of the file that is written and read.
_FILE = 1 << 27


@dataclass(frozen=True)
class Rates:
    """Seconds for one unit of each kind of work; see :data:`awqc.work.Unit`."""

    flops: float
    grams: float
    rounded: float
    moved: float
    streamed: float
    clipped: float
    columns: float
    elements: float
    factored: float
    calls: float
    read: float
    loaded: float
    paged: float
    unloaded: float
    written: float
    packed: float
    starts: float

    def seconds(self, work: Work) -> float:
        """What ``work`` takes."""
        taken = asdict(self)
        return float(sum(amount * taken[unit] for unit, amount in work.items()))


def measure(
    device: torch.device | str = "cpu",
    scheme: Scheme | None = None,
    propagate_dtype: str = "auto",
    backend: str | Backend = "auto",
    folder: Path | None = None,
) -> Rates:
    """Measure all rates; a few seconds.

    Args:
        device: that computes.
        scheme: of the weights.
        propagate_dtype: as in :class:`awqc.QuantConfig`.
        backend: that packs.
        folder: on the disk that is written to; the system's for temporary files by default.
    """
    began, device, scheme = time.perf_counter(), torch.device(device), scheme or Scheme()
    dtype = propagation_dtype(propagate_dtype, torch.float32, device) or torch.float32
    k = _WIDTH[device.type == "cuda"]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    normal(1)
    _wait(device)
    #: Seconds of what is done once: the device is opened, and the first call of everything takes longer.
    once = [time.perf_counter() - began]

    def taken(work: Callable[[], object]) -> float:
        first, each = _taken(work, device)
        once.append(max(first - each, 0.0))
        return each

    at_once = max(1, added_rows(k) // _ROWS)

    def adding() -> None:
        with gram_products(propagation_dtype(propagate_dtype, torch.float32, device), device):
            for _ in range(at_once):
                statistics.add(next(inputs), held_out=True)

    # Tokens move through memory, not through a cache: every call has an input that is not warm.
    inputs = itertools.cycle([normal(_ROWS, k) for _ in range(_INPUTS)])
    weight, few = normal(k, k), normal(_FEW, k)
    statistics, moving = InputStatistics.empty(k, device), RoundedLinear(dtype)
    for _ in range(2 * k // _ROWS):
        statistics.add(next(inputs), held_out=False)
    statistics.finish()
    assert isinstance(statistics.gram, Tensor)
    gram = statistics.gram.clone()
    blocks, order = gram_blocks(gram, scheme.group(k)), visiting_order(gram)
    factor, quantized = feedback(gram, order), quantize(weight, scheme)

    def rounding(weight: Tensor) -> float:
        grid = ColumnGrid.of(minmax_grid(weight, scheme), order)
        return taken(lambda: compensated_codes(weight, grid, factor, order))

    # Steps of one column take so long however few rows there are, and more with each row.
    narrow, wide = rounding(few), rounding(weight)
    element = max(wide - narrow, 0.0) / ((k - _FEW) * k)
    group, large = scheme.group(k), torch.zeros(_LARGE, device=device)
    rows, own = few[:_SMALL_ROWS, :group], gram_blocks(gram[:group, :group], group)

    def small() -> object:
        return clipped_grid(rows, scheme, own, _CANDIDATES)

    read, written = _disk(folder)
    loaded, paged, unloaded = _transfers(folder, device, taken)
    rates = Rates(
        flops=taken(lambda: weight @ weight) / (2 * k**3),
        grams=taken(adding) / (at_once * _ROWS * k * (k + gram_block(k))),
        rounded=taken(lambda: moving(next(inputs), weight)) / (2 * _ROWS * k * k),
        moved=taken(lambda: next(inputs) * next(inputs)) / (3 * few.element_size() * _ROWS * k),
        streamed=taken(lambda: large * large) / (2 * large.nbytes),
        clipped=taken(lambda: clipped_grid(weight, scheme, blocks, (1.0, 0.8))) / (2 * k * k),
        columns=max(narrow / k - _FEW * element, 0.0),
        elements=element,
        factored=taken(lambda: feedback(gram, order)) / (k**3 / 3),
        calls=taken(small) / _ops(small),
        read=read,
        loaded=loaded,
        paged=paged,
        unloaded=unloaded,
        written=written,
        packed=taken(lambda: lower_linear(quantized, None, torch.float32, device, backend)) / (k * k),
        starts=0.0,
    )
    return replace(rates, starts=sum(once))


def _taken(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of ``work`` the first time, and after it the mean of several times: where others use the
    machine too, they will do so during the compile."""
    queued = _QUEUED if device.type == "cuda" else 1
    start, times = time.perf_counter(), 0
    work()
    _wait(device)
    first, start = time.perf_counter() - start, time.perf_counter()
    while times < _TIMES or time.perf_counter() - start < _SECONDS:
        for _ in range(queued):
            work()
        _wait(device)
        times += queued
    return first, (time.perf_counter() - start) / times


class _Counted(TorchDispatchMode):
    """Counts the ops that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += not is_view(func)
        return func(*args, **(kwargs or {}))


def _ops(work: Callable[[], object]) -> int:
    """How many ops ``work`` runs."""
    with _Counted() as counted:
        work()
    return counted.ops


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _disk(folder: Path | None) -> tuple[float, float]:
    """Seconds to read a byte from a disk, and to write one to it."""
    data = os.urandom(_FILE)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):  # so that reading is not remembering
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        read_tensor(TensorInfo(Path(file.name), (_FILE,), torch.uint8))
        return (time.perf_counter() - start) / _FILE, written / _FILE


def _transfers(
    folder: Path | None, device: torch.device, taken: Callable[[Callable[[], object]], float]
) -> tuple[float, float, float]:
    """Seconds to bring a byte from the system's cache of a file to ``device``, through page-locked memory and
    through any other, and to bring one back to the host."""
    there = torch.zeros(_FILE, dtype=torch.uint8, device=device)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(bytes(_FILE))
        file.flush()
        info = TensorInfo(Path(file.name), (_FILE,), torch.uint8)

        def load() -> None:
            with page_locked(device):
                read_tensor(info).to(device)

        rates = [load, lambda: read_tensor(info).to(device), lambda: there.to("cpu", copy=True)]
        loaded, paged, unloaded = (taken(work) / _FILE for work in rates)
        return loaded, paged, unloaded
