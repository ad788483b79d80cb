"""Text to token ids: documents joined as the tokenizer joins them, passages found without reading all."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from awqc.calibration.corpus import conversation_length
from awqc.calibration.documents import Conversation
from awqc.errors import CalibrationError, NoTokenizerError

#: Characters encoded at first for each token still wanted; doubled until they suffice.
_CHARACTERS_PER_TOKEN = 6


class TokenizedText:
    """Documents as one stream of token ids, encoded where it is read.

    Each document is encoded as the tokenizer encodes a text by default. Where that adds no special token,
    documents are separated by the end-of-text token if there is one. A conversation is what the chat
    template makes of it, which brings its own special tokens.

    Args:
        texts: strings and conversations.
        tokenizer: a transformers tokenizer.
        source: what the documents are, for errors.

    Raises:
        CalibrationError: if there are conversations and the tokenizer has no chat template.
    """

    def __init__(self, texts: Sequence[str | Conversation], tokenizer: Any, source: str) -> None:
        if tokenizer is None:
            raise NoTokenizerError(f"{source} is text: pass the model's tokenizer, or token ids instead")
        if not tokenizer.chat_template and not all(isinstance(text, str) for text in texts):
            raise CalibrationError(
                f"{source} holds conversations, but the tokenizer has no chat template: "
                "give plain strings, or set tokenizer.chat_template"
            )
        self._texts = [text for text in texts if text]
        self._tokenizer, self._source = tokenizer, source
        lengths = [len(text) if isinstance(text, str) else conversation_length(text) for text in self._texts]
        #: Where each document begins, in characters of all, and where the last ends.
        self._starts = [0, *itertools.accumulate(lengths)]
        adds_its_own = bool(self._tokenize("", special_tokens=True))
        eos = tokenizer.eos_token_id
        self._separator = [] if adds_its_own or eos is None else [eos]

    @property
    def characters(self) -> int:
        """Characters of all documents."""
        return self._starts[-1]

    def ids(self, most: int | None = None) -> list[int]:
        """The ids of all documents, or the first ``most`` of them and perhaps some more."""
        found, _ = self._read(0, 0, most)
        return found

    def passage(self, low: int, reach: int, tokens: int) -> tuple[list[int], int] | None:
        """At least ``tokens`` ids from about character ``low`` on, and the character where they end.

        The passage begins with the first document that begins within ``reach`` characters, or else at the
        next line (or word) of the text there, or else (in a conversation) with the next document.
        None if the documents end before there are as many ids.
        """
        document = bisect.bisect_left(self._starts, low, hi=len(self._texts))
        offset = 0
        if document == len(self._texts) or self._starts[document] >= low + reach:
            current = self._texts[document - 1]
            if isinstance(current, str):
                document -= 1
                offset = _next_line(current, low - self._starts[document], reach)
            elif document == len(self._texts):
                return None
        ids, end = self._read(document, offset, tokens)
        return (ids, end) if len(ids) >= tokens else None

    def _read(self, document: int, offset: int, most: int | None) -> tuple[list[int], int]:
        """Ids from ``offset`` of ``document`` on until there are ``most``, and the character they end at."""
        ids: list[int] = []
        end = self._starts[document] + offset
        while document < len(self._texts) and (most is None or len(ids) < most):
            if ids:
                ids += self._separator
            text = self._texts[document]
            if isinstance(text, str):
                more, stop = self._encode(text, offset, None if most is None else most - len(ids))
                end = self._starts[document] + stop
            else:
                more = self._tokenize(self._render(document, text), special_tokens=False)
                end = self._starts[document + 1]
            ids += more
            document, offset = document + 1, 0
        return ids, end

    def _encode(self, text: str, offset: int, most: int | None) -> tuple[list[int], int]:
        """Ids of ``text`` from ``offset`` until there are more than ``most``, and where in it they end."""
        size = max(1, most * _CHARACTERS_PER_TOKEN) if most is not None else len(text)
        while offset + size < len(text):
            ids = self._tokenize(text[offset : offset + size], special_tokens=True)
            if most is not None and len(ids) > most:
                return ids, offset + size
            size *= 2
        return self._tokenize(text[offset:], special_tokens=True), len(text)

    def _tokenize(self, text: str, special_tokens: bool) -> list[int]:
        # verbose: the tokenizer would warn that a whole text is longer than the model's context.
        encoded = self._tokenizer(text, add_special_tokens=special_tokens, verbose=False)
        return list(encoded["input_ids"])

    def _render(self, number: int, conversation: Conversation) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(conversation, tokenize=False))
        except TemplateError as error:
            raise CalibrationError(
                f"conversation {number} of {self._source} does not fit the tokenizer's chat template: {error}"
            ) from error


def _next_line(text: str, offset: int, reach: int) -> int:
    """Where the first line, or else the first word, begins after ``offset`` and before ``offset + reach``."""
    for separator in ("\n", " "):
        found = text.find(separator, offset, offset + reach)
        if found >= 0:
            return found + 1
    return offset
