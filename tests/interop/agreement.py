"""What an engine must answer, and how far it may be off in half precision.

The yardstick is a model run in float32 on the same dequantized weights. An engine that computes in float16
rounds every tensor it writes, relative error at most u = 2^-11. A decoder layer writes about 15 of them
(two norms, q, k, v, rotation, scores, softmax, attention, output, gate, up, activation, product, down, two
sums); independent roundings add up like a random walk, so the logits of L layers are off by about
u * sqrt(15 L + 2) of their spread, root mean square. Single logits scatter far more widely than that (a
position whose attention hangs by a hair), hence the root mean square over all of them.

The same figure says which greedy choices are meaningful: where the best token is closer than that to the
second, rounding decides. Prompts whose continuation holds such a tie are passed over beforehand, by the
yardstick alone; on the others every token must be the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from tests.interop.engines import Answer

NEW_TOKENS = 32
UNIT_ROUNDOFF = 2.0**-11


@dataclass(frozen=True)
class Yardstick:
    """The expected answer for B prompts of T tokens.

    Args:
        prompts: ``(B, T)`` token ids.
        greedy: ``(B, 32)``.
        logprobs: ``(B, T, vocabulary)`` of the next token.
        tolerance: how far log probabilities may be off, root mean square.
    """

    prompts: np.ndarray
    greedy: np.ndarray
    logprobs: np.ndarray
    tolerance: float


def yardstick(model: nn.Module, layers: int, candidates: list[list[int]], count: int) -> Yardstick:
    """The answers of ``model`` (float32) for the first ``count`` of ``candidates`` that hold no tie."""
    ids = torch.tensor(candidates)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        logits = model(ids).logits.float()
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
        )
        steps = model(whole).logits.float()[:, ids.shape[1] - 1 : -1]
    spread = float((logits - logits.mean(-1, keepdim=True)).square().mean().sqrt())
    tolerance = UNIT_ROUNDOFF * (15 * layers + 2) ** 0.5 * spread
    best = steps.topk(2).values
    clear = ((best[..., 0] - best[..., 1]).amin(-1) > 2 * tolerance).nonzero()[:, 0][:count]
    assert len(clear) == count, f"only {len(clear)} of {len(ids)} prompts hold no tie: give more of them"
    return Yardstick(
        ids[clear].numpy(),
        whole[clear, ids.shape[1] :].numpy(),
        torch.log_softmax(logits[clear], -1).numpy(),
        tolerance,
    )


def distance(answer: Answer, expected: Yardstick) -> float:
    """Root mean square difference of the log probabilities that ``answer`` gives."""
    positions = answer.tokens.shape[1]
    theirs = np.take_along_axis(expected.logprobs[:, :positions], answer.tokens, axis=-1)
    return float(np.sqrt(np.mean((answer.logprobs - theirs) ** 2)))


def summary(answer: Answer, expected: Yardstick) -> str:
    """What is worth a line in a table."""
    equal = int((answer.greedy == expected.greedy).sum())
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in answer.facts["seconds"].items())
    return (
        f"log probabilities off by {distance(answer, expected):.1e}, allowed {expected.tolerance:.1e}; "
        f"{equal} of {answer.greedy.size} tokens equal; {seconds}"
    )


def check(answer: Answer, expected: Yardstick, checkpoint: Path) -> None:
    """Assert that an engine loaded all of ``checkpoint``, as packed weights, and answers as expected."""
    for kind in ("missing", "unexpected", "mismatched"):
        assert not answer.facts.get(kind), f"{kind} keys: {answer.facts[kind]}"
    if "quantized" in answer.facts and not _dequantized_on_load(checkpoint):
        assert set(answer.facts["quantized"]) == _packed_linears(checkpoint)
    off = distance(answer, expected)
    assert off <= expected.tolerance, (
        f"log probabilities are off by {off:.2e}, allowed {expected.tolerance:.2e}"
    )
    np.testing.assert_array_equal(answer.greedy, expected.greedy)


def _dequantized_on_load(checkpoint: Path) -> bool:
    config = json.loads((checkpoint / "config.json").read_text())
    return bool(config["quantization_config"].get("dequantize"))


def _packed_linears(checkpoint: Path) -> set[str]:
    names: set[str] = set()
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            names.update(tensors.keys())
    return {name.rpartition(".")[0] for name in names if name.endswith((".qweight", ".weight_packed"))}
