"""A causal language model as a function of plain tensors: the interface that ONNX runtimes generate with.

Inputs and outputs have the names that optimum and onnxruntime-genai expect:

    input_ids, attention_mask, position_ids, past_key_values.N.key, past_key_values.N.value
    -> logits, present.N.key, present.N.value
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from awqc.errors import ConfigError

#: Sizes of the input that is traced: no two alike and none 0 or 1, which tracing would take for fixed.
_BATCH, _SEQUENCE, _PAST = 2, 3, 5

#: Names of the dimensions that vary.
BATCH, SEQUENCE, PAST, TOTAL = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
)


@dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps of every token: keys ``(B, H, T, key)`` and values ``(B, H, T, value)``.

    Args:
        heads: ``H``.
        key, value: channels of a head.
        dtype: of both.
    """

    heads: int
    key: int
    value: int
    dtype: torch.dtype

    def empty(self, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Zeros in the place of keys and values."""
        shape = (batch, self.heads, tokens)
        return torch.zeros(*shape, self.key, dtype=self.dtype), torch.zeros(
            *shape, self.value, dtype=self.dtype
        )


@dataclass(frozen=True)
class Interface:
    """The tensors that go into and come out of the exported model.

    Args:
        positions: whether the model takes ``position_ids``.
        layers: its cache, layer by layer; None to export without past keys and values.
    """

    positions: bool
    layers: tuple[CacheLayer, ...] | None

    @property
    def inputs(self) -> list[str]:
        """Input names in order."""
        names = ["input_ids", "attention_mask"] + ["position_ids"] * self.positions
        return names + self._cache_names("past_key_values")

    @property
    def outputs(self) -> list[str]:
        """Output names in order."""
        return ["logits", *self._cache_names("present")]

    @property
    def dimensions(self) -> dict[str, dict[int, str]]:
        """Input name -> axis -> name of the dimension, of those that vary."""
        total = TOTAL if self.layers else SEQUENCE
        tokens = {"input_ids": SEQUENCE, "attention_mask": total, "position_ids": SEQUENCE}
        return {
            name: {0: BATCH, 1: tokens[name]} if name in tokens else {0: BATCH, 2: PAST}
            for name in self.inputs
        }

    def _cache_names(self, prefix: str) -> list[str]:
        return [f"{prefix}.{i}.{part}" for i in range(len(self.layers or ())) for part in ("key", "value")]

    def feed(self, ids: Tensor, past: Sequence[Tensor] = ()) -> dict[str, Tensor]:
        """Inputs by name for unpadded tokens.

        Args:
            ids: ``(B, S)`` token ids.
            past: keys and values as earlier outputs gave them, in their order; empty to begin.
        """
        batch, tokens = ids.shape
        if self.layers and not past:
            past = [tensor for layer in self.layers for tensor in layer.empty(batch, 0)]
        seen = past[0].shape[2] if past else 0
        values = [ids, torch.ones(batch, seen + tokens, dtype=torch.int64)]
        if self.positions:
            values.append(torch.arange(seen, seen + tokens).expand(batch, tokens))
        return dict(zip(self.inputs, [*values, *past], strict=True))

    def example(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments of :class:`Decoder` to trace it with, and which of their dimensions vary."""
        batch, sequence = Dim(BATCH, min=1), Dim(SEQUENCE, min=1)
        past = Dim(PAST, min=0) if self.layers else None
        total: Any = Dim.AUTO if self.layers else sequence  # Dim knows no sums
        seen = _PAST if self.layers else 0
        arguments: dict[str, Any] = {
            "input_ids": torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64),
            "attention_mask": torch.ones(_BATCH, seen + _SEQUENCE, dtype=torch.int64),
            "position_ids": None,
            "past_key_values": None,
        }
        shapes: dict[str, Any] = {
            "input_ids": {0: batch, 1: sequence},
            "attention_mask": {0: batch, 1: total},
            "position_ids": None,
            "past_key_values": None,
        }
        if self.positions:
            arguments["position_ids"] = torch.arange(seen, seen + _SEQUENCE).repeat(_BATCH, 1)
            shapes["position_ids"] = {0: batch, 1: sequence}
        if self.layers:
            arguments["past_key_values"] = [layer.empty(_BATCH, _PAST) for layer in self.layers]
            shapes["past_key_values"] = [({0: batch, 2: past},) * 2 for _ in self.layers]
        return arguments, shapes


def interface(model: nn.Module, past: bool) -> Interface:
    """The interface of ``model``, found by running it on two tokens.

    Args:
        model: a causal language model of transformers.
        past: whether the exported model is to take and return keys and values.

    Raises:
        ConfigError: if the model takes no token ids, or keeps something else than keys and values.
    """
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" not in parameters or "decoder_input_ids" in parameters or not hasattr(model, "config"):
        raise ConfigError(
            f"{type(model).__name__} does not go from input_ids to the logits of the next token: only causal "
            "language models of transformers are exported"
        )
    positions = "position_ids" in parameters
    if not past:
        return Interface(positions, None)
    with torch.no_grad():
        result = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=True)
    cache = getattr(result, "past_key_values", None)
    if not isinstance(cache, DynamicCache):
        found = "no cache" if cache is None else f"a cache of type {type(cache).__name__}"
        raise ConfigError(
            f"{type(model).__name__} returns {found}, where an export with past needs keys and values of "
            "each layer: export it without past (past=False, --no-past)"
        )
    return Interface(positions, tuple(_layer(model, i, layer) for i, layer in enumerate(cache.layers)))


def _layer(model: nn.Module, index: int, layer: Any) -> CacheLayer:
    # Subclasses keep more than keys and values, which would be lost between two calls.
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
        raise ConfigError(
            f"layer {index} of {type(model).__name__} keeps {type(layer).__name__}, where an export with "
            "past needs keys and values: export it without past (past=False, --no-past)"
        )
    return CacheLayer(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3], layer.keys.dtype)


class Decoder(nn.Module):
    """``model`` as a function of plain tensors, to be traced.

    A layer with a sliding window keeps all tokens too, and sees those of its window through the mask: the
    exported keys and values of all layers are then of one length.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None,
        past_key_values: list[tuple[Tensor, Tensor]] | None,
    ) -> tuple[Tensor, ...]:
        """``input_ids`` ``(B, S)`` after ``past_key_values`` of T tokens; ``attention_mask`` ``(B, T + S)``.

        Returns:
            Logits ``(B, S, vocabulary)``, then keys and values of T + S tokens, layer by layer.
        """
        cache = None if past_key_values is None else DynamicCache(past_key_values)
        optional = {} if position_ids is None else {"position_ids": position_ids}
        result = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **optional,
        )
        present = [] if cache is None else [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return (result.logits, *present)
