"""All checks of the GPU kernels in one command, each in a process of its own: one that fails hides no other.

    python benchmarks/gpu_check.py --out DIR                  # about 100 s: tests, 2000 shapes, times
    python benchmarks/gpu_check.py --long --out DIR --model DIR   # about 5 minutes: see long() below

Checks of correctness run side by side, what is timed afterwards. Every part has a time limit and a log; at
the end stand failures, times, and a table with the last line of each log.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTEST = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--no-header", "--tb=short"]


@dataclass(frozen=True)
class Part:
    """A command whose last line says what came out.

    Args:
        name: of its log.
        arguments: of the Python interpreter.
        seconds: after which it is stopped.
        stage: parts of stage 0 run side by side, then those of stage 1, then those of stage 2 one by one.
        tool: what the interpreter runs under.
        environment: variables that are set for it.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    stage: int = 0
    tool: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def tests(name: str, seconds: float, *arguments: str) -> Part:
    """A part that runs tests."""
    # So many random shapes in the tests that have some; random_shapes.py has more.
    return Part(f"test-{name}", (*PYTEST, *arguments), seconds, environment=(("AWQC_SHAPES", "25"),))


def shapes(kernel: str, count: int, workers: int, seconds: float, each: int = 1) -> list[Part]:
    """``count`` random shapes shared out over processes; up to ``each`` of them on the same machine code, for
    kernels that compile for longer than they run."""
    return [
        Part(
            f"shapes-{kernel}-{i}",
            (
                *("benchmarks/random_shapes.py", kernel, "--count", str(-(-count // workers))),
                *("--seed", str(1000 + i), "--seconds", str(seconds - 12), "--each", str(each)),
            ),
            seconds,
        )
        for i in range(workers)
    ]


def quick() -> list[Part]:
    """What fits in 100 seconds."""
    return [
        tests("marlin-device", 60, "tests/gpu"),
        tests("marlin", 60, "tests/kernels", "-k", "(marlin or launch or join) and not fused"),
        tests("exllama", 60, "tests/kernels/test_qlinear_exllama.py", "tests/kernels/test_exllama_layout.py"),
        tests("triton", 60, "tests/kernels", "-k", "triton or gluon or words or autotune or experts"),
        tests("fused", 60, "tests/kernels", "-k", "fused"),
        tests("backends-marlin", 60, "tests/backends", "-k", "marlin"),
        tests("backends-exllama", 60, "tests/backends", "-k", "exllama"),
        tests("backends-triton", 60, "tests/backends", "-k", "triton"),
        *shapes("marlin", 900, 3, 55),
        *shapes("exllama", 500, 2, 55),
        *shapes("triton", 400, 3, 55, each=8),
        *shapes("experts", 200, 2, 55, each=8),
        tests("extension", 60, "tests/kernels/test_extension.py"),
        Part(
            "times",
            (
                "benchmarks/kernels.py",
                "--tokens",
                *["1", "2", "4", "8", "16"],
                "--dtypes",
                "fp16",
                "--summary",
            ),
            45,
            stage=2,
        ),
    ]


def sanitized(tool: str) -> list[Part]:
    """compute-sanitizer over a few small shapes of every kernel. Those for many tokens are no choice for
    shapes so small, or not in all their forms: their tests run some."""
    under = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "3")
    own_memory = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),) if tool == "memcheck" else ()
    many = {
        "triton-many": ("tests/kernels/test_many_gluon.py", "-k", "reference and (200 or 384)"),
        "marlin-many": (
            *[f"tests/kernels/test_marlin_{name}.py" for name in ("many", "pair", "wide")],
            *("-k", "(products or bit) and 200"),
        ),
    }
    parts = [
        Part(
            f"{tool}-{kernel}",
            (
                "benchmarks/random_shapes.py",
                kernel,
                *["--count", "12", "--seed", "3", "--most-work", "2e7", "--seconds", "100"],
            ),
            150,
            tool=under,
            environment=own_memory,
        )
        for kernel in ("marlin", "exllama", "triton", "experts")
    ]
    return parts + [
        Part(f"{tool}-{name}", (*PYTEST, *tests), 150, tool=under, environment=own_memory)
        for name, tests in many.items()
    ]


