"""Launch configurations of the GPU kernels against each other, and against those that ship.

    python benchmarks/gpu_sweep.py --out sweep.csv --kernels marlin wide wide-bf16 exllama triton

For every kernel, number of tokens and shape all configurations worth trying are timed in turns, as in
``kernels.py``. The tables at the end say for each number of tokens what ships, the best for each shape, and
the best for all (geometric mean of the times over that of the best for each shape). Side processes compile
everything first.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from awqc.kernels import (
    configs,
    marlin_many,
    marlin_pair,
    marlin_stream,
    marlin_wide,
    qlinear_exllama,
    qlinear_marlin,
    qlinear_triton,
)
from awqc.kernels.exllama_block import Block
from awqc.kernels.qlinear_exllama import ExLlama
from awqc.kernels.qlinear_marlin import Marlin
from awqc.kernels.qlinear_triton import TritonGemm
from awqc.kernels.triton_tile import Tile
from awqc.kernels.triton_weight import Weight
from kernels import GROUP, SHAPES, Captured, medians, repeated, rotation, weight_of

TOKENS = {
    "marlin": (16, 8, 1),
    "wide": (512, 2048, 256, 128, 32, 64),
    "wide-bf16": (512, 2048, 256, 8192, 32, 64),
    "exllama": (1, 2, 4, 8),
    "triton": (1, 16, 32),
}
LIMIT = 227 << 10


@dataclass(frozen=True)
class Route:
    """cuBLAS on a dense weight, which is ``dequantized`` for the call, or for ``cublas`` is there before."""

    route: str


@dataclass(frozen=True)
class Candidate:
    """A configuration."""

    config: Any

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in vars(self.config).items())


def streams(n: int, k: int, m: int) -> list[Candidate]:
    """Tilings of ``marlin_small.cu``; the first is the one that ships."""
    rows, columns = -(-n // 64), -(-k // 128)
    found = {marlin_stream.tile(rows, columns, m, GROUP, 132, LIMIT): None}
    # Sums of a strip, and of a group of it, are 8 registers for every 8 tokens: at most half of all.
    most, share = 16 // -(-m // 8), -(-rows * 4 // 132)
    for warps, rounds in product((4, 8, 16), {-(-share // most), -(-share // 4)}):
        at_once = -(-share // rounds)
        for depth in (4, 3, 2, 1):
            tiling = marlin_stream.Tiling(warps, at_once, rounds, depth)
            if warps * at_once <= 64 and tiling.shared_bytes(m, GROUP) <= LIMIT:
                found[tiling] = None
    return [Candidate(tiling) for tiling in found]


def wides(n: int, k: int, m: int) -> list[Candidate]:
    """Tilings of ``marlin_wide.cu``, ``marlin_pair.cu`` and ``marlin_many.cu``; the first is what ships."""
    rows, columns = -(-n // 64), -(-k // 128)
    found: dict[Any, None] = {}
    cut = (marlin_many if marlin_many.takes(rows, columns, m, 132) else marlin_wide).tile
    shipped = marlin_pair.tile(rows, columns, m, GROUP, 132, LIMIT)
    found[shipped or cut(rows, columns, m, GROUP, 132, LIMIT)] = None
    if m >= 128:
        found |= dict.fromkeys((Route("cublas"), *manies(rows, m), Route("dequantized")))
    for tokens in marlin_wide.TILE_TOKENS:
        if tokens > 2 * m or m > 4 * tokens:
            continue
        pairs = [marlin_pair.PairTiling(tokens, stages) for stages in (8, 6, 5, 4, 3, 2)]
        pairs = [pair for pair in pairs if pair.shared_bytes(GROUP) <= LIMIT]
        found |= dict.fromkeys(pairs[:1] + pairs[2:4])
        for row_blocks, split in product((2, 4) if tokens <= 64 else (2,), (1, 2, 4, 8)):
            fitting = [
                wide
                for stages in (8, 6, 5, 4, 3, 2)
                if (wide := marlin_wide.WideTiling(tokens, split, stages, row_blocks)).shared_bytes(GROUP)
                <= LIMIT
            ]
            # More copies under way are not always better.
            for wide in fitting[:1] + fitting[2:4]:
                if wide.blocks(rows, m) <= 2 * 132:
                    found[wide] = None
    return [Candidate(tiling) for tiling in found]


def manies(rows: int, m: int) -> Iterator[marlin_many.ManyTiling]:
    """Tilings of ``marlin_many.cu`` for a weight of ``rows`` blocks of 64 rows, the two largest sizes."""
    for tokens, form in product(reversed(marlin_many.TILE_TOKENS[-2:]), ("whole", "shared", "cluster")):
        tiling = marlin_many.fitting(tokens, form, GROUP, LIMIT)
        if form != "cluster" or 2 * tiling.tiles(rows, m) <= 132:
            yield tiling


def blocks(n: int, k: int, m: int) -> list[Candidate]:
    """Blocks of ``exllama.cu``; the first is the one that ships."""
    shipped = configs.entry(configs.measured(qlinear_exllama.NAME, torch.device("cuda")), m)
    found = {Block(**shipped): None} if shipped else {}
    for columns, warps, at_once in product((1, 2, 4, 8), (4, 8, 12, 16), (1, 2, 3, 4, 6, 8)):
        # What is kept for every column and token, and words of every column; the rest is about 40.
        registers = 2 * columns * m + 6 * columns + 40
        if 8 <= at_once * warps <= 32 and registers * 32 * warps * at_once <= 65536:
            found[Block(m, columns, warps, at_once)] = None
    return [Candidate(block) for block in found]


def tiles(n: int, k: int, m: int) -> list[Candidate]:
    """Tiles of the Triton product; the first is the one that ships."""
    shipped = configs.entry(configs.measured(qlinear_triton.NAME, torch.device("cuda")), m)
    found = {Tile(**shipped): None} if shipped else {}
    block_m = max(8, m)
    for block_n, warps in ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4)):
        for stages in (2, 3, 4):
            for programs in (4, 8, 16):
                if programs * warps <= 32:
                    found[Tile(block_m, block_n, warps, stages, programs)] = None
    return [Candidate(tile) for tile in found]


CANDIDATES: dict[str, Callable[[int, int, int], list[Candidate]]] = {
    "marlin": streams,
    "wide": wides,
    "wide-bf16": wides,
    "exllama": blocks,
    "triton": tiles,
}


@contextmanager
def chosen(candidate: Candidate) -> Iterator[None]:
    """Let the streaming and wide kernels be cut as ``candidate`` says, whatever the shape."""
    kept = marlin_stream.tile, marlin_wide.tile
    marlin_stream.tile = marlin_wide.tile = lambda *_, **__: candidate.config  # type: ignore[assignment]
    marlin_stream.stream.cache_clear()
    marlin_wide.wide.cache_clear()
    try:
        yield
    finally:
        marlin_stream.tile, marlin_wide.tile = kept
        marlin_stream.stream.cache_clear()
        marlin_wide.wide.cache_clear()


class Problem:
    """One shape's packed weight, in copies that together are larger than the cache."""

    def __init__(self, kernel: str, n: int, k: int) -> None:
        self.kernel, self.n, self.k = kernel, n, k
        own: Any = {"exllama": ExLlama, "triton": TritonGemm}.get(kernel, Marlin)
        codes, scales, zeros = weight_of(n, k)
        self.tensors, _ = own.pack(codes, scales, zeros, None, 4, GROUP)
        self.main = next(iter(self.tensors))
        packed = self.tensors[self.main]
        self.copies = rotation(packed.clone, packed.nbytes)
        self.cublas: list[Tensor] = []
        self.dtype = torch.bfloat16 if kernel.endswith("bf16") else torch.float16

    def dense(self) -> Tensor:
        """The weight as cuBLAS takes it."""
        return qlinear_marlin.dequantize(self.copies[0], self.n, self.k, GROUP, False, self.dtype)

    def call(self, x: Tensor, packed: Tensor, candidate: Candidate) -> Tensor:
        """One product."""
        if self.kernel == "exllama":
            return qlinear_exllama.multiply(
                x,
                packed,
                self.tensors["scales"],
                self.tensors["zeros"],
                None,
                self.n,
                GROUP,
                candidate.config,
            )
        if self.kernel == "triton":
            weight = Weight(packed, self.tensors["scales"], self.tensors["zeros"], self.n, self.k, GROUP)
            return qlinear_triton.multiply(x, weight, None, candidate.config)
        arguments = (x, packed, None, self.n, GROUP, False)
        if self.kernel == "marlin":
            return marlin_stream.multiply(*arguments)
        if isinstance(candidate.config, Route):
            if candidate.config.route == "dequantized":
                packed = qlinear_marlin.dequantize(packed, self.n, self.k, GROUP, False, x.dtype)
            return F.linear(x, packed)
        if isinstance(candidate.config, marlin_many.ManyTiling):
            return marlin_many.multiply(*arguments, candidate.config)
        if isinstance(candidate.config, marlin_pair.PairTiling):
            return marlin_pair.multiply(candidate.config, *arguments)
        return marlin_wide.multiply(*arguments)

    def captured(self, m: int, candidate: Candidate, once: bool) -> Captured | str | None:
        """Calls of a candidate, or why there are none; with ``once`` it is only compiled and run."""
        x = torch.randn(m, self.k, device="cuda").to(self.dtype)
        copies = self.copies
        if candidate.config == Route("cublas"):
            if not self.cublas:
                self.cublas = rotation(self.dense, self.n * self.k * 2)[: 1 if once else None]
            copies = self.cublas
        try:
            with chosen(candidate):
                if once:
                    self.call(x, copies[0], candidate)
                    return None
                calls = [functools.partial(self.call, x, w, candidate) for w in repeated(copies)]
                return Captured(calls)
        except Exception as error:
            if isinstance(error, KeyboardInterrupt) or "CUDA error" in str(error):
                raise
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def warm(options: argparse.Namespace) -> None:
    """Let side processes compile everything into the caches on disk."""
    count = min(14, os.cpu_count() or 1)
    command = [sys.executable, __file__, "--kernels", *options.kernels]
    command += ["--shapes", *options.shapes]
    command += ["--tokens", *map(str, options.tokens)] if options.tokens else []
    processes = [subprocess.Popen([*command, "--warm", f"{i}/{count}"]) for i in range(count)]
    last = time.monotonic() + options.warm_seconds
    for process in processes:
        try:
            process.wait(max(1.0, last - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def warmed(options: argparse.Namespace) -> None:
    """The part of a side process: every so-manieth candidate, once. Shapes differ in tilings alone."""
    own, count = map(int, options.warm.split("/"))
    for kernel in options.kernels:
        seen: set[object] = set()
        jobs = []
        for n, k in SHAPES:
            for m in TOKENS[kernel]:
                for candidate in CANDIDATES[kernel](n, k, m):
                    if (key := (m, candidate, n if kernel == "triton" else 0)) not in seen:
                        seen.add(key)
                        jobs.append((n, k, m, candidate))
        problems: dict[tuple[int, int], Problem] = {}
        for n, k, m, candidate in jobs[own::count]:
            if (n, k) not in problems:
                problems = {(n, k): Problem(kernel, n, k)}
                problems[n, k].copies = problems[n, k].copies[:1]
            problems[n, k].captured(m, candidate, once=True)


def best_for_all(rows: list[dict[str, Any]], kernel: str, m: int) -> list[tuple[float, str]]:
    """Configurations that all shapes were measured with, best first: times over the best of each shape."""
    own = [row for row in rows if (row["kernel"], row["m"]) == (kernel, m)]
    times: dict[tuple[int, int], dict[str, float]] = {}
    for row in own:
        times.setdefault((row["n"], row["k"]), {})[row["config"]] = row["us"]
    if not times:
        return []
    common = set.intersection(*(set(of) for of in times.values()))
    return sorted(
        (statistics.geometric_mean(of[config] / min(of.values()) for of in times.values()), config)
        for config in common
    )


def table(rows: list[dict[str, Any]], kernel: str, m: int) -> Iterator[str]:
    """What ships, the best for each shape, and the best for all."""
    own = [row for row in rows if (row["kernel"], row["m"]) == (kernel, m)]
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in own))
    times = {s: {r["config"]: r["us"] for r in own if (r["n"], r["k"]) == s} for s in shapes}
    best = {s: min(t.items(), key=lambda item: item[1]) for s, t in times.items()}
    for s in shapes:
        shipped = next(r for r in own if (r["n"], r["k"]) == s and r["ships"])
        yield f"  {s[0]}x{s[1]}: ships {shipped['us']:.2f}, best {best[s][1]:.2f} ({best[s][0]})"
    for over, config in best_for_all(rows, kernel, m)[:2]:
        yield f"  for all: {over:.3f} of the best ({config})"


