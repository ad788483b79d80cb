"""Seconds by pass and peak memory of ``awqc.compile_to``, from the call to the saved checkpoint.

    python benchmarks/make_checkpoint.py llama-3-8b MODEL --device cuda
    python benchmarks/compile_streaming.py MODEL OUT --device cuda --max-memory 10GB --nearest
    python benchmarks/compile_streaming.py MODEL OUT --device cuda --max-memory 10GB      # GPTQ rounding
    python benchmarks/compile_streaming.py MODEL OUT --max-memory 1.5GB --samples 4 --seq-len 128

Calibration is ``MODEL/calibration.jsonl`` unless another file is given. Runs once in a fresh process; nothing
is warmed up. Peak host memory is that of the process, imports included, with what it consisted of and when it
was; device memory is what torch's allocator has taken from the device, and what of that was in use. The
largest term comes first. ``--seconds`` ends a run that takes longer and prints what the journal holds of it;
the next run continues from there. What ``--json`` writes is read by ``plan.py --seen``.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

#: Where the system says what memory a process uses.
STATUS = Path("/proc/self/status")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calib", type=Path, help="MODEL/calibration.jsonl if left out")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-memory", help="such as 10GB")
    parser.add_argument("--format", default="awq")
    parser.add_argument("--nearest", action="store_true", help="scale search and clipping, no GPTQ rounding")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=int, help="stop after so many")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()

    began = time.perf_counter()
    import torch
    import transformers

    import awqc
    from awqc.passes.round_weights import RoundWeights

    compile_to, pipeline = awqc.compile_to, awqc.Pipeline.default()
    imported = time.perf_counter() - began
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.nearest:
        pipeline = pipeline.replace("round-weights", RoundWeights(method="nearest"))
    if options.seconds:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.alarm(options.seconds)
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor()
    print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}")
    watched = Resident()
    start = time.perf_counter()
    try:
        found = compile_to(
            options.model,
            options.out,
            str(options.calib or options.model / "calibration.jsonl"),
            format=options.format,
            max_memory=options.max_memory,
            max_calib_samples=options.samples,
            max_calib_seq_len=options.seq_len,
            pipeline=pipeline,
            device=options.device,
        )
        seconds, notes = dict(found.report.seconds), [" ".join(note) for note in found.report.notes]
    except KeyboardInterrupt as stopped:
        seconds, notes = of_journal(options.out), [f"stopped: {stopped}"]
    total = time.perf_counter() - start
    print("\n".join(notes))
    table(seconds, total)
    figures: dict[str, Any] = {"seconds": seconds, "total_seconds": imported + total, "notes": notes}
    # What plan.py is to plan, by the names of its options.
    figures["compiled"] = {
        name: getattr(options, name) for name in ("samples", "seq_len", "device", "max_memory")
    }
    figures["compile_seconds"] = total
    figures["host"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if options.device.startswith("cuda"):
        figures["device"] = torch.cuda.max_memory_allocated()
        figures["taken"] = torch.cuda.max_memory_reserved()
    places = [place for place in ("host", "device", "taken") if place in figures]
    sizes = ", ".join(f"{place} {figures[place] / 1e9:.2f} GB" for place in places)
    print(f"imports {imported:.1f} s, compile {total:.1f} s, {sizes}")
    print(watched.text())
    if options.json:
        options.json.write_text(json.dumps(figures))
    return 0


class Resident(threading.Thread):
    """Looks, twenty times a second, at what the memory of this process consists of; keeps the most."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most: dict[str, int] = {}
        self.at = 0.0
        self.start()

    def run(self) -> None:
        """Until the process ends."""
        began = time.perf_counter()
        while STATUS.is_file():
            lines = [line.split() for line in STATUS.read_text().splitlines()]
            found = {
                words[0]: 1024 * int(words[1])
                for words in lines
                if words[0][:5] in ("VmRSS", "RssAn", "RssFi")
            }
            if found["VmRSS:"] > self.most.get("VmRSS:", 0):
                self.most, self.at = found, time.perf_counter() - began
            time.sleep(0.05)

    def text(self) -> str:
        """One line."""
        if not self.most:
            return "what host memory consists of is not known on this system"
        whole, own, files = (self.most[name] / 1e9 for name in ("VmRSS:", "RssAnon:", "RssFile:"))
        shared = whole - own - files
        parts = f"own {own:.2f}, files {files:.2f}, shared or page-locked {shared:.2f}"
        return f"host {whole:.2f} GB after {self.at:.1f} s: {parts}"


def table(seconds: dict[str, float], total: float) -> None:
    """Terms in the order of their size."""
    rest = total - sum(seconds.values())
    for name, spent in sorted({**seconds, "anything else": rest}.items(), key=lambda term: -term[1]):
        print(f"  {name:24}{spent:9.2f} s{spent / total:8.1%}")


def of_journal(out: Path) -> dict[str, float]:
    """Seconds by pass of the stages that are finished."""
    seconds: dict[str, float] = {}
    stages: list[dict[str, Any]] = [
        json.loads(file.read_text())
        for file in sorted(out.with_name(f"{out.name}.journal").glob("stage-*.json"))
    ]
    for stage in stages:
        for name, spent in stage["record"]["seconds"].items():
            seconds[name] = seconds.get(name, 0.0) + spent
    print(f"{len(stages)} stages finished")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
