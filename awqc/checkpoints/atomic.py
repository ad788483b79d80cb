"""Directories that appear complete or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from awqc.errors import CheckpointError

#: Error numbers of a disk without space.
FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def atomic_directory(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside ``path`` that takes its place when the block ends well.

    Everything is flushed to the disk before it is renamed. When the block raises, Ctrl-C included, the
    temporary directory is removed and what was at ``path`` is as it was.

    Args:
        path: the directory to appear. Parents are created.
        overwrite: replace a checkpoint that is already there.

    Raises:
        CheckpointError: see :func:`check_output`; or the disk is full.
    """
    target = check_output(path, overwrite=overwrite)
    partial = _sibling(target, "partial")
    _make(target, partial)
    try:
        yield partial
        _flush_tree(partial)
        _put(partial, target)
    except OSError as error:
        if error.errno in FULL:
            raise _disk_full(target, partial, getattr(error, "needed", 0)) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(path: Path | str, *, overwrite: bool = False) -> Path:
    """Whether a checkpoint may be written to ``path``; worth asking before hours of work.

    Returns:
        The absolute path with symbolic links resolved.

    Raises:
        CheckpointError: if ``path`` cannot be written, is a file or a mount point, or is a directory
            that is not empty and either ``overwrite`` is not set or it holds no checkpoint.
    """
    target = Path(os.path.realpath(path))
    parent = _nearest(target.parent)
    if not parent.is_dir():
        raise CheckpointError(
            f"cannot write {target}: {parent} is a file, not a directory: choose another output path"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise _denied(target, parent)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"cannot write {target}: it is a file: choose another output path")
    if os.path.ismount(target):
        raise CheckpointError(
            f"cannot write {target}: it is a mount point, which cannot be replaced in one step: choose a "
            f"directory inside it, for example {target / 'model'}"
        )
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise CheckpointError(
                f"{target} already exists and is not empty: choose another output path, or pass "
                "overwrite=True (--overwrite) to replace it"
            )
        if not (target / "config.json").is_file():
            raise CheckpointError(
                f"{target} holds no config.json, so it is not a checkpoint and will not be replaced: choose "
                "another output path, or remove it yourself"
            )
    return target


def _sibling(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{role}")


def _denied(target: Path, parent: Path) -> CheckpointError:
    return CheckpointError(
        f"cannot write {target}: no permission to create files in {parent}: choose another output path, or "
        "change its permissions"
    )


def _make(target: Path, partial: Path) -> None:
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        # os.access answers for permissions only; a read-only file system shows up here.
        if error.errno in _DENIED:
            raise _denied(target, partial.parent) from error
        if error.errno in FULL:
            raise _disk_full(target, partial, 0) from error
        raise


def _put(partial: Path, target: Path) -> None:
    old = _sibling(target, "old")
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(partial, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush_tree(directory: Path) -> None:
    for root, _, files in os.walk(directory):
        for file in files:
            flush(Path(root, file))
        flush(Path(root))


def flush(path: Path) -> None:
    """Have what was written to a file, or the names in a directory, survive a loss of power."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a directory
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_full(target: Path, partial: Path, needed: int) -> CheckpointError:
    """The error for a file of ``needed`` bytes that did not fit next to those already in ``partial``."""
    written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    free = shutil.disk_usage(_nearest(target.parent)).free
    return CheckpointError(
        f"the disk is full: {target} needs more than {written + needed:,} bytes and {written + free:,} are "
        "available there: free some space or choose another output path"
    )


def _nearest(path: Path) -> Path:
    """``path``, or its nearest ancestor that exists."""
    while not path.exists():
        path = path.parent
    return path