def shipped_tables(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """Tables for ``kernels/configs_<device>.json``: those that ship with what is best for all shapes put in.

    The entry of a table serves numbers of tokens up to its key; what was measured for the most tokens at or
    below that, and above the entry before, is the one for it.
    """
    tables = {}
    for kernel, name in (("exllama", qlinear_exllama.NAME), ("triton", qlinear_triton.NAME)):
        table = {most: dict(entry) for most, entry in configs.measured(name, "default").items()}
        for before, most in pairwise([0, *sorted(table)]):
            tried = [m for m in TOKENS[kernel] if before < m <= most]
            ranked = best_for_all(rows, kernel, tried[-1]) if tried else []
            if ranked:
                table[most] = {k: int(v) for k, v in (field.split("=") for field in ranked[0][1].split())}
        tables[name] = {str(most): table[most] for most in sorted(table)}
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kernels", nargs="*", default=list(TOKENS), choices=list(TOKENS))
    parser.add_argument("--shapes", nargs="*", default=[f"{n}x{k}" for n, k in SHAPES])
    parser.add_argument("--tokens", nargs="*", type=int, help="of those that a kernel is made for")
    parser.add_argument("--seconds", type=float, default=90, help="stop timing after so long")
    parser.add_argument("--warm-seconds", type=float, default=45, help="stop compiling after so long")
    parser.add_argument("--warm", help="for side processes")
    parser.add_argument("--out", help="CSV file")
    parser.add_argument("--configs", help="JSON file, as kernels/configs_<device>.json, from what was found")
    options = parser.parse_args()
    SHAPES[:] = [tuple(map(int, shape.split("x"))) for shape in options.shapes]  # type: ignore[misc]
    if options.tokens:
        for kernel, tokens in TOKENS.items():
            TOKENS[kernel] = tuple(m for m in tokens if m in options.tokens)
    if options.warm:
        return warmed(options)
    warm(options)
    began, rows = time.monotonic(), list[dict[str, Any]]()
    left = sum(len(SHAPES) * len(TOKENS[kernel]) for kernel in options.kernels)
    for kernel in options.kernels:
        for n, k in SHAPES:
            problem = Problem(kernel, n, k)
            for m in TOKENS[kernel]:
                now = time.monotonic()
                share, left = now + (options.seconds - (now - began)) / left, left - 1
                graphs: dict[Candidate, Captured] = {}
                candidates = CANDIDATES[kernel](n, k, m)
                for candidate in candidates:
                    if graphs and time.monotonic() > share:
                        break
                    found = problem.captured(m, candidate, once=False)
                    if isinstance(found, Captured):
                        graphs[candidate] = found
                    else:
                        print(f"{kernel} {n}x{k} M={m} {candidate}: {found}")
                for candidate, us in zip(graphs, medians(list(graphs.values()), 5), strict=True):
                    ships = candidate is candidates[0]
                    entry = {"kernel": kernel, "n": n, "k": k, "m": m, "us": round(us, 2), "ships": ships}
                    rows.append({**entry, "config": str(candidate)})
            del problem
            torch.cuda.empty_cache()
    if options.out and rows:
        with open(options.out, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    for kernel in options.kernels:
        for m in TOKENS[kernel]:
            print(f"{kernel} M={m}")
            print("\n".join(table(rows, kernel, m)))
    if options.configs:
        Path(options.configs).write_text(json.dumps(shipped_tables(rows), indent=1) + "\n")
    print(f"{len(rows)} times, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
