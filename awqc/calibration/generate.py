"""Calibration text that the model writes itself: no data, no network.

Known as self-calibration (Williams et al., 2024, "Self-calibration for Language Model Quantization and
Pruning"; before it LLM-QAT, Liu et al., 2023, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from awqc.errors import CalibrationError, NonFiniteError

#: Sequences sampled at once: decoding reads every weight for each token, whatever the batch.
_BATCH = 32


def sample_from_model(
    model: Any, tokenizer: Any, samples: int, seq_len: int, seed: int, progress: Callable[[int, int], None]
) -> Tensor:
    """``samples`` sequences of ``seq_len`` ids drawn from ``model`` at temperature 1; ``(samples, seq_len)``.

    Each begins with the beginning-of-text token (or end-of-text, or a random id where the model has
    neither) and goes on past an end-of-text, as packed documents do. The same seed gives the same ids on
    the same machine; the state of torch's random generators is left as it was.

    Raises:
        CalibrationError: if the model cannot generate.
        NonFiniteError: if its logits hold NaN.
    """
    if model is None or not hasattr(model, "generate"):
        kind = "no model was given" if model is None else f"{type(model).__name__} has no generate()"
        raise CalibrationError(
            f"calib='self' needs a model that can write text, but {kind}: give a file, strings or token ids"
        )
    device = _device(model)
    watch = _Watch(samples, seq_len, progress)
    # The model's own generation defaults (top-k, penalties, forced tokens) would bend the distribution.
    defaults = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            prompts = _prompts(model, tokenizer, defaults, samples)
            if seq_len == 1:
                return prompts
            batches = [_sample(model, batch.to(device), seq_len, watch) for batch in prompts.split(_BATCH)]
    finally:
        model.generation_config = defaults
    return torch.cat(batches)


def _device(model: Any) -> torch.device:
    """Where the model takes tokens; its first weights may be on disk until they are used."""
    device: torch.device = model.device
    if device.type != "meta":
        return device
    return torch.device(getattr(getattr(model, "_hf_hook", None), "execution_device", None) or "cpu")


def _sample(model: Any, prompts: Tensor, seq_len: int, watch: _Watch) -> Tensor:
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=seq_len - prompts.shape[1],
        eos_token_id=None,
        pad_token_id=0,
    )
    ids = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        generation_config=config,
        logits_processor=LogitsProcessorList([watch]),
    )
    return ids.to("cpu", torch.int64)


def _prompts(model: Any, tokenizer: Any, defaults: Any, samples: int) -> Tensor:
    """First tokens ``(samples, 1)``."""
    for source in (tokenizer, defaults, model.config.get_text_config()):
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(source, name, None)
            if isinstance(token, list):  # generation configs may list several end-of-text tokens
                token = token[0] if token else None
            if token is not None:
                return torch.full((samples, 1), token, dtype=torch.int64)
    return torch.randint(model.config.get_text_config().vocab_size, (samples, 1))


class _Watch:
    """A logits processor that leaves the logits as they are, counts the tokens and stops at NaN."""

    def __init__(self, samples: int, seq_len: int, progress: Callable[[int, int], None]) -> None:
        self._done, self._total, self._progress = samples, samples * seq_len, progress

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise NonFiniteError(
                f"calib='self': the model's logits for token {input_ids.shape[1]} hold NaN: "
                "check its weights and dtype"
            )
        self._done += scores.shape[0]
        self._progress(self._done, self._total)
        return scores
