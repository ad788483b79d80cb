"""A plan against the compile that it foretells, and how long plans of large models take.

    python benchmarks/plan.py --shapes                          # configs of 8B to 671B, no weights
    python benchmarks/plan.py MODEL --calib FILE --samples 16   # time and peak memory, foretold and seen
    python benchmarks/plan.py MODEL --calib FILE --device cuda --max-memory 10GB
    python benchmarks/plan.py MODEL --seen FIGURES.json         # what compile_streaming.py --json wrote

Plan and compile run one after the other in fresh interpreters. Memory of the CPU is the peak resident memory
of the process, that of a GPU what torch has allocated at its peak. Figures say what was compiled and with
which options, if not on how many threads (``OMP_NUM_THREADS``).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = ("llama-3-8b", "llama-3-70b", "mixtral-8x22b", "deepseek-v3")


def planned(options: argparse.Namespace) -> dict[str, Any]:
    """The plan as the command line gives it, and the seconds that it took."""
    started = time.perf_counter()
    import awqc

    found = awqc.plan(
        options.model,
        max_calib_samples=options.samples,
        max_calib_seq_len=options.seq_len,
        device=options.device,
        max_memory=options.max_memory,
    )
    return {**found.as_dict(), "took": time.perf_counter() - started, "report": None}


def compiled(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds by pass and in all, and peak memory of a compile onto disk."""
    import torch

    from awqc.streaming import compile_to

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        done = compile_to(
            options.model,
            Path(folder) / "out",
            options.calib,
            max_calib_samples=options.samples,
            max_calib_seq_len=options.seq_len,
            device=options.device,
            max_memory=options.max_memory,
        )
        seconds = time.perf_counter() - started
    on_gpu = torch.device(options.device).type == "cuda"
    return {
        "seconds": done.report.seconds,
        "compile_seconds": seconds,
        "device": torch.cuda.max_memory_allocated() if on_gpu else None,
        "host": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def apart(task: str, options: argparse.Namespace) -> dict[str, Any]:
    """``task`` in a process of its own."""
    command = [sys.executable, __file__, str(options.model), "--task", task, "--device", options.device]
    command += ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
    command += ["--calib", options.calib or ""]
    command += ["--max-memory", options.max_memory] if options.max_memory else []
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def compare(options: argparse.Namespace) -> None:
    """One table: foretold, seen, and their ratio."""
    seen: dict[str, Any] = json.loads(options.seen.read_text()) if options.seen else {}
    if options.seen and "compiled" not in seen:
        raise SystemExit(
            f"{options.seen} does not say what was compiled: compile_streaming.py --json does now"
        )
    vars(options).update(seen.get("compiled", {}))
    plan = apart("plan", options)
    seen = seen or apart("compile", options)
    print(
        f"{options.model}, {options.samples} x {options.seq_len} tokens, {options.device}; "
        f"the plan took {plan['took']:.1f} s"
    )
    print(f"{'':24}{'plan':>10}{'seen':>10}{'ratio':>8}")
    # What no pass is charged for. First calls are, which the plan counts here.
    rest = seen["compile_seconds"] - sum(seen["seconds"].values())
    passes = {**seen["seconds"], "start": rest}
    for name, spent in plan["seconds"].items():
        row(name, spent, passes.pop(name, None))
    row("anything else", 0.0, sum(passes.values()))
    row("all seconds", plan["total_seconds"], seen["compile_seconds"])
    for place, stated in plan.get("memory", {}).items():
        actual = seen.get(place)
        row(f"peak MB, {place}", stated / 1e6, None if actual is None else actual / 1e6)


def row(name: str, stated: float, actual: float | None) -> None:
    """One line of the table."""
    ratio = f"{stated / actual:8.2f}" if actual else ""
    print(f"{name:24}{stated:10.2f}" + ("" if actual is None else f"{actual:10.2f}") + ratio)


def shapes(options: argparse.Namespace) -> None:
    """Plans of large models, from configs."""
    from make_checkpoint import make

    print(f"{'shape':16}{'seconds':>9}{'of CPU':>8}{'MB':>8}  {'matrices':>9}{'stages':>8}  plan")
    with tempfile.TemporaryDirectory() as folder:
        for shape in SHAPES:
            options.model = Path(folder) / shape
            make(shape, options.model, config_only=True)
            started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            plan = apart("plan", options)
            took, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            matrices = sum(stage["matrices"] for stage in plan["stages"])
            memory = ", ".join(f"{place} {size / 1e9:.1f} GB" for place, size in plan["memory"].items())
            print(
                f"{shape:16}{took:9.1f}{spent:8.1f}{plan['peak'] / 1e6:8.0f}  {matrices:9,}"
                f"{len(plan['stages']):8}  "
                f"{plan['total_seconds'] / 60:.0f} min, {memory}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--shapes", action="store_true")
    parser.add_argument("--calib")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-memory")
    parser.add_argument("--seen", type=Path, help="figures of a compile, instead of one more")
    parser.add_argument("--task", choices=["plan", "compile"], help="used by the script itself")
    options = parser.parse_args()
    if options.task is not None:
        found = planned(options) if options.task == "plan" else compiled(options)
        print(json.dumps(found | {"peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
    elif options.shapes:
        shapes(options)
    elif options.model is None or not (options.calib or options.seen):
        parser.error("give MODEL and --calib or --seen, or --shapes")
    else:
        compare(options)


if __name__ == "__main__":
    main()
