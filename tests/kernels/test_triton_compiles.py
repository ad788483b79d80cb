"""Every Triton kernel becomes machine code for GPUs of both vendors, on a machine without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels import uninterpreted


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_it_compiles_to_what_it_is_meant_to_be(target: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("compile_triton.py")
    found = json.loads(uninterpreted.run(str(script), target, cache=tmp_path).splitlines()[-1])
    assert len(found) == 9
    assert found["round_columns"]["quotients"] > 0
    assert all(kernel["code"] for kernel in found.values())
    for name, kernel in found.items():
        if name.startswith(("gemm", "experts")):
            # Matrix instructions; on NVIDIA's GPUs loads of later tiles in flight meanwhile.
            assert kernel["products"] > 0, name
            assert kernel["copies"] > 0 or target.startswith("hip"), name
