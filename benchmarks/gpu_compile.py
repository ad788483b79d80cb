"""All measurements of compiles of large models on a GPU, in one call that ends in a table.

    python benchmarks/gpu_compile.py SCRATCH                     # everything: 6 minutes, 55 GB of disk
    python benchmarks/gpu_compile.py SCRATCH --only 8b-nearest   # one of them
    python benchmarks/gpu_compile.py SCRATCH --seconds 300       # what fits into five minutes

Weights are random (``make_checkpoint.py``) and made on the GPU, all at once; calibration is 128 x 512 tokens;
each compile runs in a process of its own, from the command to the saved checkpoint. Where a model has more
layers than fit into a run, two compiles with fewer give the seconds of a layer, their difference, and of the
rest; the whole is computed from these, and says so. A bar that is missed is marked. Compiles of the default
pipeline are followed by their plan, against what was seen.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """One compile.

    Args:
        name, shape: of the case and of the checkpoint.
        layers: of the model; ``measured``: of the two compiles that it is computed from, empty for the whole.
        memory: GPU memory that the compile may use, GB.
        seconds: at most.
        nearest: rounded to the nearest.
    """

    name: str
    shape: str
    layers: int
    measured: tuple[int, ...]
    memory: float
    seconds: float
    nearest: bool = False

    @property
    def compiled(self) -> tuple[int, ...]:
        """Layers of the models that are compiled."""
        return self.measured or (self.layers,)

    @property
    def limit(self) -> str:
        """What the compile is told: what the driver and its libraries take is on top of it."""
        return f"{0.85 * self.memory:.1f}GB"

    def model(self, layers: int, scratch: Path) -> Path:
        """Where the checkpoint is."""
        return scratch / f"{self.shape}-{layers}"


CASES = (
    Case("8b-nearest", "llama-3-8b", 32, (), 10, 60, nearest=True),
    Case("8b", "llama-3-8b", 32, (), 10, 150),
    Case("70b", "llama-3-70b", 80, (1, 3), 24, 480),
    Case("30b-a3b", "qwen3-30b-a3b", 48, (2, 12), 24, 360),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scratch", type=Path, help="directory for checkpoints and outputs")
    parser.add_argument("--only", choices=[case.name for case in CASES], action="append")
    parser.add_argument("--seconds", type=float, default=1800, help="for everything")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    end, lines = time.monotonic() + options.seconds, []
    cases = [case for case in CASES if not options.only or case.name in options.only]
    make_all(cases, options.scratch, options.device, options.seconds)
    for case in cases:
        runs = [run(case, layers, options.scratch, options.device, end) for layers in case.compiled]
        lines.append(line(case, runs))
        print(lines[-1], flush=True)
    print("\n".join(["", *lines]))
    return any("MISSED" in text or "not run" in text for text in lines)


def make_all(cases: Sequence[Case], scratch: Path, device: str, seconds: float) -> None:
    """Make the checkpoints that are not there."""
    wanted = {case.model(layers, scratch): (case.shape, layers) for case in cases for layers in case.compiled}
    made = [
        (["make_checkpoint.py", shape, model, "--layers", layers, "--device", device], seconds)
        for model, (shape, layers) in wanted.items()
        if not model.exists()
    ]
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda each: call(*each), made))


def run(case: Case, layers: int, scratch: Path, device: str, end: float) -> dict[str, Any] | None:
    """Figures of one compile; None if it did not come to its end in time."""
    model, out = case.model(layers, scratch), scratch / f"{case.name}-{layers}"
    figures = out.with_suffix(".json")
    left = int(end - time.monotonic())
    if left < 5 or not model.exists():
        return None
    shutil.rmtree(out, ignore_errors=True)
    command = ["compile_streaming.py", model, out, "--device", device, "--json", figures]
    command += ["--max-memory", case.limit, "--seconds", max(left - 10, 1)]
    done = call([*command, *(["--nearest"] if case.nearest else [])], left)
    shutil.rmtree(out, ignore_errors=True)
    if done and not case.nearest:
        call(["plan.py", model, "--seen", figures], end - time.monotonic())
    return json.loads(figures.read_text()) if done and figures.is_file() else None


def call(arguments: list[Any], seconds: float) -> bool:
    """Whether a script of this directory succeeds in time; what it prints is passed on."""
    command = [sys.executable, str(HERE / arguments[0]), *map(str, arguments[1:])]
    try:
        return subprocess.run(command, timeout=max(seconds, 1)).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def line(case: Case, runs: list[dict[str, Any] | None]) -> str:
    """A case as a row of the table."""
    if any(one is None or any(n.startswith("stopped") for n in one["notes"]) for one in runs):
        return f"{case.name:12} not run to its end"
    found = [one for one in runs if one is not None]
    total, how = found[-1]["total_seconds"], "measured"
    if case.measured:
        few, more = case.measured
        layer = (found[1]["total_seconds"] - found[0]["total_seconds"]) / (more - few)
        total = found[0]["total_seconds"] + layer * (case.layers - few)
        how = f"computed from {few} and {more} layers, {layer:.2f} s each"
    memory = max(one["taken"] for one in found) / 1e9
    largest = max(found[-1]["seconds"], key=lambda name: found[-1]["seconds"][name])
    missed = "MISSED" if total > case.seconds or memory > case.memory else ""
    return (
        f"{case.name:12}{total:8.1f} s (bar {case.seconds:g}){memory:7.2f} GB (bar {case.memory:g}), {how}; "
        f"largest: {largest} {found[-1]['seconds'][largest]:.1f} s {missed}"
    )


if __name__ == "__main__":
    sys.exit(main())
