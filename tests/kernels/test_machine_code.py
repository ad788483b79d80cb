"""The code of kernels as text, without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from awqc.kernels import nvrtc
from awqc.kernels.exllama_block import ALONE, macros
from awqc.kernels.machine_code import CudaCode, disassembler, sass
from awqc.kernels.nvrtc import CompileError

pytestmark = pytest.mark.skipif(not nvrtc.available(), reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")
DENSE = CudaCode("marlin_dequantize.cu", "dequantize", {"BF16": 0, "SCALE_BF16": 0, "GROUP": 128})


def has_disassembler() -> bool:
    try:
        disassembler()
    except CompileError:
        return False
    return True


@pytest.mark.parametrize(("capability", "target"), [((8, 0), "sm_80"), ((9, 0), "sm_90a")])
def test_intermediate_code(capability: tuple[int, int], target: str) -> None:
    text = DENSE.ptx(capability)
    assert f".target {target}" in text
    assert ".entry dequantize(" in text


@pytest.mark.skipif(not has_disassembler(), reason="no cuobjdump: install triton")
def test_instructions() -> None:
    text = sass(DENSE, (8, 0))
    assert "Function : dequantize" in text
    assert "FMUL" in text
    assert "EXIT" in text


@pytest.mark.skipif(not has_disassembler(), reason="no cuobjdump: install triton")
def test_only_the_function_that_is_asked_for() -> None:
    defines = macros(ALONE, torch.float16, torch.float16)
    text = sass(CudaCode("exllama.cu", "join", defines), (8, 0))
    assert "Function : join" in text
    assert "Function : product" not in text


def test_without_a_disassembler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CompileError, match="no cuobjdump: install a CUDA toolkit, or triton"):
        sass(DENSE, (8, 0))
