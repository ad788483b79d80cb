"""The streaming kernel's path for compute capability 8.x runs on the CPU: every tiling's indices and sums.

Its instructions are replaced by what they do (``host_ptx.h``); Hopper's copies and clusters are not here.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from awqc.kernels import marlin_layout as layout
from awqc.kernels import marlin_stream
from awqc.kernels.aligned import aligned
from awqc.kernels.marlin_stream import Problem, Tiling
from awqc.kernels.qlinear import dequantize
from tests.kernels.on_host import COMPILER, Memory, compiled

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
ENTRY = """
extern "C" void run_small(unsigned gx, unsigned gy, const u16* x, const Weights* weights,
    int tokens, int strips, int k_blocks, int k) {
  const Weights own = *weights;
  launch({gx, gy, 1}, WARPS * 32, [=] { small(x, own, tokens, strips, k_blocks, k); });
}
"""
#: Packed weight, bias, residual, rows.
Operand = tuple[Tensor, "Tensor | None", "Tensor | None", int]


def multiply_on_host(
    x: Tensor, weights: list[Operand], group: int, tiling: Tiling, *, gated: bool = False
) -> list[Tensor]:
    """As ``marlin_stream._launch`` does on a device without bulk copies."""
    problem = Problem(
        weights[0][0].shape[0] if gated else sum(packed.shape[0] for packed, *_ in weights),
        weights[0][0].shape[1],
        min(x.shape[0], 16),
        group,
        x.dtype,
        False,
        weights=len(weights),
        gated=gated,
    )
    kernels = compiled("marlin_small.cu", ENTRY, "unsigned char", **problem.macros(tiling, hopper=False))
    assert tiling.shared_bytes(problem.tokens, group) <= 1 << 18
    x = aligned(x)
    tokens, k = x.shape
    nan = torch.tensor(float("nan"), dtype=x.dtype)
    outs = [Memory(kernels, nan.expand(tokens, n)) for *_, n in weights[: 1 if gated else None]]
    record, first, kept = b"", 0, [Memory(kernels, x)]
    for i, (packed, bias, residual, n) in enumerate(weights):
        own = [Memory(kernels, tensor) for tensor in (packed, bias, residual)]
        kept += own
        pointers = [memory.pointer.value or 0 for memory in (*own, outs[min(i, len(outs) - 1)])]
        record += marlin_stream._WEIGHT.pack(*pointers, first, n)
        first += 0 if gated else packed.shape[0] * layout.STRIPS
    kernels.run_small(
        problem.blocks(tiling),
        -(-tokens // 16),
        kept[0].pointer,
        ctypes.create_string_buffer(record),
        *(ctypes.c_int(size) for size in (tokens, problem.rows * layout.STRIPS, problem.columns, k)),
    )
    return [out.read() for out in outs]


def weight_of(n: int, k: int, group_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Packed, and dense in float64."""
    generator = torch.Generator().manual_seed(seed)
    channels = k if group_size == -1 else group_size
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(n, -(-k // channels), generator=generator) * 0.02 + 0.01).half()
    zeros = torch.randint(0, 16, scales.shape, generator=generator, dtype=torch.uint8)
    packed = layout.pack(codes, scales, zeros, group_size)
    return packed, dequantize(codes, scales, zeros, group_size, torch.float64)


def assert_close(got: Tensor, want: Tensor, x: Tensor) -> None:
    """Exact products of activations and 16 + code, summed in float32, and one rounding of the result."""
    energy = x.double().norm(dim=1, keepdim=True) * 0.03 * 31
    rounding = 1.01 * torch.finfo(got.dtype).eps / 2 * want.abs()
    assert ((got.double() - want).abs() <= rounding + 6 * x.shape[1] ** 0.5 * 2.0**-24 * energy).all()


@pytest.mark.parametrize(
    ("n", "k", "group_size", "tokens", "tiling"),
    [
        (64, 256, 128, 1, Tiling(4, 1, 1, 2)),
        (200, 392, 32, 5, Tiling(4, 3, 2, 1)),
        (130, 512, 64, 8, Tiling(2, 2, 3, 2)),
        (70, 1000, -1, 9, Tiling(4, 2, 1, 2)),
        (200, 392, 32, 16, Tiling(4, 3, 1, 2)),
        (64, 256, 64, 23, Tiling(2, 2, 1, 1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_product_agrees_with_float64(
    n: int, k: int, group_size: int, tokens: int, tiling: Tiling, dtype: torch.dtype
) -> None:
    group = layout.kernel_group(group_size, k)
    assert group is not None
    packed, dense = weight_of(n, k, group_size, n + k)
    generator = torch.Generator().manual_seed(n)
    bias = torch.randn(n, generator=generator).to(dtype) if n % 20 == 0 else None
    x = (torch.randn(tokens, k, generator=generator) + 0.5).to(dtype)
    (got,) = multiply_on_host(x, [(packed, bias, None, n)], group, tiling)
    assert_close(got, x.double() @ dense.t() + (0 if bias is None else bias.double()), x)


@pytest.mark.parametrize("tokens", [1, 9])
def test_several_weights_at_once(tokens: int) -> None:
    """Rows that are no multiple of 64, with a bias or without; blocks that have strips of two weights."""
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(0)).half()
    sizes = (130, 64, 70)
    weights = [weight_of(n, 256, 64, n) for n in sizes]
    biases = [None, torch.randn(64, generator=torch.Generator().manual_seed(1)).half(), None]
    operands = [(p, b, None, n) for (p, _), b, n in zip(weights, biases, sizes, strict=True)]
    found = multiply_on_host(x, operands, 64, Tiling(2, 3, 2, 2))
    for got, (_, dense), bias in zip(found, weights, biases, strict=True):
        assert_close(got, x.double() @ dense.t() + (0 if bias is None else bias.double()), x)


def test_a_residual_is_added_before_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    x, (packed, dense) = torch.randn(3, 256, generator=generator).half(), weight_of(100, 256, 128, 1)
    bias, residual = (
        torch.randn(100, generator=generator).half(),
        torch.randn(3, 100, generator=generator).half(),
    )
    (got,) = multiply_on_host(x, [(packed, bias, residual, 100)], 128, Tiling(2, 2, 1, 2))
    assert_close(got, x.double() @ dense.t() + bias.double() + residual.double(), x)


@pytest.mark.parametrize("tiling", [Tiling(2, 2, 1, 2), Tiling(2, 6, 2, 1), Tiling(4, 8, 1, 2)], ids=str)
@pytest.mark.parametrize("tokens", [1, 11, 18])
def test_a_gate_in_the_epilogue(tiling: Tiling, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 256, generator=generator).half() / 4
    (gate, dense_gate), (up, dense_up) = (weight_of(150, 256, 64, seed) for seed in (1, 2))
    (got,) = multiply_on_host(x, [(gate, None, None, 150), (up, None, None, 150)], 64, tiling, gated=True)
    first, second = x.double() @ dense_gate.t(), x.double() @ dense_up.t()
    want = torch.nn.functional.silu(first) * second
    # SiLU's slope is below 1.1: errors of both sums, and of the exponential, which is good to 2**-21.
    sums = 6 * 256**0.5 * 2.0**-24 * x.double().norm(dim=1, keepdim=True) * 0.03 * 31
    bound = (
        sums * (1.1 * second.abs() + first.abs())
        + (2.0**-20 * first.abs().clamp(min=1) + 2.0**-11) * want.abs()
    )
    # Below the normal range of float16 rounding is absolute.
    assert ((got.double() - want).abs() <= 1.01 * bound + 2.0**-25).all()
