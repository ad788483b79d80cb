"""Python objects as documents: strings, conversations, token ids, and records that hold one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from awqc.errors import CalibrationError

#: A conversation in the form that chat templates take: ``[{"role": ..., "content": ...}, ...]``.
Conversation: TypeAlias = list[dict[str, Any]]
#: A text, a conversation, or token ids ``(n,)``.
Document: TypeAlias = str | Conversation | Tensor

#: Columns of a record that are used without being asked for, the first one present.
KNOWN_COLUMNS = ("input_ids", "messages", "conversations", "text")

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def items_of(calib: Any) -> Iterable[Any]:
    """``calib`` as an iterable of items, each of which :func:`documents_of` understands.

    One row of ids, one conversation and one record are what they look like, not lists of their parts.
    """
    if isinstance(calib, Tensor | np.ndarray | Mapping):
        return [calib]
    if isinstance(calib, Sequence) and calib and (_is_id(calib[0]) or _is_message(calib[0])):
        return [calib]
    if isinstance(calib, Iterable) and not isinstance(calib, bytes):
        return calib
    raise CalibrationError(f"calib is {_kind(calib)}: {_EXPECTED}")


def documents_of(item: Any, column: str | None, where: str) -> Iterator[Document]:
    """The documents in one item; a record or a batch of rows may hold several.

    Args:
        item: a string, a conversation, token ids of one or two dimensions, or a record (mapping).
        column: the column of a record to read; None takes the first of :data:`KNOWN_COLUMNS` present.
        where: what to call the item in an error.

    Raises:
        CalibrationError: for anything else, and for a record without the column.
    """
    if column is not None and not isinstance(item, Mapping):
        raise CalibrationError(f"column={column!r}: {where} is {_kind(item)} and has no columns")
    if isinstance(item, Mapping):
        name = _column(item, column, where)
        if name == "input_ids":
            yield from _rows(item[name], item.get("attention_mask"), where)
        else:
            yield from documents_of(item[name], None, f"column {name!r} of {where}")
    elif isinstance(item, str):
        yield item
    elif isinstance(item, Sequence) and item and all(map(_is_message, item)):
        yield [_message(message) for message in item]
    elif isinstance(item, Tensor | np.ndarray | Sequence) and not isinstance(item, bytes):
        yield from _rows(item, None, where)
    else:
        raise CalibrationError(f"{where} is {_kind(item)}: {_EXPECTED}")


def _column(record: Mapping[str, Any], column: str | None, where: str) -> str:
    found = ", ".join(map(repr, record)) or "none"
    if column is not None:
        if column in record:
            return column
        raise CalibrationError(f"{where} has no column {column!r}: its columns are {found}")
    for known in KNOWN_COLUMNS:
        if known in record:
            return known
    raise CalibrationError(
        f"{where} has none of the columns {', '.join(map(repr, KNOWN_COLUMNS))}: its columns are {found}; "
        "name the one to read with column="
    )


def _rows(ids: Any, mask: Any, where: str) -> Iterator[Tensor]:
    """Rows ``(n,)`` of token ids of one or two dimensions, without the positions that ``mask`` hides."""
    if isinstance(ids, Sequence) and not (ids and _is_id(ids[0])):
        masks = [None] * len(ids) if mask is None else mask
        for number, (row, row_mask) in enumerate(zip(ids, masks, strict=True)):
            if not isinstance(row, Tensor | np.ndarray | Sequence) or isinstance(row, str | bytes):
                raise CalibrationError(f"element {number} of {where} is {_kind(row)}: {_EXPECTED}")
            yield from _rows(row, row_mask, where)
        return
    table = torch.as_tensor(ids)
    if table.dtype.is_floating_point or table.dtype.is_complex or table.dtype == torch.bool:
        raise CalibrationError(f"{where} holds {table.dtype} values: token ids are integers")
    if not 1 <= table.dim() <= 2:
        raise CalibrationError(
            f"{where} has shape {tuple(table.shape)}: token ids are (seq_len,) or (samples, seq_len)"
        )
    table = table.detach().to("cpu", torch.int64)
    keep = torch.ones_like(table, dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool().cpu()
    if keep.shape != table.shape:
        raise CalibrationError(
            f"attention_mask of {where} has shape {tuple(keep.shape)}, its input_ids {tuple(table.shape)}"
        )
    if table.dim() == 1:
        yield table[keep]
    else:
        for row, row_keep in zip(table, keep, strict=True):
            yield row[row_keep]


def _is_id(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or ("from" in value and "value" in value))


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    if "role" in message:
        return dict(message)
    role = message["from"]
    return {"role": _SHAREGPT_ROLES.get(role, role), "content": message["value"]}


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


_EXPECTED = (
    "calibration data are token ids, strings, conversations, records that hold one of these, a .txt, .jsonl "
    "or .parquet file, the name of a data set, or 'self'"
)
