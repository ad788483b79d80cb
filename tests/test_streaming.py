"""awqc.compile_to: what it writes is what compile and save write, in one go or in several."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

import awqc
import awqc.journal.journal
from awqc import QuantConfig
from awqc.errors import JournalError
from awqc.journal import journal_path
from awqc.journal.entry import read_entry, write_entry
from awqc.journal.store import JournalStore
from awqc.passes.round_weights import RoundWeights
from awqc.quantized import Scheme, quantize
from awqc.weights import Memory, Rounded
from tests.mixtures import build
from tests.models import gpt2, llama

CONFIG = QuantConfig(group_size=32)
#: Stages of two layers: inputs of q, k and v, of o, of gate and up, and of down.
STAGES = 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    llama().save_pretrained(folder)
    return folder


def compile_to(model: Any, out: Path, ids: Tensor, **options: Any) -> awqc.CompiledCheckpoint:
    return awqc.compile_to(model, out, ids, **{"backend": "reference", "config": CONFIG, **options})


def tensors(path: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def same(a: Path, b: Path) -> None:
    """Every file but the report has the same bytes; the report differs in times and what was continued."""
    assert sorted(f.name for f in a.iterdir()) == sorted(f.name for f in b.iterdir())
    for file in a.iterdir():
        if file.name != "awqc_report.json":
            assert file.read_bytes() == (b / file.name).read_bytes(), file.name
    reports = [json.loads((path / "awqc_report.json").read_text()) for path in (a, b)]
    for report in reports:
        del report["seconds"]
        report["notes"] = [note for note in report["notes"] if note[0] != "journal"]
    assert reports[0] == reports[1]


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
    """The next compile ends with ``error`` after so many stages."""
    count = 0

    def write(*arguments: Any) -> Any:
        nonlocal count
        if count == after:
            raise error
        count += 1
        return write_entry(*arguments)

    monkeypatch.setattr(awqc.journal.journal, "write_entry", write)


def continued(path: Path) -> list[str]:
    report = json.loads((path / "awqc_report.json").read_text())
    return [what for where, what in report["notes"] if where == "journal"]


MODELS: dict[str, Callable[[], Any]] = {"llama": llama, "gpt2": gpt2, "mixtral": lambda: build("mixtral")}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("format", ["compressed-tensors", "awqc"])
def test_it_writes_what_save_writes(name: str, format: str, token_ids: Tensor, tmp_path: Path) -> None:
    source = tmp_path / "source"
    MODELS[name]().save_pretrained(source)
    token_ids = token_ids % 90  # the vocabulary of some
    written = compile_to(source, tmp_path / "streamed", token_ids, format=format)
    compiled = awqc.compile(source, token_ids, backend="reference", config=CONFIG)
    saved = tensors(compiled.save(tmp_path / "saved", format))
    found = tensors(written.path)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    assert written.report.linears == compiled.report.linears
    assert written.report.sizes == compiled.report.sizes
    configs = [json.loads((tmp_path / p / "config.json").read_text()) for p in ("streamed", "saved")]
    assert configs[0] == configs[1]
    assert not journal_path(written.path).exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_source_in_16_bits(dtype: torch.dtype, token_ids: Tensor, tmp_path: Path) -> None:
    llama().to(dtype).save_pretrained(tmp_path / "source")
    written = compile_to(tmp_path / "source", tmp_path / "out", token_ids, format="compressed-tensors")
    compiled = awqc.compile(tmp_path / "source", token_ids, backend="reference", config=CONFIG)
    saved, found = tensors(compiled.save(tmp_path / "saved", "compressed-tensors")), tensors(written.path)
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    assert {t.dtype for name, t in found.items() if "norm" in name or "embed" in name} == {dtype}


def test_a_model_in_memory(tiny_llama: LlamaForCausalLM, token_ids: Tensor, tmp_path: Path) -> None:
    written = compile_to(tiny_llama, tmp_path / "out", token_ids)
    assert written.format == "awq"
    compiled = awqc.compile(tiny_llama, token_ids, backend="reference", config=CONFIG)
    saved = tensors(compiled.save(tmp_path / "saved"))
    assert all(torch.equal(t, saved[name]) for name, t in tensors(written.path).items())


@pytest.mark.parametrize("propagate", ["quantized", "float"])
@pytest.mark.parametrize("after", [0, 1, 2, 3, 6, 7])
def test_a_compile_that_is_continued_ends_with_the_same_bits(
    after: int,
    propagate: Any,
    directory: Path,
    token_ids: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = QuantConfig(group_size=32, propagate=propagate)
    whole = compile_to(directory, tmp_path / "whole", token_ids, config=config)
    said = "the same command continues from there" if after else "^$"
    with monkeypatch.context() as patch:
        interrupted(patch, after, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match=said):
            compile_to(directory, tmp_path / "out", token_ids, config=config)
    assert not (tmp_path / "out").exists()
    assert journal_path(tmp_path / "out").exists() == (after > 0)
    again = compile_to(directory, tmp_path / "out", token_ids, config=config)
    same(whole.path, again.path)
    assert continued(again.path) == ([f"continued after {after} finished stages"] if after else [])
    assert not journal_path(again.path).exists()


def test_only_writing_is_left_when_all_stages_are_finished(
    directory: Path, token_ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compile_to(directory, tmp_path / "whole", token_ids)

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr("awqc.streaming.write", fail)
        with pytest.raises(OSError, match="gone"):
            compile_to(directory, tmp_path / "out", token_ids)
    with monkeypatch.context() as patch:
        patch.setattr("awqc.pipeline.Activations", fail)
        same(whole.path, compile_to(directory, tmp_path / "out", token_ids).path)


# -- what is not continued ---------------------------------------------------------------------------------


def stopped(directory: Path, out: Path, ids: Tensor, patch: pytest.MonkeyPatch, after: int = 3) -> Path:
    """A journal of three stages."""
    with patch.context() as context:
        interrupted(context, after, RuntimeError("stop"))
        with pytest.raises(RuntimeError, match="stop"):
            compile_to(directory, out, ids)
    return journal_path(out)


@pytest.mark.parametrize("part", ["json", "safetensors"])
@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_damaged_entries_are_computed_again(
    part: str,
    damage: str,
    directory: Path,
    token_ids: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = compile_to(directory, tmp_path / "whole", token_ids)
    journal = stopped(directory, tmp_path / "out", token_ids, monkeypatch)
    file = journal / f"stage-00001.{part}"
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data if damage == "changed" else data[:-9])
    again = compile_to(directory, tmp_path / "out", token_ids)
    same(whole.path, again.path)
    notes = continued(again.path)
    assert notes[-1] == "continued after 1 finished stages"
    if (part, damage) != ("json", "missing"):  # without its record an entry was never committed
        assert notes[0].startswith("stages after the first 1 are computed again: ")
        assert str(journal / "stage-00001") in notes[0]


def test_a_journal_whose_identity_is_damaged_starts_over(
    directory: Path, token_ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = stopped(directory, tmp_path / "out", token_ids, monkeypatch)
    (journal / "identity.json").write_text("{")
    again = compile_to(directory, tmp_path / "out", token_ids)
    assert [note.partition(":")[0] for note in continued(again.path)] == ["nothing was continued"]


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "option": ({"config": QuantConfig(group_size=64)}, "option group_size (was 32, is 64)"),
    "calibration": ({"max_calib_samples": 3}, "calibration inputs (was "),
    "pass": (
        {"pipeline": awqc.Pipeline.default().replace("round-weights", RoundWeights(method="nearest"))},
        "passes (without round-weights: RoundWeights(method='compensated', sweeps=0) and with "
        "round-weights: RoundWeights(method='nearest', sweeps=0))",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_compile_does_not_continue(
    change: str, directory: Path, token_ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, message = CHANGES[change]
    journal = stopped(directory, tmp_path / "out", token_ids, monkeypatch)
    with pytest.raises(JournalError) as caught:
        compile_to(directory, tmp_path / "out", token_ids, **options)
    assert str(caught.value).startswith(f"{journal} was left by a compile of something else: {message}")
    assert str(caught.value).endswith(
        "Run it as it was, choose another output path, or pass resume=False (--no-resume) to start over"
    )
    # Nothing of it is lost, and starting over is what it says.
    assert len(list(journal.glob("stage-*.json"))) == 3
    assert continued(compile_to(directory, tmp_path / "out", token_ids, resume=False, **options).path) == []


def test_other_weights_of_the_same_size_are_noticed(
    token_ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source = llama(), tmp_path / "source"
    model.save_pretrained(source)
    stopped(source, tmp_path / "out", token_ids, monkeypatch)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(source)
    with pytest.raises(JournalError, match=r"something else: model\.safetensors has other content\."):
        compile_to(source, tmp_path / "out", token_ids)


def test_a_full_disk_keeps_what_is_finished(
    directory: Path, token_ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compile_to(directory, tmp_path / "whole", token_ids)
    count, fsync = 0, awqc.journal.entry.os.fsync

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == 12:  # two files of each stage, the directory, and two files before the first
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("awqc.journal.entry.os.fsync", full)
        with pytest.raises(JournalError) as caught:
            compile_to(directory, tmp_path / "out", token_ids)
    assert "the disk is full: " in str(caught.value)
    assert "free some space and run the same command again" in str(caught.value)
    again = compile_to(directory, tmp_path / "out", token_ids)
    assert continued(again.path) == ["continued after 3 finished stages"]
    same(whole.path, again.path)


def test_one_output_has_one_compile_at_a_time(
    directory: Path, token_ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filelock import FileLock

    journal = stopped(directory, tmp_path / "out", token_ids, monkeypatch)
    with FileLock(journal / "lock"), pytest.raises(JournalError, match="in use: another process compiles"):
        compile_to(directory, tmp_path / "out", token_ids)


def test_what_is_read_from_the_journal_is_not_held(tmp_path: Path) -> None:
    weight = quantize(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), Scheme(4, 32))
    store = JournalStore(Memory(), torch.device("cpu"))
    store["w"] = Rounded(weight)
    record, tensors = store.take({})
    store.add(write_entry(tmp_path, 0, record, tensors))
    found = store["w"]
    assert isinstance(found, Rounded)
    store["w"] = Rounded(replace(found.weight, scales=2 * found.weight.scales))
    assert "codes:w" not in store.take({})[1]  # a fold keeps them
    store.add(read_entry(tmp_path, 0) or pytest.fail("there is no entry"))
    found = store["w"]
    assert isinstance(found, Rounded)
    codes = weakref.ref(found.weight.codes)
    del found
    assert codes() is None
