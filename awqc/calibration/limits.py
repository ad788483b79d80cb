"""What a model accepts as input: how many tokens, and which."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from awqc.errors import CalibrationError


def sequence_limit(config: Any) -> int | None:
    """The longest sequence, in tokens, that the model of this transformers config was built for.

    None when the config states no limit (models without learned or rotary positions).
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def vocabulary_size(config: Any) -> int | None:
    """The number of token ids that the model of this transformers config knows; None if unstated."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def check_sequence_length(max_calib_seq_len: int, limit: int | None) -> None:
    """Raise CalibrationError if blocks of ``max_calib_seq_len`` tokens would exceed the model's limit."""
    if limit is not None and max_calib_seq_len > limit:
        raise CalibrationError(
            f"max_calib_seq_len={max_calib_seq_len} is longer than the model's limit of {limit} tokens: "
            f"give max_calib_seq_len={limit} or less"
        )


def check_row_length(row: int, length: int, limit: int | None) -> None:
    """Raise CalibrationError if row ``row`` of the ids that the user gave exceeds the model's limit."""
    if limit is not None and length > limit:
        raise CalibrationError(
            f"calibration row {row} has {length} tokens, longer than the model's limit of {limit}: "
            f"cut it into rows of at most {limit} tokens"
        )


def check_vocabulary(ids: Tensor, vocab_size: int | None) -> None:
    """Raise CalibrationError if an id of ``ids`` ``(samples, seq_len)`` is not in the vocabulary."""
    stop = vocab_size if vocab_size is not None else torch.iinfo(torch.int64).max
    outside = (ids < 0) | (ids >= stop)
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        known = "negative" if vocab_size is None else f"outside the model's vocabulary of {vocab_size} tokens"
        raise CalibrationError(
            f"token id {ids[row, column].item()} in calibration row {row} is {known}: "
            "use the tokenizer that belongs to the model"
        )
