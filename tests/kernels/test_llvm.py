"""LLVM code to machine code: what it produces, what it keeps, and the reasons where it cannot."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import pytest

from awqc.kernels import llvm

OWN = pytest.mark.skipif(llvm.missing() is not None, reason=f"awqc's own CPU kernel {llvm.missing()}")
SOURCE = "define i64 @three() {\n  ret i64 VALUE\n}"


def call(value: int) -> int:
    isa = llvm.host_isa()
    assert isa is not None
    address = llvm.load(SOURCE.replace("VALUE", str(value)), "three", isa)
    return ctypes.CFUNCTYPE(ctypes.c_int64)(address)()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AWQC_KERNEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@OWN
def test_a_source_becomes_a_function_and_comes_from_the_disk_the_second_time(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(3) == 3
    (kept,) = cache.iterdir()
    assert kept.name.startswith(f"three-{llvm.host_isa().name}-")
    assert kept.read_bytes().startswith(b"\x7fELF")
    monkeypatch.setattr(llvm, "_compile", lambda *_: pytest.fail("compiled again"))
    assert call(3) == 3


@OWN
def test_whatever_decides_the_code_is_in_its_name(cache: Path) -> None:
    assert [call(value) for value in (3, 4)] == [3, 4]
    for isa in llvm.host_isas():
        llvm.load(SOURCE.replace("VALUE", "3"), "three", isa)
    assert len(list(cache.iterdir())) == 1 + len(llvm.host_isas())


@OWN
def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AWQC_KERNEL_CACHE", str(tmp_path / "file" / "below"))
    assert call(3) == 3


@OWN
def test_llvm_says_what_is_wrong() -> None:
    with pytest.raises(RuntimeError, match="expected"):
        llvm.load("define i64 @three() {\n  return 3\n}", "three", llvm.ISAS[-1])


@OWN
def test_a_function_from_outside_is_refused_rather_than_called() -> None:
    source = """
define void @three(ptr %to, ptr %from, i64 %n) {
  call void @llvm.memcpy.p0.p0.i64(ptr %to, ptr %from, i64 %n, i1 false)
  ret void
}
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)"""
    with pytest.raises(RuntimeError, match="makes calls of memcpy: use another llvmlite"):
        llvm.load(source, "three", llvm.ISAS[-1])


def test_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert llvm.missing() == "is written for x86-64 CPUs, not for aarch64"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="refused before, for its architecture")
def test_no_llvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llvm, "_binding", lambda: None)
    assert llvm.missing() == "needs llvmlite, which is not installed: pip install 'awqc[cpu]'"


@OWN
def test_no_openmp_or_an_old_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llvm, "host_isas", lambda: ())
    assert llvm.missing() == "needs a CPU with AVX2, FMA and F16C"
    monkeypatch.setattr(llvm, "openmp", lambda: None)
    assert llvm.missing().startswith("needs OpenMP's threads, which torch ")
