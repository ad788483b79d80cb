"""Quantized linears on a GPU against cuBLAS and against the time that reading their bytes takes.

    python benchmarks/kernels.py --out kernels.csv

Times are medians per call inside a CUDA graph whose calls go round copies of the weight, more bytes of them
than the L2 cache holds several times over. All that multiply the same shape take turns, so that the clock,
which depends on what ran before, is the same for all. The floor is a kernel that reads the packed bytes and
does nothing else, timed the same way. Errors are relative to a float32 product, from the same run.
``--autoawq`` adds a peer's kernel to the turns: see ``autoawq_peer.py``.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from autoawq_peer import AutoAwq
from torch import Tensor

from awqc.kernels.qlinear import dequantize
from awqc.kernels.registry import kernels
from awqc.kernels.streaming_read import ROTATED, copies_to_read, reads_on_cuda

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672)]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 512, 2048]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
GROUP = 128


@dataclass(frozen=True)
class Row:
    """One measurement."""

    kernel: str
    n: int
    k: int
    m: int
    us: float
    over_floor: float
    over_cublas_bf16: float
    gbps: float
    tflops: float
    error: float


class Captured:
    """Calls as a CUDA graph."""

    def __init__(self, calls: list[Callable[[], object]]) -> None:
        self.calls = calls  # and with them what they read
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph, stream=stream):
                for call in calls:
                    call()

    def events(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Start and end of a replay that is now under way."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        return start, end


def in_turns(graphs: list[Captured], rounds: int = 9) -> list[list[float]]:
    """Microseconds per call of each in each of ``rounds`` replays; the graphs take turns, in an order that
    changes from round to round, since what runs hot leaves a slower clock to the next."""
    times, shuffle = [], random.Random(0)
    for _ in range(rounds + 1):  # the first is not counted
        graphs[-1].graph.replay()  # nor is this: what is launched behind it does not wait for the host
        order = shuffle.sample(range(len(graphs)), len(graphs))
        events = {i: graphs[i].events() for i in order}
        torch.cuda.synchronize()
        times.append([start.elapsed_time(end) for _, (start, end) in sorted(events.items())])
    each = zip(*times[1:], strict=True)
    return [[ms * 1e3 / len(graph.calls) for ms in own] for own, graph in zip(each, graphs, strict=True)]


def medians(graphs: list[Captured], rounds: int = 9) -> list[float]:
    """Median microseconds per call of each."""
    return [statistics.median(own) for own in in_turns(graphs, rounds)]


def rotation(make: Callable[[], Tensor], size: int) -> list[Tensor]:
    """Copies of a tensor of ``size`` bytes, enough to go round."""
    return [make() for _ in range(max(2, -(-ROTATED // size)))]


def repeated(copies: list[Tensor], least: int = 20) -> list[Tensor]:
    """The copies in turn, ``least`` times or more."""
    return copies * -(-least // len(copies))


def weight_of(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes, scales and zero points: weights of about unit variance over the square root of K."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(n, k // GROUP, device="cuda") * 0.5 + 0.75).div_(4.6 * k**0.5).half()
    zeros = torch.randint(6, 11, scales.shape, dtype=torch.uint8, device="cuda")
    return codes, scales, zeros


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@dataclass(frozen=True)
class Entry:
    """What one kernel computes, and its calls."""

    name: str
    graph: Captured
    error: float


@dataclass(frozen=True)
class Packed:
    """A weight as one kernel takes it: ``op(x, *tensors, *constants)``; copies of ``main`` go round."""

    op: Callable[..., Tensor]
    tensors: Mapping[str, Tensor | None]
    constants: tuple[Any, ...]
    main: str
    copies: list[Tensor]
    dtypes: tuple[str, ...] = tuple(DTYPES)

    @classmethod
    def of(
        cls,
        op: Callable[..., Tensor],
        tensors: Mapping[str, Tensor | None],
        constants: tuple[Any, ...] = (),
        dtypes: tuple[str, ...] = tuple(DTYPES),
    ) -> Packed:
        sizes = {key: t.nbytes for key, t in tensors.items() if t is not None}
        main = max(sizes, key=sizes.__getitem__)
        largest = tensors[main]
        assert largest is not None
        return cls(op, tensors, constants, main, rotation(largest.clone, sizes[main]), dtypes)

    def __call__(self, x: Tensor, main: Tensor) -> Tensor:
        return self.op(x, *{**self.tensors, self.main: main}.values(), *self.constants)


class Shape:
    """A weight ``(n, k)`` as every kernel wants it, and as cuBLAS does."""

    def __init__(self, n: int, k: int, only: set[str] | None, peer: AutoAwq | None) -> None:
        self.n, self.k = n, k
        codes, scales, zeros = weight_of(n, k)
        self.dense = dequantize(codes, scales, zeros, GROUP)
        self.size = n * k // 2 + scales.numel() * 2 + scales.numel() // 2
        self.copies = copies_to_read(self.size, torch.device("cuda", torch.cuda.current_device()))
        calls = max(20, len(self.copies))
        self.reads = [
            Captured([partial(read, i) for i in range(calls)]) for read in reads_on_cuda(self.copies)
        ]
        self.floor = min(medians(self.reads))
        self.packs: dict[str, Packed] = {}
        for name, kernel in kernels("qlinear").items():
            legal = kernel.legal(n, k, 4, GROUP, torch.float16, torch.device("cuda", 0))
            if legal is None and (only is None or name.lower() in only):
                tensors, constants = kernel.pack(codes, scales, zeros, None, 4, GROUP)
                self.packs[name] = Packed.of(kernel.op, tensors, constants)
        if peer is not None:
            self.packs[peer.name] = Packed.of(peer, peer.pack(codes, scales, zeros), dtypes=("fp16",))
        self.weights = {
            name: rotation(partial(self.dense.to, dtype, copy=True), n * k * 2)
            for name, dtype in DTYPES.items()
        }

    def entries(self, m: int, dtypes: Iterable[str]) -> Iterator[Entry]:
        """All that multiply ``m`` tokens; cuBLAS in bfloat16 first."""
        x32 = torch.randn(m, self.k, device="cuda")
        for name in ("bf16", *(d for d in dtypes if d != "bf16")):
            x = x32.to(DTYPES[name])
            expected = F.linear(x.float(), self.dense)
            found = F.linear(x, self.weights[name][0])
            graph = Captured([partial(F.linear, x, w) for w in repeated(self.weights[name])])
            yield Entry(f"cublas-{name}", graph, relative_error(found, expected))
            if name not in dtypes:
                continue
            for kernel, packed in self.packs.items():
                if name not in packed.dtypes:
                    continue
                found = packed(x, packed.copies[0])
                same = "" if torch.equal(found, packed(x, packed.copies[-1])) else "-UNSTABLE"
                graph = Captured([partial(packed, x, w) for w in repeated(packed.copies)])
                yield Entry(f"{kernel.lower()}-{name}{same}", graph, relative_error(found, expected))

    def rows(self, m: int, dtypes: Iterable[str], rounds: int) -> Iterator[Row]:
        """Measurements of ``m`` tokens."""
        entries = list(self.entries(m, dtypes))
        times = in_turns([entry.graph for entry in entries], rounds)
        for entry, own in zip(entries, times, strict=True):
            us = statistics.median(own)
            # Both of a ratio are of one round: the clock drifts by more than what they may differ in.
            over_cublas = statistics.median(a / b for a, b in zip(own, times[0], strict=True))
            yield Row(
                kernel=entry.name,
                n=self.n,
                k=self.k,
                m=m,
                us=round(us, 2),
                over_floor=round(us / self.floor, 3),
                over_cublas_bf16=round(over_cublas, 3),
                gbps=round(self.size / us / 1e3, 1),
                tflops=round(2 * self.n * self.k * m / us / 1e6, 1),
                error=float(f"{entry.error:.2e}"),
            )


def clocks() -> str:
    """SM and memory clock as nvidia-smi sees them now."""
    query = ["nvidia-smi", "--query-gpu=name,clocks.sm,clocks.mem,power.draw", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=[f"{n}x{k}" for n, k in SHAPES])
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=9, help="replays of each graph")
    parser.add_argument("--kernels", nargs="*", help="class names in lower case; default: all that are legal")
    parser.add_argument(
        "--autoawq", type=Path, metavar="GEMM.PY", help="AutoAWQ's kernels: see autoawq_peer.py"
    )
    parser.add_argument("--summary", action="store_true", help="end with means over the shapes")
    parser.add_argument("--out", help="CSV file")
    parser.add_argument("--plot", help="PNG file: bandwidth over tokens; needs matplotlib")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    peer = AutoAwq(options.autoawq) if options.autoawq else None
    begin = time.time()
    rows: list[Row] = []
    columns = list(Row.__dataclass_fields__)
    print(f"{clocks()}; torch {torch.__version__}")
    for shape in options.shapes:
        n, k = map(int, shape.split("x"))
        only = set(options.kernels) if options.kernels else None
        problem = Shape(n, k, only, peer)
        print(f"\n{n}x{k}: floor {problem.floor:.2f} us; {clocks()}")
        print("  ".join(f"{c:>16}" for c in columns if c not in "nk"))
        for row in (row for m in options.tokens for row in problem.rows(m, options.dtypes, options.rounds)):
            print("  ".join(f"{v:>16}" for c, v in asdict(row).items() if c not in "nk"))
            rows.append(row)
        del problem
        torch.cuda.empty_cache()
    print(f"\n{clocks()}; {time.time() - begin:.0f} s")
    if options.summary:
        print(summary(rows))
    if options.out:
        with open(options.out, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    if options.plot:
        plot(rows, options.plot)


def summary(rows: list[Row]) -> str:
    """Times over the floor by kernel and tokens: geometric means over the shapes, and the worst error."""
    tokens = sorted({row.m for row in rows})
    lines = [f"{'times the floor, M =':<28}" + "".join(f"{m:>7}" for m in tokens) + "    error"]
    for kernel in dict.fromkeys(row.kernel for row in rows):
        own = [row for row in rows if row.kernel == kernel]
        means = {m: [row.over_floor for row in own if row.m == m] for m in tokens}
        cells = [f"{statistics.geometric_mean(v):>7.2f}" if v else f"{'-':>7}" for v in means.values()]
        lines.append(f"{kernel:<28}{''.join(cells)}  {max(row.error for row in own):.1e}")
    return "\n".join(lines)


def plot(rows: list[Row], file: str) -> None:
    """Bytes of the packed weight over the time of a call, for every kernel, over tokens, a panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys((row.n, row.k) for row in rows))
    figure, panels = pyplot.subplots(1, len(shapes), figsize=(5 * len(shapes), 4), sharey=True, squeeze=False)
    for panel, (n, k) in zip(panels[0], shapes, strict=True):
        own = [row for row in rows if (row.n, row.k) == (n, k)]
        for kernel in dict.fromkeys(row.kernel for row in own):
            points = [(row.m, row.gbps) for row in own if row.kernel == kernel]
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=kernel)
        panel.axhline(own[0].gbps * own[0].over_floor, color="gray", linestyle="--", label="streaming read")
        panel.set_title(f"N={n}, K={k}")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("tokens M")
    panels[0][0].set_ylabel("GB/s of packed weights")
    panels[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
