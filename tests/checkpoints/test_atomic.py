from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest

from awqc.checkpoints import atomic_directory, check_output
from awqc.checkpoints.shards import DiskFull
from awqc.errors import CheckpointError


def checkpoint(path: Path, text: str = "old") -> Path:
    path.mkdir()
    (path / "config.json").write_text(text)
    return path


def content(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


def write(path: Path, *, overwrite: bool = False, error: BaseException | None = None) -> None:
    with atomic_directory(path, overwrite=overwrite) as directory:
        assert directory.parent == path.parent
        (directory / "config.json").write_text("new")
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_text("deep")
        if error is not None:
            raise error


NEW = {"config.json": "new", "sub/file": "deep"}


def test_the_directory_appears_complete(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with atomic_directory(out) as directory:
        (directory / "x").write_text("x")
        assert not out.exists()
    assert content(tmp_path) == {"a/b/out/x": "x"}


def test_it_has_the_permissions_of_any_new_directory(tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "plain").mkdir()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out", "plain")}
    assert len(modes) == 1


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        write(tmp_path / "out", error=error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    out = checkpoint(tmp_path / "out")
    with pytest.raises(type(error)):
        write(out, overwrite=True, error=error)
    assert content(tmp_path) == {"out/config.json": "old"}


def test_overwriting_replaces_everything(tmp_path: Path) -> None:
    out = checkpoint(tmp_path / "out")
    (out / "stale").write_text("stale")
    write(out, overwrite=True)
    assert content(out) == NEW
    assert list(tmp_path.iterdir()) == [out]


def test_an_empty_directory_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert content(tmp_path / "out") == NEW


def test_a_symbolic_link_keeps_pointing(tmp_path: Path) -> None:
    real = checkpoint(tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    write(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert content(real) == NEW


def test_interrupted_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old checkpoint has been moved aside when Ctrl-C comes: it is put back."""
    out = checkpoint(tmp_path / "out")
    rename, calls = os.rename, []

    def second_is_interrupted(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(out, overwrite=True)
    assert content(tmp_path) == {"out/config.json": "old"}


def test_refuses_to_overwrite_unasked(tmp_path: Path) -> None:
    out = checkpoint(tmp_path / "out")
    with pytest.raises(CheckpointError) as caught:
        write(out)
    assert str(caught.value) == (
        f"{out} already exists and is not empty: choose another output path, or pass overwrite=True "
        "(--overwrite) to replace it"
    )
    assert content(out) == {"config.json": "old"}


def test_refuses_to_replace_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError) as caught:
        check_output(tmp_path, overwrite=True)
    assert str(caught.value) == (
        f"{tmp_path} holds no config.json, so it is not a checkpoint and will not be replaced: choose "
        "another output path, or remove it yourself"
    )


def test_the_target_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError) as caught:
        check_output(tmp_path / "out")
    assert str(caught.value) == f"cannot write {tmp_path / 'out'}: it is a file: choose another output path"


def test_a_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "deep" / "out"
    with pytest.raises(CheckpointError) as caught:
        check_output(out)
    assert str(caught.value) == (
        f"cannot write {out}: {tmp_path / 'file'} is a file, not a directory: choose another output path"
    )


def no_permission(out: Path, parent: Path) -> str:
    return (
        f"cannot write {out}: no permission to create files in {parent}: choose another output path, or "
        "change its permissions"
    )


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError) as caught:
        check_output(tmp_path / "new" / "out")
    assert str(caught.value) == no_permission(tmp_path / "new" / "out", tmp_path)


def test_a_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(CheckpointError) as caught:
        write(tmp_path / "out")
    assert str(caught.value) == no_permission(tmp_path / "out", tmp_path)


def test_a_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(CheckpointError) as caught:
        check_output(tmp_path)
    assert str(caught.value) == (
        f"cannot write {tmp_path}: it is a mount point, which cannot be replaced in one step: choose a "
        f"directory inside it, for example {tmp_path / 'model'}"
    )


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = checkpoint(tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)._replace(free=1500)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError) as caught:
        write_one_file_and_fail(out)
    assert str(caught.value) == (
        f"the disk is full: {out} needs more than 3,000 bytes and 2,500 are available there: free some space "
        "or choose another output path"
    )
    assert content(tmp_path) == {"out/config.json": "old"}


def test_a_full_disk_met_by_any_write(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^the disk is full: .* needs more than 0 bytes and "):
        write_nothing_but_fail(tmp_path / "out", errno.ENOSPC)
    assert list(tmp_path.iterdir()) == []


def test_other_operating_system_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        write_nothing_but_fail(tmp_path / "out", errno.EIO)
    assert list(tmp_path.iterdir()) == []


def write_one_file_and_fail(out: Path) -> None:
    with atomic_directory(out, overwrite=True) as directory:
        (directory / "first").write_bytes(bytes(1000))
        raise DiskFull(2000)


def write_nothing_but_fail(out: Path, code: int) -> None:
    with atomic_directory(out):
        raise OSError(code, os.strerror(code))
