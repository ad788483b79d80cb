"""Reports as commands are given them: the file, or the checkpoint that holds it."""

from __future__ import annotations

from pathlib import Path

from awqc.errors import CheckpointError
from awqc.report import REPORT_FILE, Report


def read_report(path: Path) -> Report:
    """The report in a checkpoint directory, or in a file of its own.

    Raises:
        CheckpointError: if there is none, or it is damaged or of another version.
    """
    file = path / REPORT_FILE if path.is_dir() else path
    if not file.is_file():
        if path.is_dir():
            raise CheckpointError(
                f"{path} has no {REPORT_FILE}: only checkpoints that awqc has written hold one"
            )
        raise CheckpointError(f"there is no {path}: give a checkpoint directory or a report")
    try:
        return Report.from_json(file.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged, or of another version of awqc: {error}") from error
