"""A compile by one process and by several: the codes that differ, and what each process spent.

    python benchmarks/scale_out.py MODEL --calib FILE --samples 16 --processes 2 4
    python benchmarks/scale_out.py MODEL --calib FILE --device cuda --processes 2

One process first, then ``torchrun --nproc-per-node N -m awqc compile``, each in a fresh interpreter with one
thread (``--threads``) per process. Counted are codes, scales and zero points of all quantized linears, and
elements of all dense tensors, as the checkpoints hold them; errors are those of the reports, the mean over
the linears, as a ratio to that of one process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from awqc.checkpoints import Checkpoint, open_checkpoint
from awqc.report import REPORT_FILE


def compiled(options: argparse.Namespace, processes: int, out: Path) -> float:
    """Compile to ``out``; seconds from command to end."""
    launcher = ["-m", "awqc"]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), *launcher]
    command = [sys.executable, *launcher, "compile", str(options.model), "--out", str(out)]
    command += ["--calib", options.calib, "--max-calib-samples", str(options.samples)]
    command += ["--device", options.device, "--format", "awqc"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    started = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def differences(one: Checkpoint, other: Checkpoint) -> tuple[int, int, int, int]:
    """Codes in all; codes, scales with zero points, and dense elements that differ."""
    total = codes = scales = 0
    for name in one.quantized_names():
        a, b = one.weight(name), other.weight(name)
        total += a.codes.numel()
        codes += int((a.codes != b.codes).sum())
        scales += int((a.scales != b.scales).sum()) + int((a.zeros != b.zeros).sum())
    dense = sum(int((one.dense(name) != other.dense(name)).sum()) for name in one.dense_names())
    return total, codes, scales, dense


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {torch.cuda.device_count()} GPUs")
    print(
        "processes  seconds  codes that differ        scales, zeros  dense   error  seconds of each process"
    )
    with tempfile.TemporaryDirectory() as folder:
        first, error = Path(folder) / "1", 0.0
        for count in dict.fromkeys([1, *options.processes]):
            out = Path(folder) / str(count)
            seconds = compiled(options, count, out)
            total, codes, scales, dense = differences(open_checkpoint(first), open_checkpoint(out))
            report = json.loads((out / REPORT_FILE).read_text())
            errors = [row["error"] for row in report["linears"].values()]
            mean = statistics.fmean(each for each in errors if each is not None)
            error = error or mean
            each = report["processes"] or [sum(report["seconds"].values())]
            spent = ", ".join(f"{one:.1f}" for one in each)
            print(
                f"{count:9}  {seconds:7.1f}  {codes:9,} of {total:11,}  {scales:13,}  {dense:5,}  "
                f"{mean / error:6.4f}  {spent}"
            )


if __name__ == "__main__":
    main()
