"""Runs Python in a process where Triton compiles its kernels, which tests without a GPU have it interpret."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str, cache: Path | None = None) -> str:
    """What the interpreter prints with these arguments, from the repository's root; it has to succeed.

    Args:
        cache: an empty folder for compiled kernels; the user's by default.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
