"""Host time of an eager call of marlin's op: in Python, and with the compiled extension.

    python benchmarks/host_time.py            # builds the extension into a temporary folder

Microseconds from the call to its return, the median over batches of 200 calls that the device has time to
take in between; the weight is small, so that the device is never waited for. Both are measured in a process
of their own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from awqc.kernels import extension


def measure() -> float:
    """Microseconds a call."""
    from awqc.kernels.qlinear_marlin import Marlin

    codes = torch.randint(0, 16, (256, 256), dtype=torch.uint8, device="cuda")
    scales, zeros = torch.rand(256, 2, device="cuda").half(), torch.full((256, 2), 8, device="cuda").byte()
    tensors, constants = Marlin.pack(codes, scales, zeros, None, 4, 128)
    operands = (*tensors.values(), *constants)
    x = torch.randn(1, 256, device="cuda").half()
    times = []
    with torch.no_grad():
        for _ in range(30):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(200):
                Marlin.op(x, *operands)
            times.append((time.perf_counter() - began) / 200 * 1e6)
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="here, with the extension that is there")
    options = parser.parse_args()
    if options.measure:
        print(f"{measure():.1f}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        built = extension.build(Path(folder) / "launch.so")
        found, failed = {}, 0
        for name, file in (("python", "0"), ("extension", str(built))):
            command, environment = (
                [sys.executable, __file__, "--measure"],
                {**os.environ, "AWQC_EXTENSION": file},
            )
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            failed |= done.returncode
            found[name] = done.stdout.strip() or done.stderr.strip().rpartition("\n")[2]
    print("host microseconds of an eager call: " + ", ".join(f"{name} {us}" for name, us in found.items()))
    return failed


if __name__ == "__main__":
    sys.exit(main())
