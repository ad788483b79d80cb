"""From what the user named or gave to documents in memory, read no further than needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from awqc.calibration import files, hub
from awqc.calibration.documents import Conversation, Document, documents_of, items_of
from awqc.errors import CalibrationError

#: Characters that are read of a local file or an iterable: evenly spaced passages of so much text stand
#: for it as well as passages of more would, and it fits in memory.
MOST_CHARACTERS = 64 * 2**20

#: Characters fetched of a streamed data set for each token wanted, and read of a document of it for each
#: token of a block. A token takes four or five, so the blocks come from documents all over what is fetched.
STREAMED_CHARACTERS = 20


@dataclass(frozen=True)
class Corpus:
    """Documents of one kind, in their order: ``texts`` or ``rows``, the other is empty.

    Args:
        texts: strings and conversations.
        rows: token ids, each ``(n,)`` int64 on the CPU.
        source: what they are, readable.
        notes: what was left unread and why, one line each.
    """

    texts: tuple[str | Conversation, ...]
    rows: tuple[Tensor, ...]
    source: str
    notes: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """True if there is nothing in the documents."""
        return not any(self.texts) and not any(row.numel() for row in self.rows)


@dataclass(frozen=True)
class Budget:
    """How far to read.

    Args:
        characters: of text in all.
        per_document: characters of one text.
        tokens: of rows of ids in all.
    """

    characters: int = sys.maxsize
    per_document: int = sys.maxsize
    tokens: int = sys.maxsize


def read_corpus(calib: Any, split: str | None, column: str | None, samples: int, seq_len: int) -> Corpus:
    """Documents enough for ``samples`` blocks of ``seq_len`` tokens.

    ``calib``, ``split`` and ``column`` are those of :func:`awqc.calibration.load_tokens`.

    Raises:
        CalibrationError: if the data are missing, unreadable, of an unknown kind, or of mixed kinds.
    """
    tokens = samples * seq_len
    local = Budget(characters=MOST_CHARACTERS, tokens=tokens)
    streamed = Budget(STREAMED_CHARACTERS * tokens, STREAMED_CHARACTERS * seq_len, tokens)
    return _read(calib, split, column, local, streamed)


def read_all(calib: Any, split: str | None, column: str | None) -> Corpus:
    """Every document of ``calib``, as :func:`read_corpus` otherwise."""
    return _read(calib, split, column, Budget(), Budget())


def conversation_length(conversation: Conversation) -> int:
    """Characters of a conversation's messages, what its template will add not counted."""
    return sum(len(str(message.get("content", ""))) for message in conversation)


def _read(calib: Any, split: str | None, column: str | None, local: Budget, streamed: Budget) -> Corpus:
    if isinstance(calib, str) and not (os.path.isfile(calib) or files.looks_like_file(calib)):
        dataset = hub.find_dataset(calib, split)
        if not dataset.lines:
            return _collect(hub.stream(dataset, calib), column, streamed, f"the {dataset}")
        lines = _collect(hub.stream(dataset, calib), column, Budget(streamed.characters), f"the {dataset}")
        text = "".join(line for line in lines.texts if isinstance(line, str))
        return Corpus((text,), (), lines.source, lines.notes)
    if isinstance(calib, str | os.PathLike):
        path = Path(calib)
        items: Iterable[Any] = files.read_items(path, column, local.characters)
        source = str(path)
    else:
        items, source = items_of(calib), f"the {type(calib).__name__} given as calib"
    if split is not None:
        raise CalibrationError(f"split={split!r}: {source} has no splits, only a data set of the hub has")
    return _collect(items, column, local, source)


def _collect(items: Iterable[Any], column: str | None, budget: Budget, source: str) -> Corpus:
    """The documents in ``items``, as far as ``budget`` goes."""
    texts: list[str | Conversation] = []
    rows: list[Tensor] = []
    characters = tokens = 0
    whole = True
    for document in _documents(items, column, source):
        if characters >= budget.characters or tokens >= budget.tokens:
            whole = False
            break
        if isinstance(document, Tensor):
            rows.append(document)
            tokens += document.numel()
        elif isinstance(document, str):
            room = min(budget.per_document, budget.characters - characters)
            texts.append(document[:room])
            characters += len(texts[-1])
            whole = whole and len(document) <= room
        else:
            texts.append(document)
            characters += conversation_length(document)
        if texts and rows:
            raise CalibrationError(f"{source} mixes token ids and text: give one or the other")
    read = f"{len(rows)} rows" if rows else f"{characters} characters in {len(texts)} documents"
    return Corpus(tuple(texts), tuple(rows), source, () if whole else (f"only {read} were read",))


def _documents(items: Iterable[Any], column: str | None, source: str) -> Iterator[Document]:
    for number, item in enumerate(items):
        yield from documents_of(item, column, f"item {number} of {source}")
