"""A compile that is killed again and again ends with the bits of one that was not.

    python benchmarks/resume.py --model lm28m --calib wikitext2.valid.txt --kills 20

The command is run once in peace and timed. Then it is run and killed (SIGKILL) after a random time, as often
as asked for, each kill in a compile of its own that is then continued to its end; every file of every output
is compared with those of the first. Half of the kills come in one compile, one after the other.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def command(options: argparse.Namespace, out: Path) -> list[str]:
    """The compile as a user would type it."""
    return [
        *(sys.executable, "-m", "awqc", "compile", str(options.model), "--calib", options.calib),
        *("--max-calib-samples", str(options.samples), "--max-calib-seq-len", str(options.seq_len)),
        *("--out", str(out), *options.options),
    ]


def run(options: argparse.Namespace, out: Path, seconds: float | None = None) -> bool:
    """Whether it came to its end, within ``seconds`` if given; it is killed where it did not."""
    process = subprocess.Popen(
        command(options, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return (out / "config.json").is_file()  # a checkpoint appears whole, so it had come to its end
    if process.returncode:
        raise RuntimeError(errors)
    return True


def differences(a: Path, b: Path) -> list[str]:
    """Files that are not the same; of reports, times and what was continued do not count."""
    names = sorted({f.name for f in a.iterdir()} | {f.name for f in b.iterdir()})
    return [name for name in names if content(a / name) != content(b / name)]


def content(file: Path) -> object:
    """What has to be the same."""
    if not file.is_file():
        return None
    if file.name != "awqc_report.json":
        return file.read_bytes()
    report = json.loads(file.read_text())
    del report["seconds"]
    report["notes"] = [note for note in report["notes"] if note[0] != "journal"]
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", help="further options of awqc compile, after --")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch, "whole")
        started = time.perf_counter()
        run(options, whole)
        took = time.perf_counter() - started
        print(f"in peace: {took:.1f} s", flush=True)
        single = options.kills // 2
        rounds = [1] * single + ([options.kills - single] if options.kills > single else [])
        for number, kills in enumerate(rounds):
            out, done = Path(scratch, str(number)), False
            times = []
            for _ in range(kills):
                times.append(moments.uniform(0.1, 1.0) * took / (1 if kills == 1 else 2))
                done = run(options, out, times[-1])
                if done:
                    break
            done = done or run(options, out)
            wrong = differences(whole, out)
            failed += bool(wrong)
            left = out.with_name(f"{out.name}.journal").exists()
            print(
                f"killed after {', '.join(f'{t:.1f}' for t in times)} s: "
                f"{'the same' if not wrong else 'DIFFERENT: ' + ', '.join(wrong)}"
                f"{', journal left behind' if left else ''}",
                flush=True,
            )
    print(f"{options.kills} kills, {failed} outputs different")
    return failed


if __name__ == "__main__":
    sys.exit(main())
