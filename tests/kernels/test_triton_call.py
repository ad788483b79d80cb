"""Calls of Triton kernels as values, compiled for GPUs that are not here."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from awqc.kernels.hardware import known
from awqc.kernels.jit.gemm_triton import add_shares
from awqc.kernels.machine_code import TritonCode
from awqc.kernels.nvrtc import CompileError
from awqc.kernels.qlinear_triton import TritonGemm, product
from awqc.kernels.triton_call import Call, Target, interpreted
from awqc.kernels.triton_tile import Tile
from awqc.kernels.triton_weight import Weight
from tests.kernels import uninterpreted


def calls(at: Target, m: int = 16) -> list[Call]:
    n, k = 256, 512
    codes = torch.empty(n, k, dtype=torch.uint8, device="meta")
    scales = torch.empty(n, 4, dtype=torch.float16, device="meta")
    tensors, _ = TritonGemm.pack(codes, scales, scales.byte(), None, 4, 128)
    packed, scale, zeros = (tensors[name] for name in ("packed", "scales", "zeros"))
    assert packed is not None
    assert scale is not None
    assert zeros is not None
    x = torch.empty(m, k, dtype=torch.bfloat16, device="meta")
    weight, y = Weight(packed, scale, zeros, n, k, 128), x.new_empty(m, n)
    return product(x, weight, None, y, Tile(16, 32, 2, 3, 1), at)


def test_targets() -> None:
    expected = {"h200": (132, True, True), "a100": (108, True, False)}
    if interpreted():
        expected = dict.fromkeys(expected, (4, False, False))
    for name, (processors, ptx, dependent) in expected.items():
        assert Target.of(known()[name]) == Target(processors, ptx, dependent)


def test_shares_are_joined_by_a_second_call() -> None:
    gemm, join = calls(Target(132, ptx=True, dependent=True))
    assert gemm.grid == (8, 2, 1)
    assert gemm.arguments["num_warps"] == 2
    assert gemm.arguments["launch_pdl"] is True
    described = join.describe()
    assert described.writes == 16 * 256 * 2
    assert described.reads == 2 * 16 * 256 * 4


#: What a launch compiles is asked of a process that does not interpret, as this one may.
COMPILED = """
from tests.kernels.test_triton_call import Target, calls
gemm, join = calls(Target(132, ptx=True, dependent=True))
code = gemm.code()
names = list(code.signature)
assert code.signature["x_ptr"] == "*bf16"
assert code.signature["y_ptr"] == "*fp32"
assert code.signature["group"] == "constexpr"
assert names.index("m") not in code.aligned, "the kernel asks not to be compiled for values of it"
assert names.index("k") in code.aligned
for call, entry in ((gemm, "gemm"), (join, "add_shares")):
    text = call.code().ptx((9, 0))
    assert f".entry {entry}(" in text
    assert ".target sm_90a" in text
assert b"add_shares" in join.code().cubin((9, 0))
"""


def test_a_call_is_compiled_as_its_launch_would() -> None:
    uninterpreted.run("-c", COMPILED)


def test_what_is_interpreted_has_no_machine_code() -> None:
    code = TritonCode(getattr(add_shares, "fn", add_shares), {}, {})
    with pytest.raises(CompileError, match="unset TRITON_INTERPRET"):
        code.ptx((9, 0))
