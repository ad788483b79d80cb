"""How fast the cpu backend's linear is, against float linears and ATen's 4-bit op called directly.

    python benchmarks/cpu_linear.py

Every figure is the median of repeated warm calls, taken in turns with the other columns; of several
rounds the quietest counts. Weights that fit the last-level cache stay in it, for every column alike.
Exits with 1 if a bar is missed:

- at least 6 times as fast as a float32 linear at 1 row, activations in float32 too;
- at most 10% (the noise of such timings) above the best of the others at any number of rows.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from awqc.kernels import llvm
from awqc.kernels.qlinear_aten import AtenInt4
from awqc.quantized import Scheme, quantize
from awqc.runtime.linear import QuantLinear
from awqc.runtime.lowering import lower_linear

SHAPES = [(11008, 4096), (4096, 4096)]
ROWS = [1, 8, 32, 128]
SLACK = 1.10
SPEEDUP = 6.0
COLUMNS = ["F.linear float32", "F.linear bfloat16", "ATen int4", "awqc bfloat16", "awqc float32"]
Calls = dict[str, Callable[[], object]]


def calls_of(n: int, k: int) -> Callable[[int], Calls]:
    """The five linears of a weight ``(n, k)``, as a function of the number of rows."""
    float32 = torch.randn(n, k) / k**0.5
    bfloat16 = float32.bfloat16()
    weight = quantize(float32, Scheme(4, 128))
    quantized = {
        dtype: QuantLinear(lower_linear(weight, None, dtype, "cpu", "cpu"))
        for dtype in (torch.float32, torch.bfloat16)
    }
    aten, _ = AtenInt4.pack(weight.codes, weight.scales, weight.zeros, None, 4, 128, dense=False)
    packed, scales = aten["packed"], aten["scales_and_zeros"]

    def at(rows: int) -> Calls:
        x = torch.randn(rows, k)
        y = x.bfloat16()
        return dict(
            zip(
                COLUMNS,
                [
                    lambda: F.linear(x, float32),
                    lambda: F.linear(y, bfloat16),
                    lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(y, packed, 128, scales),
                    lambda: quantized[torch.bfloat16](y),
                    lambda: quantized[torch.float32](x),
                ],
                strict=True,
            )
        )

    return at


def medians(calls: Calls, seconds: float) -> dict[str, float]:
    """Milliseconds a call, each timed right after an untimed one, in turns for about ``seconds``."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[COLUMNS[0]]) < 5:
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(taken) for name, taken in times.items()}


def measure(rounds: int, seconds: float) -> dict[tuple[int, int, int], dict[str, float]]:
    """(N, K, M) -> column -> milliseconds, the best median of ``rounds``."""
    results: dict[tuple[int, int, int], dict[str, float]] = {}
    for n, k in SHAPES:
        at = calls_of(n, k)
        for rows in ROWS:
            calls = at(rows)
            taken = [medians(calls, seconds) for _ in range(rounds)]
            results[n, k, rows] = {name: min(one[name] for one in taken) for name in COLUMNS}
    return results


def missed_bars(n: int, k: int, rows: int, ms: dict[str, float]) -> list[str]:
    where, ours = f"{n}x{k}, {rows} rows", ms["awqc bfloat16"]
    missed = []
    if rows == 1 and ms["F.linear float32"] < SPEEDUP * ms["awqc float32"]:
        speedup = ms["F.linear float32"] / ms["awqc float32"]
        missed.append(f"{where}: {speedup:.1f} times as fast as float32, not {SPEEDUP}")
    best = min(ms[name] for name in COLUMNS[:3])
    if ours > SLACK * best:
        missed.append(f"{where}: {ours / best:.2f}x the time of the best other, not {SLACK}x")
    return missed


def runs_on() -> str:
    """What the cpu backend has for few rows here."""
    isa, reason = llvm.host_isa(), llvm.missing()
    return f"its own kernel for {isa.name}" if isa and not reason else f"ATen's op: its own {reason}"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which the quietest counts")
    parser.add_argument("--seconds", type=float, default=1.5, help="time for a row of the table in a round")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(
        f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}\n"
        f"milliseconds; int4 and awqc in groups of 128; awqc up to some rows on {runs_on()}\n"
    )
    with torch.inference_mode():
        results = measure(options.rounds, options.seconds)
    print("| N x K | rows |", " | ".join(COLUMNS), "|")
    print("|---|---|" + "---|" * len(COLUMNS))
    for (n, k, rows), ms in results.items():
        print(f"| {n}x{k} | {rows} |", " | ".join(f"{ms[name]:.2f}" for name in COLUMNS), "|")
    missed = [bar for (n, k, rows), ms in results.items() for bar in missed_bars(n, k, rows, ms)]
    print("\n" + ("\n".join(["missed:", *missed]) if missed else "all bars held"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
