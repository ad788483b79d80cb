"""Local calibration files: .txt and .jsonl, plain or compressed with gzip or xz, and .parquet."""

from __future__ import annotations

import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from awqc.calibration.documents import KNOWN_COLUMNS
from awqc.errors import CalibrationError

_OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open}
_KINDS = (".txt", ".jsonl", ".parquet")


def looks_like_file(name: str) -> bool:
    """True if ``name`` ends as a calibration file does, so that a missing one is not taken for a data set."""
    return _kind(Path(name)) in _KINDS


def read_items(path: Path, column: str | None, max_characters: int) -> Iterator[Any]:
    """The items of a file: its text as one string, or one record for each row.

    Args:
        path: ``.txt``, ``.jsonl`` (either may end in ``.gz`` or ``.xz``) or ``.parquet``.
        column: the one column to fetch of a ``.parquet`` file; None fetches those usually read.
        max_characters: a ``.txt`` file is read up to one character beyond, to show that there is more.

    Raises:
        CalibrationError: if the file is missing, of another kind, damaged or not UTF-8.
    """
    kind = _kind(path)
    if kind not in _KINDS:
        raise CalibrationError(
            f"{path}: a calibration file is .txt or .jsonl (either may end in .gz or .xz) or .parquet"
        )
    try:
        if kind == ".parquet":
            yield from _parquet(path, column)
        else:
            with _OPENERS.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8-sig") as handle:
                if kind == ".txt":
                    # A text file makes room for what is asked of it, so "everything" has to be said as -1.
                    yield handle.read(max_characters + 1 if max_characters < sys.maxsize else -1)
                else:
                    yield from _records(handle, path)
    except FileNotFoundError:
        raise CalibrationError(f"{path}: no such calibration file") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise CalibrationError(f"{path} cannot be read: {error}") from error


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _records(handle: IO[str], path: Path) -> Iterator[Any]:
    for number, line in enumerate(handle, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{path}, line {number} is not JSON: {error}") from error


def _parquet(path: Path, column: str | None) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CalibrationError(
            f"{path}: reading .parquet needs pyarrow: pip install 'awqc[data]', or convert it to .jsonl"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            present = file.schema_arrow.names
            wanted = [column] if column else [*KNOWN_COLUMNS, "attention_mask"]
            # A file with none of them is read whole, so that the error can list its columns.
            columns = [name for name in wanted if name in present] or None
            for batch in file.iter_batches(batch_size=256, columns=columns):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise CalibrationError(f"{path} cannot be read: {error}") from error
