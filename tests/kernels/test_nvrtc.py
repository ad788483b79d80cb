"""Compilation at run time: what it produces, what it keeps, and that every source compiles without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from awqc.kernels import nvrtc
from awqc.kernels.nvrtc import CompileError, architecture, compile_source, compile_with_log

pytestmark = pytest.mark.skipif(not nvrtc.available(), reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")
SOURCE = 'extern "C" __global__ void fill(float* y) { y[threadIdx.x] = VALUE; }'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AWQC_KERNEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_source_becomes_machine_code() -> None:
    cubin = compile_source(SOURCE, "sm_80", {"VALUE": 1})
    assert cubin.startswith(b"\x7fELF")
    assert b"fill" in cubin


def test_the_second_time_it_comes_from_the_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile_source(SOURCE, "sm_80", {"VALUE": 1}, name="fill.cu")
    assert [p.name.startswith("fill-sm_80-") for p in cache.iterdir()] == [True]
    monkeypatch.setattr(nvrtc, "compile_with_log", lambda *_: pytest.fail("compiled again"))
    assert compile_source(SOURCE, "sm_80", {"VALUE": 1}, name="fill.cu") == first


@pytest.mark.parametrize(
    ("arch", "defines", "options"),
    [
        ("sm_89", {"VALUE": 1}, ()),
        ("sm_80", {"VALUE": 2}, ()),
        ("sm_80", {"VALUE": 1}, ("--use_fast_math",)),
    ],
)
def test_whatever_decides_the_code_is_in_its_name(
    cache: Path, arch: str, defines: dict[str, int | str], options: tuple[str, ...]
) -> None:
    compile_source(SOURCE, "sm_80", {"VALUE": 1})
    compile_source(SOURCE, arch, defines, options)
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AWQC_KERNEL_CACHE", str(tmp_path / "file" / "below"))
    assert compile_source(SOURCE, "sm_80", {"VALUE": 1}).startswith(b"\x7fELF")


def test_the_log_says_what_is_wrong() -> None:
    with pytest.raises(
        CompileError, match=r"(?s)rejects broken\.cu with --gpu-architecture=sm_80.*\"nothing\" is"
    ):
        compile_source("int f() { return nothing; }", "sm_80", name="broken.cu")


def test_the_log_states_the_resources() -> None:
    flags = ["--gpu-architecture=sm_90a", "--ptxas-options=-v", "-DVALUE=1"]
    assert "0 bytes spill stores" in compile_with_log(SOURCE, flags)[1]


def test_architectures() -> None:
    assert [architecture(c) for c in ((8, 0), (8, 9), (9, 0), (12, 0))] == [
        "sm_80",
        "sm_89",
        "sm_90a",
        "sm_120",
    ]
