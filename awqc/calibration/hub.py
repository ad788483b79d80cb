"""Named data sets, streamed through the ``datasets`` library so that only what is used is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from awqc.errors import CalibrationError


@dataclass(frozen=True)
class DataSet:
    """Where a data set is on the Hugging Face hub and what of it to read.

    Args:
        path: ``owner/name``.
        config: the configuration; None for the only or default one.
        split: the split.
        lines: True if consecutive rows are the lines of one text, not documents of their own.
    """

    path: str
    config: str | None = None
    split: str = "train"
    lines: bool = False

    def __str__(self) -> str:
        return f"data set {self.path}{':' + self.config if self.config else ''} [{self.split}]"


#: Short names of the field's usual calibration sets.
PRESETS = {
    "pileval": DataSet("mit-han-lab/pile-val-backup", split="validation"),
    "wikitext": DataSet("Salesforce/wikitext", "wikitext-2-raw-v1", lines=True),
    "c4": DataSet("allenai/c4", "en"),
}


def find_dataset(calib: str, split: str | None) -> DataSet:
    """The data set that ``calib`` names: a preset or any hub name, with an optional ``:config``."""
    name, _, config = calib.partition(":")
    base = PRESETS.get(name, DataSet(name))
    return DataSet(base.path, config or base.config, split or base.split, base.lines)


def stream(dataset: DataSet, calib: str) -> Iterator[dict[str, Any]]:
    """The rows of ``dataset`` in its own order, fetched as they are asked for.

    Raises:
        CalibrationError: if ``datasets`` is not installed, or the data set cannot be fetched.
    """
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"calib={calib!r} is no local file, and reading the {dataset} needs the datasets package: "
            f"pip install 'awqc[data]', {_WAY_OUT}"
        ) from error
    # Whichever HTTP client this version of the hub's library is built on.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield from datasets.load_dataset(dataset.path, dataset.config, split=dataset.split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, HTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CalibrationError(
            f"calib={calib!r} is no local file, and the {dataset} cannot be fetched ({reason}): "
            f"check the name and the network, {_WAY_OUT}"
        ) from error


_WAY_OUT = "or give a .txt, .jsonl or .parquet file, or calib='self'"
