"""How good a model is on a text, and how far it is from the model it was made from.

The convention of all figures: the text is one sequence of ``T`` ids, cut into windows of ``window`` ids
that do not overlap; the last, shorter window counts. Each window is a context of its own, so its first
token is given and the others are predicted: ``T - ceil(T / window)`` predictions. Perplexity is
``exp`` of the mean negative log-likelihood over all predictions, in nats, computed in float32 from the
model's logits and summed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awqc.calibration import sequence_limit
from awqc.errors import ConfigError, NonFiniteError

Progress = Callable[[int, int], None]

#: Logits brought to float32 at once, 256 MB: a window of a large vocabulary would take gigabytes.
_LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True)
class Perplexity:
    """Perplexity ``value = exp(nll)``, ``nll`` being the mean over ``tokens`` predictions, in nats."""

    value: float
    tokens: int
    nll: float


@dataclass(frozen=True)
class Evaluation:
    """A model beside its reference on one text.

    Args:
        perplexity: of the model.
        reference: perplexity of the reference.
        kl: mean over predictions of ``KL(reference || model)``, in nats.
        top1_agreement: share of predictions where both rank the same token first.
    """

    perplexity: Perplexity
    reference: Perplexity
    kl: float
    top1_agreement: float


def perplexity(
    model: Any, ids: Tensor, window: int = 512, batch_size: int = 4, progress: Progress | None = None
) -> Perplexity:
    """Perplexity of ``model`` on a text.

    Args:
        model: a causal language model: ``model(input_ids=(B, L)).logits`` is ``(B, L, V)``.
        ids: the text, ``(T,)`` or ``(1, T)``.
        window: tokens of context, the first of which is not predicted.
        batch_size: windows run at once.
        progress: called with tokens done and tokens in all.

    Raises:
        ConfigError: if there are fewer than two tokens, or ``window`` exceeds the model's limit.
        NonFiniteError: if the model's logits give no finite likelihood.
    """
    text = _text(ids, window, [model])
    nll, count = 0.0, 0
    with _evaluating(model):
        for start, batch in _windows(text, window, batch_size):
            for log_p, labels in _log_probabilities(model, batch):
                nll += _nll(log_p, labels)
                count += labels.numel()
            _check_finite(nll, start, batch)
            if progress is not None:
                progress(start + batch.numel(), text.numel())
    return _perplexity(nll, count)


def kl_divergence(
    model: Any,
    reference: Any,
    ids: Tensor,
    window: int = 512,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> float:
    """Mean over predictions of ``KL(reference || model)`` in nats; see :func:`compare`."""
    return compare(model, reference, ids, window, batch_size, progress).kl


def compare(
    model: Any,
    reference: Any,
    ids: Tensor,
    window: int = 512,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of both models, KL divergence and top-1 agreement, each model run once on each window.

    No more logits are held than those of one batch. Arguments and errors as in :func:`perplexity`.
    """
    text = _text(ids, window, [model, reference])
    nll, reference_nll, kl, agreed, count = 0.0, 0.0, 0.0, 0, 0
    with _evaluating(model, reference):
        for start, batch in _windows(text, window, batch_size):
            both = zip(_log_probabilities(model, batch), _log_probabilities(reference, batch), strict=True)
            for (log_q, labels), (log_p, _) in both:
                if log_p.shape != log_q.shape:
                    raise ConfigError(
                        f"the model predicts {log_q.shape[-1]} tokens and its reference {log_p.shape[-1]}: "
                        "compare models of one vocabulary"
                    )
                log_p = log_p.to(log_q.device)
                nll += _nll(log_q, labels)
                reference_nll += _nll(log_p, labels)
                kl += _total((log_p.exp() * (log_p - log_q)).sum(-1))
                agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
                count += labels.numel()
            _check_finite(nll + reference_nll + kl, start, batch)
            if progress is not None:
                progress(start + batch.numel(), text.numel())
    return Evaluation(_perplexity(nll, count), _perplexity(reference_nll, count), kl / count, agreed / count)


def _text(ids: Tensor, window: int, models: list[Any]) -> Tensor:
    """``ids`` as ``(T,)``, once it is clear that they can be evaluated."""
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise ConfigError(f"ids of shape {tuple(ids.shape)}: a text to evaluate is (T,) or (1, T)")
    if ids.numel() < 2:
        raise ConfigError(f"the text to evaluate has {ids.numel()} tokens: it takes at least 2")
    if window < 2:
        raise ConfigError(f"window={window}: a window takes at least 2 tokens")
    for model in models:
        limit = sequence_limit(model.config) if hasattr(model, "config") else None
        if limit is not None and window > limit:
            raise ConfigError(
                f"window={window} is longer than the model's limit of {limit} tokens: "
                f"give window={limit} or less"
            )
    return ids


def _windows(ids: Tensor, window: int, batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """Batches ``(B, L)`` of windows and where in ``ids`` each begins; the short last one comes alone."""
    whole = ids.numel() // window * window
    for start in range(0, whole, batch_size * window):
        yield start, ids[start : min(start + batch_size * window, whole)].view(-1, window)
    if ids.numel() > whole:
        yield whole, ids[whole:].unsqueeze(0)


def _log_probabilities(model: Any, batch: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities ``(n, V)`` in float32 and the ids ``(n,)`` they predict, piece by piece."""
    logits = model(input_ids=batch.to(_device(model, batch))).logits
    size = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
    for row, ids in zip(logits, batch.to(logits.device), strict=True):
        for part, labels in zip(row[:-1].split(size), ids[1:].split(size), strict=True):
            yield F.log_softmax(part, dim=-1, dtype=torch.float32), labels


def _nll(log_p: Tensor, labels: Tensor) -> float:
    return -_total(log_p.gather(-1, labels.to(log_p.device).unsqueeze(-1)))


def _total(values: Tensor) -> float:
    # On the CPU, since not every device has float64.
    return float(values.cpu().double().sum())


def _perplexity(nll: float, count: int) -> Perplexity:
    return Perplexity(math.exp(nll / count), count, nll / count)


def _check_finite(total: float, start: int, batch: Tensor) -> None:
    if not math.isfinite(total):
        raise NonFiniteError(
            f"the logits for tokens {start} to {start + batch.numel() - 1} of the text hold NaN or Inf: "
            "check the model's weights and dtype"
        )


def _device(model: Any, batch: Tensor) -> torch.device:
    """Where the model takes its inputs: with its first parameter, the embedding."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    first = next(parameters, None)
    return batch.device if first is None or first.is_meta else first.device  # offloaded: anywhere will do


@contextmanager
def _evaluating(*models: Any) -> Iterator[None]:
    """No gradients, and no dropout in a model that was left in training mode."""
    training = [model for model in models if isinstance(model, nn.Module) and model.training]
    for model in training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model in training:
            model.train()
