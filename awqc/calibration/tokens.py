"""The entry point: calibration data of any form in, blocks of token ids and an account of them out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from awqc.calibration.blocks import row_blocks, spread_blocks
from awqc.calibration.corpus import read_all, read_corpus
from awqc.calibration.generate import sample_from_model
from awqc.calibration.limits import check_row_length, check_sequence_length, check_vocabulary
from awqc.calibration.text import TokenizedText
from awqc.errors import CalibrationError


@dataclass(frozen=True, eq=False)
class CalibrationTokens:
    """Calibration data as the model will see them.

    Args:
        ids: ``(samples, seq_len)`` int64 on the CPU.
        source: where they come from, readable.
        dropped: tokens that were read and not used.
        notes: what differs from what was asked, and what was left out and why, one line each.
    """

    ids: Tensor
    source: str
    dropped: int = 0
    notes: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """Number of sequences."""
        return self.ids.shape[0]

    @property
    def seq_len(self) -> int:
        """Tokens in each sequence."""
        return self.ids.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens really used."""
        return self.ids.numel()

    @property
    def sha256(self) -> str:
        """Fingerprint of the ids and their shape, the same on every machine."""
        shape = f"{self.samples}x{self.seq_len}:".encode()
        return hashlib.sha256(shape + self.ids.numpy().astype("<i8").tobytes()).hexdigest()

    def __str__(self) -> str:
        lines = [f"{self.samples} x {self.seq_len} = {self.tokens} tokens of {self.source}", *self.notes]
        return "; ".join(lines)


def load_tokens(
    calib: Any,
    *,
    tokenizer: Any = None,
    model: Any = None,
    max_calib_samples: int = 128,
    max_calib_seq_len: int = 512,
    split: str | None = None,
    column: str | None = None,
    seed: int = 0,
    limit: int | None = None,
    vocab_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationTokens:
    """Turn calibration data of any form into blocks of token ids.

    Args:
        calib: one of
            token ids: a tensor ``(samples, seq_len)``, lists of ids, a tokenizer's output, a DataLoader
            (padding is removed by ``attention_mask``). Taken from the first row on; rows of one length up
            to ``max_calib_seq_len`` stay as they are, others are joined and cut;
            strings; conversations ``[{"role": ..., "content": ...}, ...]``, rendered by the tokenizer's
            chat template; records (mappings) that hold one of these;
            the path of a ``.txt`` or ``.jsonl`` file (plain, ``.gz`` or ``.xz``) or a ``.parquet`` file;
            the name of a data set: ``"pileval"``, ``"wikitext"``, ``"c4"`` or ``"owner/name"`` on the
            Hugging Face hub, with an optional ``":config"``, streamed (needs ``awqc[data]``);
            ``"self"``: the model samples its own text.
        tokenizer: the model's tokenizer; not needed for token ids.
        model: needed for ``"self"`` only.
        max_calib_samples: blocks at most.
        max_calib_seq_len: tokens in a block at most.
        split: split of a data set; the preset's or ``"train"`` by default.
        column: column of records; ``input_ids``, ``messages``, ``conversations`` or ``text`` by default.
        seed: for ``"self"``; everything else is deterministic without one.
        limit: the model's longest sequence (:func:`awqc.calibration.sequence_limit`), None if unlimited.
        vocab_size: ids the model knows (:func:`awqc.calibration.vocabulary_size`), None to not check.
        progress: called with tokens done and tokens in all.

    Text is joined, one document after the other, and cut into blocks of exactly ``max_calib_seq_len``
    tokens, evenly spaced over all of it. Text too short for one block makes one shorter block.

    Raises:
        CalibrationError: if there are no tokens, the data cannot be read or understood, a sequence is
            longer than ``limit``, or an id is not in the vocabulary.
        NonFiniteError: if the model's logits hold NaN while it samples.
    """
    for name, value in (("max_calib_samples", max_calib_samples), ("max_calib_seq_len", max_calib_seq_len)):
        if value < 1:
            raise CalibrationError(f"{name}={value}: give a positive number")
    check_sequence_length(max_calib_seq_len, limit)
    report = progress or _silent
    if isinstance(calib, str) and calib == "self":
        if split is not None or column is not None:
            raise CalibrationError("calib='self' reads no data: leave out split and column")
        ids = sample_from_model(model, tokenizer, max_calib_samples, max_calib_seq_len, seed, report)
        found = CalibrationTokens(ids, f"the model's own text (seed {seed})")
    else:
        corpus = read_corpus(calib, split, column, max_calib_samples, max_calib_seq_len)
        if corpus.empty:
            raise CalibrationError(
                f"no calibration tokens: {corpus.source} is empty; give text or token ids, or calib='self'"
            )
        if corpus.rows:
            for number, row in enumerate(corpus.rows):
                check_row_length(number, row.numel(), limit)
            blocks = row_blocks(corpus.rows, max_calib_samples, max_calib_seq_len)
            report(blocks.ids.numel(), blocks.ids.numel())
        else:
            text = TokenizedText(corpus.texts, tokenizer, corpus.source)
            blocks = spread_blocks(text, max_calib_samples, max_calib_seq_len, report)
        notes = (*corpus.notes, *blocks.notes)
        found = CalibrationTokens(blocks.ids, corpus.source, blocks.dropped, notes)
    check_vocabulary(found.ids, vocab_size)
    return found


def all_tokens(
    calib: Any,
    *,
    tokenizer: Any = None,
    split: str | None = None,
    column: str | None = None,
    max_tokens: int | None = None,
) -> Tensor:
    """Every token of a text, in order, ``(T,)``: what perplexity is measured on.

    Takes what :func:`load_tokens` takes but ``"self"``; ``max_tokens`` stops after so many.

    Raises:
        CalibrationError: as :func:`load_tokens`.
    """
    corpus = read_all(calib, split, column)
    if corpus.empty:
        raise CalibrationError(f"no tokens: {corpus.source} is empty")
    if corpus.rows:
        return torch.cat(corpus.rows)[:max_tokens]
    text = TokenizedText(corpus.texts, tokenizer, corpus.source)
    return torch.tensor(text.ids(max_tokens), dtype=torch.int64)[:max_tokens]


def _silent(done: int, total: int) -> None:
    """Progress that nobody watches."""
