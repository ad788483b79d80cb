"""What happens to files where a model cannot be written, or writing is broken off."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import awqc
from awqc import CompiledModel
from awqc.checkpoints import shards
from awqc.errors import CheckpointError
from tests.test_bad_input import CONFIG


@pytest.fixture(scope="module")
def compiled(tiny_llama: LlamaForCausalLM, token_ids: Tensor) -> CompiledModel:
    return awqc.compile(tiny_llama, token_ids, backend="reference", config=CONFIG)


def failed_save(compiled: CompiledModel, path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        compiled.save(path, **options)
    return str(caught.value)


def test_an_output_path_under_a_file(compiled: CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert failed_save(compiled, tmp_path / "file" / "out") == (
        f"cannot write {tmp_path / 'file' / 'out'}: {tmp_path / 'file'} is a file, not a directory: choose "
        "another output path"
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_path_without_permission(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated, since whoever runs the tests may be root, who has every permission."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert failed_save(compiled, tmp_path / "out") == (
        f"cannot write {tmp_path / 'out'}: no permission to create files in {tmp_path}: choose another "
        "output path, or change its permissions"
    )
    assert list(tmp_path.iterdir()) == []


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(shards, "save_file", no_space)


def interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the shard is written: half of it is on the disk."""
    write = shards.save_file

    def interrupted(tensors: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        write(tensors, file, *args, **kwargs)
        Path(file).write_bytes(Path(file).read_bytes()[:100])
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(shards, "save_file", interrupted)


def test_a_full_disk(compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch)
    message = failed_save(compiled, tmp_path / "out")
    assert message.startswith(f"the disk is full: {tmp_path / 'out'} needs more than ")
    assert message.endswith(" are available there: free some space or choose another output path")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_saving(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        compiled.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fail", "error"),
    [(full_disk, CheckpointError), (interrupt, KeyboardInterrupt)],
    ids=["full disk", "ctrl-c"],
)
def test_a_failed_save_leaves_the_checkpoint_that_was_there(
    fail: Callable[[pytest.MonkeyPatch], None],
    error: type[BaseException],
    compiled: CompiledModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = compiled.save(tmp_path / "out", format="awqc")
    before = snapshot(tmp_path)
    fail(monkeypatch)
    with pytest.raises(error):
        compiled.save(path, overwrite=True)
    assert snapshot(tmp_path) == before
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_while_compiling(token_ids: Tensor, tiny_llama: LlamaForCausalLM) -> None:
    """The model is as it was, and can be compiled again."""

    class Impatient:
        def track(self, items: Sequence[Any], what: str) -> Iterable[Any]:
            yield from items[:3]
            signal.raise_signal(signal.SIGINT)

        def count(self, what: str) -> Callable[[int, int], None]:
            return lambda done, total: None

    model = copy.deepcopy(tiny_llama)
    with pytest.raises(KeyboardInterrupt):
        awqc.compile(model, token_ids, config=CONFIG, backend="reference", progress=Impatient())
    want = tiny_llama.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, tiny_llama(token_ids).logits)


def test_an_unknown_format(compiled: CompiledModel, tmp_path: Path) -> None:
    assert failed_save(compiled, tmp_path / "out", format="gguf") == (
        "unknown checkpoint format 'gguf': choose one of awq, awqc, compressed-tensors"
    )
    assert list(tmp_path.iterdir()) == []
