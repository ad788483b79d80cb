"""Other engines as functions: a checkpoint and prompts in, what they compute out.

Each call starts a fresh process in the engine's own environment, so nothing of awqc is imported there.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.interop import environments

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Answer:
    """What an engine made of a checkpoint and B prompts of T tokens.

    Args:
        greedy: ``(B, 32)`` tokens that it continues with.
        tokens: ``(B, T', C)`` ids whose log probability as next token is in ``logprobs``; T' is T or T - 1.
        logprobs: ``(B, T', C)``, given the tokens up to that position.
        facts: what else the loader wrote (seconds, versions, keys missing or unexpected).
    """

    greedy: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    facts: dict


def vllm(checkpoint: Path, prompts: np.ndarray, scratch: Path) -> Answer:
    """``checkpoint`` in vLLM on the CPU, computing in float16."""
    answer = scratch / "vllm.json"
    facts = _run("vllm", [checkpoint, _write(prompts, scratch), answer], answer)
    # vLLM adds the token that follows to the likeliest ones, so a position has one or none more: keep as
    # many as all of them have.
    scored = facts.pop("logprobs")
    count = min(len(position) for prompt in scored for position in prompt)
    pairs = np.array([[list(position.items())[:count] for position in prompt] for prompt in scored], float)
    return Answer(np.array(facts.pop("greedy")), pairs[..., 0].astype(int), pairs[..., 1], facts)


def transformers(checkpoint: Path, prompts: np.ndarray, scratch: Path) -> Answer:
    """``checkpoint`` in transformers, computing in float32 outside of the quantized linears."""
    answer, logprobs = scratch / "transformers.json", scratch / "logprobs.npy"
    facts = _run("transformers", [checkpoint, _write(prompts, scratch), answer, logprobs], answer)
    values = np.load(logprobs)
    every = np.broadcast_to(np.arange(values.shape[-1]), values.shape)
    return Answer(np.array(facts.pop("greedy")), every, values, facts)


ENGINES: dict[str, Callable[[Path, np.ndarray, Path], Answer]] = {"vllm": vllm, "transformers": transformers}


def _write(prompts: np.ndarray, scratch: Path) -> Path:
    path = scratch / "tokens.json"
    path.write_text(json.dumps(prompts.tolist()))
    return path


def _run(engine: str, arguments: list[Path], answer: Path) -> dict:
    if not environments.built(engine):
        pytest.skip(f"build it first: python tests/interop/environments.py {engine}")
    # The caller's own packages must not be seen from there.
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    command = [str(environments.interpreter(engine)), str(HERE / f"load_{engine}.py"), *map(str, arguments)]
    finished = subprocess.run(command, env=kept, cwd=answer.parent, capture_output=True, text=True)
    if finished.returncode:
        pytest.fail(f"load_{engine}.py ended with status {finished.returncode}:\n{finished.stderr[-6000:]}")
    return json.loads(answer.read_text())