def long(model: str | None) -> list[Part]:
    """What takes minutes: 10 000 shapes, sanitizers, generated text, decoding with 8 B parameters."""
    parts = [
        *shapes("marlin", 5000, 4, 150),
        *shapes("exllama", 3200, 3, 150),
        *shapes("triton", 1200, 4, 150, each=8),
        *shapes("experts", 700, 3, 150, each=8),
        *sanitized("memcheck"),
        *sanitized("racecheck"),
    ]
    if model:
        parts.append(Part("text", ("benchmarks/gpu_text.py", model), 120))
    # Compiled side by side, timed one after the other.
    quiet = (("TORCHINDUCTOR_COMPILE_THREADS", "4"),)
    for name, *how in (("marlin",), ("triton",), ("exllama",), ("marlin", "--fuse")):
        command = ("benchmarks/gpu_decode.py", name, *how, "--peers", "4")
        parts.append(Part(f"decode-{name}{''.join(how)}", command, 240, stage=1, environment=quiet))
    parts.append(Part("host-time", ("benchmarks/host_time.py",), 60, stage=2))
    return parts


def _command(part: Part) -> list[str]:
    """What starts ``part``, or says why it cannot be started."""
    if not part.tool:
        return [sys.executable, *part.arguments]
    name, *options = part.tool
    tool = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if tool is None:
        return [sys.executable, "-c", f"raise SystemExit({name + ' is not installed'!r})"]
    return [tool, *options, sys.executable, *part.arguments]


class Run:
    """A part in its process, from start to end."""

    def __init__(self, part: Part, folder: Path) -> None:
        self.part, self.log = part, folder / f"{part.name}.log"
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            **dict(part.environment),
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                _command(part),
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
        self.began = time.monotonic()
        self.result, self.seconds = "", 0.0

    def poll(self, last: float) -> bool:
        """Whether it has ended; it is stopped at its time limit, or at the time ``last``."""
        code = self.process.poll()
        self.seconds = time.monotonic() - self.began
        if code is None and self.seconds < self.part.seconds and time.monotonic() < last:
            return False
        if code is None:
            os.killpg(self.process.pid, signal.SIGINT)  # tests then say what failed so far
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.result = "stopped" if code is None else "ok" if code == 0 else f"exit {code}"
        return True

    def text(self) -> list[str]:
        """Lines of its log that say something."""
        return [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]


def run(parts: list[Part], folder: Path, workers: int, last: float) -> list[Run]:
    """Run all parts, stage by stage, ``workers`` at a time."""
    done: list[Run] = []
    for stage in range(3):
        waiting, running = [part for part in parts if part.stage == stage], list[Run]()
        while waiting or running:
            if time.monotonic() > last:
                waiting.clear()
            while waiting and len(running) < (1 if stage == 2 else workers):
                running.append(Run(waiting.pop(0), folder))
            ended = [one for one in running if one.poll(last)]
            for one in ended:
                print(f"{one.part.name}: {one.result} after {one.seconds:.0f} s", flush=True)
            done += ended
            running = [one for one in running if one not in ended]
            time.sleep(0.2)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--long", action="store_true", help="the checks that take minutes instead")
    parser.add_argument("--model", help="a model directory whose generated text is compared (--long)")
    parser.add_argument("--only", nargs="*", default=[""], help="parts whose name contains one of these")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 4), help="parts at a time")
    parser.add_argument("--seconds", type=float, help="stop everything after so long")
    parser.add_argument("--out", type=Path, help="folder for logs.txt, all logs in one file")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="gpu_check-"))
    parts = long(options.model) if options.long else quick()
    parts = [part for part in parts if any(wanted in part.name for wanted in options.only)]
    began = time.monotonic()
    done = run(parts, folder, options.workers, began + (options.seconds or (420 if options.long else 150)))
    bad = [one for one in done if one.result != "ok"]
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        logs = [f"=== {one.part.name}: {one.result}\n" + "\n".join(one.text()) for one in done]
        (options.out / "logs.txt").write_text("\n\n".join(logs))
    for one in bad:
        print(f"\n--- {one.part.name}: {one.result}")
        failures = [line for line in one.text() if line.startswith(("FAILED", "E  ", "ERROR"))]
        print("\n".join(line[:300] for line in (failures[:12] or one.text()[-12:])))
    for one in done:
        if one.part.stage == 2:
            print(f"\n--- {one.part.name}")
            print("\n".join(one.text()[-40:]))
    print(f"\n{'part':<20}{'result':<10}{'s':>5}  last line")
    for one in done:
        print(f"{one.part.name:<20}{one.result:<10}{one.seconds:>5.0f}  {(one.text() or ['-'])[-1][:90]}")
    print(f"{len(done) - len(bad)} of {len(parts)} parts ok, {time.monotonic() - began:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
