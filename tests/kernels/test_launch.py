"""Descriptions of launches, from shapes alone."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from awqc.kernels import llvm, registry
from awqc.kernels.hardware import Hardware, assumed, hardware, known
from awqc.kernels.launch import Launch, launches, nbytes
from awqc.kernels.qlinear_llvm import dot_rows
from awqc.quantized import Scheme, quantize

CPU = torch.device("cpu")
NAMES = [(op, name) for op in ("qlinear", "qexperts") for name in registry.kernels(op)]
CPU_KERNELS = {name for _, name in NAMES if name.startswith(("Aten", "Llvm"))}
GPU_KERNELS = [name for name in registry.kernels("qlinear") if name not in CPU_KERNELS]


def described(kernel: Any, at: Hardware, m: int, n: int, k: int, group: int = 128) -> list[Launch]:
    """What a call on ``m`` tokens of float16 launches."""
    codes = torch.empty(n, k, dtype=torch.uint8, device="meta")
    scales = torch.empty(n, -(-k // group), dtype=torch.float16, device="meta")
    tensors, constants = kernel.pack(codes, scales, scales.byte(), None, 4, group)
    x = torch.empty(m, k, dtype=torch.float16, device="meta")
    return launches(kernel.op, at, [x, *tensors.values(), *constants], x.new_empty(m, n))


@pytest.mark.parametrize(("op", "name"), NAMES)
def test_every_kernel_describes_itself(op: str, name: str) -> None:
    """Otherwise an op is one routine of its own name, which tells nobody anything."""
    kernel = registry.kernels(op)[name]
    codes = torch.zeros(64, 256, dtype=torch.uint8)
    scales = torch.ones(64, 2, dtype=torch.float16)
    parts = [codes, scales, scales.byte()]
    leading: list[Any] = [torch.zeros(2, 256, dtype=torch.float16)]
    if op == "qexperts":
        parts = [torch.stack([part, part]) for part in parts]
        leading.append(torch.tensor([1, 2]))
    tensors, constants = kernel.pack(*parts, None, 4, 128)
    at = hardware(CPU) if name in CPU_KERNELS else known()["h200"]
    found = launches(kernel.op, at, [*leading, *tensors.values(), *constants], torch.zeros(2, 64))
    assert not any(launch.kernel == str(kernel.op).removesuffix(".default") for launch in found)


@pytest.mark.parametrize(("name", "key"), product(GPU_KERNELS, ["h200", "a100", "rtx_4090"]))
def test_what_a_gpu_would_launch(name: str, key: str) -> None:
    kernel, at = registry.kernels("qlinear")[name], known()[key]
    n, k = 2048, 4096
    with assumed(at):
        reason = kernel.legal(n, k, 4, 128, torch.float16, torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    for m in (1, 3, 16, 17, 64, 200, 1024, 5000):
        found = described(kernel, at, m, n, k)
        # Codes and activations are read, the result is written, whatever else is done.
        assert sum(launch.reads for launch in found) >= n * k // 2 + 2 * m * k
        assert found[-1].writes >= 2 * m * n  # and sums that blocks leave for others
        for launch in found:
            assert launch.shared <= at.shared_bytes
            assert math.prod(launch.block) <= 1024
            assert launch.grid or launch.code is None
    # The weight written out, and the product; on Hopper it is dequantized in front of the tensor cores.
    assert len(described(kernel, at, 5000, n, k)) == (1 if name == "Marlin" and at.has_bulk_copies else 2)


def test_few_tokens_move_little_more_than_the_packed_weight() -> None:
    marlin, at = registry.kernels("qlinear")["Marlin"], known()["h200"]
    (launch,) = described(marlin, at, 1, 4096, 4096)
    assert launch.kernel == "marlin_small.cu:small"
    # 4 bits of code and, for each 128, 3 bytes of scale and zero point; the activations and the result.
    assert launch.bytes == 4096 * 4096 // 2 + 4096 * 32 * 3 + 2 * 2 * 4096
    assert launch.grid == (128, 1)


def test_the_cpu_reads_codes_for_few_tokens_and_its_copy_for_many() -> None:
    aten = registry.kernels("qlinear")["AtenInt4"]
    (few,), (many,) = (described(aten, hardware(CPU), m, 256, 512) for m in (8, 9))
    assert few.kernel == "aten._weight_int4pack_mm_for_cpu"
    assert few.reads == 256 * 512 // 2 + 256 * 4 * 2 * 2 + 8 * 512 * 2
    assert many.reads == 256 * 512 * 2 + 9 * 512 * 2


@pytest.mark.skipif(llvm.missing() is not None, reason=f"awqc's own CPU kernel {llvm.missing()}")
def test_awqcs_own_kernel_reads_codes_scales_and_zero_points_once() -> None:
    own = registry.kernels("qlinear")["LlvmInt4"]
    (few,), (many,) = (described(own, hardware(CPU), m, 256, 512) for m in (dot_rows(), dot_rows() + 1))
    assert few.kernel == "dot_products.py:linear"
    assert few.reads == 256 * 512 // 2 + 256 * 4 * (2 + 1) + dot_rows() * 512 * 2
    assert many.reads == 256 * 512 * 2 + (dot_rows() + 1) * 512 * 2


def test_experts_that_have_no_rows_are_not_read() -> None:
    weight = quantize(torch.randn(64, 128), Scheme(4, 64))
    parts = [torch.stack([part] * 8) for part in (weight.codes, weight.scales, weight.zeros)]
    op = torch.ops.awqc.qexperts.default

    def reads(rows: int) -> int:
        x = torch.zeros(rows, 128)
        found = launches(op, hardware(CPU), [x, torch.zeros(8), *parts, 64], x.new_zeros(rows, 64))
        return sum(launch.reads for launch in found if launch.kernel == "dequantize")

    assert (reads(1), reads(2), reads(20)) == (nbytes(*parts) // 8, nbytes(*parts) // 4, nbytes(*parts))


def test_an_op_that_nothing_is_known_of() -> None:
    x, y = torch.zeros(4, 8), torch.zeros(8, 2)
    (launch,) = launches(torch.ops.aten.mm.default, hardware(CPU), [x, y], torch.zeros(4, 2))
    assert launch == Launch("aten.mm", (32 + 16) * 4, 8 * 4)


def test_bytes_of_a_tensor_count_once() -> None:
    x: Tensor = torch.zeros(3, dtype=torch.float16)
    assert nbytes(x, [x, torch.zeros(2)], None, 4) == 6 + 8


@pytest.mark.parametrize("name", GPU_KERNELS)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (14336, 4096), (1024, 4096)])
def test_the_choice_is_stable_between_neighbouring_numbers_of_tokens(name: str, n: int, k: int) -> None:
    """Kernels and how they cut the work change where a tile is full, not with every token."""
    kernel, at = registry.kernels("qlinear")[name], known()["h200"]
    with assumed(at):
        if reason := kernel.legal(n, k, 4, 128, torch.float16, torch.device("cuda")):
            pytest.skip(reason)
    chosen = [
        [(launch.kernel, dict(launch.config)) for launch in described(kernel, at, m, n, k)]
        for m in range(1, 260)
    ]
    changes = {m + 2 for m, (one, other) in enumerate(pairwise(chosen)) if one != other}
    assert changes <= {2, 3, 5, *range(9, 260, 8)}
    assert len(changes) <= 8
