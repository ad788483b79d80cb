"""The portable kernels run on the CPU: compiled as C++, a fiber for each thread (``host_cuda.h``).

What a GPU adds is speed; indices, padding, the order of sums and the branches that HIP compiles are here.
Tensors end where no access is allowed, so a load or a store past an end stops the test run.
"""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from awqc.kernels.exllama_block import ALONE, Block, macros
from awqc.kernels.exllama_layout import CHANNELS
from awqc.kernels.qlinear_exllama import ExLlama
from awqc.quantized import QuantizedWeight, Scheme, quantize
from tests.kernels.on_host import COMPILER, Memory, compiled

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
#: Calls a kernel with arguments as ctypes passes them.
ENTRY = """
extern "C" void run_product(unsigned gx, unsigned gy, unsigned gz, u16* y, float* partial, const u16* x,
    const u32* words, const void* scales, const u8* zeros, const u16* bias, int m, int n, int k, int stride,
    int chunks, int group_chunks) {
  launch({gx, gy, gz}, THREADS, [=] {
    product(y, partial, x, words, scales, zeros, bias, m, n, k, stride, chunks, group_chunks); });
}
extern "C" void run_join(unsigned gx, u16* y, const float* partial, const u16* bias, int size, int n,
    int shares) {
  launch({gx, 1, 1}, 256, [=] { join(y, partial, bias, size, n, shares); });
}
extern "C" void run_reconstruct(unsigned gx, unsigned gy, u16* weight, const u32* words, const void* scales,
    const u8* zeros, int n, int k, int stride, int group_rows) {
  launch({gx, gy, 1}, 256, [=] { reconstruct(weight, words, scales, zeros, n, k, stride, group_rows); });
}
"""


def library(**defines: int) -> ctypes.CDLL:
    return compiled("exllama.cu", ENTRY, "float", **defines)


def weight_of(n: int, k: int, group_size: int, zero_point: bool = True) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(n + k)
    return quantize(torch.randn(n, k, generator=generator), Scheme(4, group_size, zero_point))


def multiply_on_host(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    block: Block,
    processors: int,
    limit: int,
    skip: int = 0,
) -> Tensor:
    """As :func:`awqc.kernels.qlinear_exllama.multiply`, which launches the same on a device.

    Args:
        skip: numbers that lie before ``x``, at an address of a multiple of 16.
    """
    tensors, (n, group_size) = ExLlama.pack(
        weight.codes, weight.scales, weight.zeros, bias, 4, weight.scheme.group_size
    )
    kernels = library(**macros(block, x.dtype, weight.scales.dtype, dependent=True))
    words, scales, zeros = (tensors[name] for name in ("words", "scales", "zeros"))
    assert words is not None
    (m, k), stride = x.shape, words.shape[1]
    chunks = words.shape[0] * 8 // CHANNELS
    group = k if group_size == -1 else min(group_size, k)
    rounded = block.tokens * math.ceil(m / block.tokens)
    shares = block.shares(rounded, n, chunks, processors, limit)
    assert block.shared_bytes(chunks, shares) <= min(limit, 4 << 16)
    nan = torch.tensor(float("nan"), dtype=x.dtype)
    y = Memory(kernels, nan.expand(m, n))
    partial = Memory(kernels, nan.float().expand(shares, m, n))
    behind = torch.cat((x.new_zeros(skip), x.flatten()))
    operands = [Memory(kernels, t) for t in (behind, words, scales, zeros, bias)]
    pointers = [o.pointer for o in operands]
    pointers[0] = ctypes.c_void_p(pointers[0].value + skip * x.itemsize)
    grid = (math.ceil(n / (32 * block.columns)), shares, rounded // block.tokens)
    sizes = (m, n, k, stride, chunks, math.ceil(group / CHANNELS))
    kernels.run_product(*grid, y.pointer, partial.pointer, *pointers, *sizes)
    if shares > 1:
        blocks = math.ceil(m * n / 256)
        kernels.run_join(blocks, y.pointer, partial.pointer, operands[-1].pointer, m * n, n, shares)
    return y.read()


def in_integers(x: Tensor) -> Tensor:
    """The activations ``(M, K)`` float64 that the kernel multiplies: of every 32 channels of a token,
    integers up to 2**13 in steps of the power of two that the largest needs."""
    k = x.shape[1]
    chunks = F.pad(x.double(), (0, -k % CHANNELS)).unflatten(1, (-1, CHANNELS))
    # A float64 is mantissa * 2**exponent with a mantissa in [0.5, 1): 2**13 stands for the power.
    exponent = torch.frexp(chunks.abs().amax(2, keepdim=True)).exponent.clamp(min=-112)
    step = torch.exp2(exponent.double() - 13)
    return (torch.round(chunks / step) * step).flatten(1)[:, :k]


def assert_close(got: Tensor, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
    """Exact sums of 32 products of integers and codes, added in float32, and one rounding of the result."""
    k, taken = x.shape[1], in_integers(x)
    want = taken @ weight.dequantize(torch.float64).t() + (0 if bias is None else bias.double())
    rounding = torch.finfo(x.dtype).eps / 2 * want.abs()
    energy = taken.norm(dim=1, keepdim=True) * weight.scales.double().amax() * 30
    assert ((got.double() - want).abs() <= 1.01 * rounding + 6 * k**0.5 * 2.0**-24 * energy).all()


@pytest.mark.parametrize(
    "block",
    [Block(1, 4, 8, 4), Block(2, 2, 4, 2), Block(4, 1, 12, 2), Block(8, 8, 4, 2)],
    ids=str,
)
@pytest.mark.parametrize(
    ("n", "k", "group_size", "tokens"),
    [(130, 608, 128, 1), (300, 96, 32, 5), (64, 1000, -1, 3), (513, 700, 64, 9), (1, 1, -1, 2)],
)
@pytest.mark.parametrize("processors", [1, 40])
def test_the_product_agrees_with_float64(
    block: Block, n: int, k: int, group_size: int, tokens: int, processors: int
) -> None:
    weight = weight_of(n, k, group_size)
    generator = torch.Generator().manual_seed(k)
    bias = torch.randn(n, generator=generator).half() if n % 2 else None
    x = (torch.randn(tokens, k, generator=generator) + 1).half()
    got = multiply_on_host(x, weight, bias, block, processors, 64 << 10)
    assert_close(got, x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_of_activations_and_scales(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    weight = weight_of(70, 168, 64, zero_point=False)
    scales = weight.scales.to(scale_dtype)
    weight = QuantizedWeight(weight.codes, scales, weight.zeros, weight.scheme)
    x = torch.randn(3, 168, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = weight.dequantize(torch.float64)
    got = multiply_on_host(x, weight, None, Block(4, 4, 4, 2), 8, 64 << 10)
    assert_close(got, x, weight)
    kernels = library(**macros(ALONE, dtype, scale_dtype))
    tensors, _ = ExLlama.pack(weight.codes, weight.scales, weight.zeros, None, 4, 64)
    out = Memory(kernels, torch.tensor(float("nan"), dtype=dtype).expand(168, 70))
    operands = [Memory(kernels, tensors[name]) for name in ("words", "scales", "zeros")]
    stride = operands[0].tensor.shape[1] if operands[0].tensor is not None else 0
    kernels.run_reconstruct(
        1, 168 // 8, out.pointer, *(o.pointer for o in operands), 70, 168, stride, 64 // 8
    )
    # The difference of codes is exact, and so is its product with a scale of at most 24 bits: rounded twice.
    assert torch.equal(out.read(), exact.float().t().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("unlike", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_in_its_row(dtype: torch.dtype, unlike: float) -> None:
    weight = weight_of(32, 64, 32)
    x = torch.ones(2, 64).to(dtype)
    x[0, 3] = unlike
    got = multiply_on_host(x, weight, None, Block(2, 4, 4, 2), 1, 64 << 10)
    assert got[0].isnan().all()
    assert got[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("largest", [2.0**-110, 2.0**-24, 1.0, 2000.0, 65504.0, 2.0**100])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_do_not_overflow(dtype: torch.dtype, largest: float, sign: int) -> None:
    value = torch.tensor(sign * largest).to(dtype)
    if not 0 < value.abs() < torch.inf:
        pytest.skip(f"{dtype} has no {largest}")
    x = value.expand(1, 96)
    codes, zeros = torch.full((5, 96), 15, dtype=torch.uint8), torch.zeros(5, 3, dtype=torch.uint8)
    scales = torch.full((5, 3), 2.0**-12 if largest > 1 else 1.0)  # results that float16 has
    weight = QuantizedWeight(codes, scales, zeros, Scheme(4, 32))
    got = multiply_on_host(x, weight, None, Block(1, 1, 4, 1), 1, 64 << 10)
    assert_close(got, x, weight)
    assert (got * sign > 0).all()


def hard(kind: str, k: int) -> Tensor:
    """Activations ``(4, k)`` as language models have them: some channels are far larger than others."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, k, generator=generator)
    if kind == "mean":
        x += 1
    if kind == "outliers":
        x[:, ::500] *= 100
    if kind == "massive":
        x[:, k // 3] = 1500.0
    if kind == "wide":
        x *= torch.exp2(6 * torch.randn(4, k, generator=generator)).clamp(max=2.0**7)
    return x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["normal", "mean", "outliers", "massive", "wide"])
def test_integers_cost_less_than_the_bar_of_errors_leaves(kind: str, dtype: torch.dtype) -> None:
    weight, x = weight_of(64, 2048, 128), hard(kind, 2048).to(dtype)
    want = x.double() @ weight.dequantize(torch.float64).t()
    got = multiply_on_host(x, weight, None, Block(4, 2, 4, 2), 4, 64 << 10)
    assert_close(got, x, weight)
    errors = (got.double() - want).norm(dim=1) / want.norm(dim=1)
    # Half a step of each integer, at random in it, over one activation that is all there is of its chunk.
    worst = (CHANNELS / 3) ** 0.5 * 2.0**-13
    assert (errors <= worst + torch.finfo(dtype).eps / 2).all()
    assert (errors <= {torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]).all()


def test_activations_at_any_address() -> None:
    weight, x = weight_of(40, 128, 32), torch.randn(3, 128).half()
    block = Block(2, 1, 4, 2)
    aligned = multiply_on_host(x, weight, None, block, 2, 64 << 10)
    assert torch.equal(multiply_on_host(x, weight, None, block, 2, 64 << 10, skip=1), aligned)


def test_weights_of_odd_width_are_written_out_whole() -> None:
    weight = weight_of(33, 61, -1)
    kernels = library(**macros(ALONE, torch.float16, weight.scales.dtype))
    tensors, _ = ExLlama.pack(weight.codes, weight.scales, weight.zeros, None, 4, -1)
    out = Memory(kernels, torch.tensor(float("nan")).half().expand(61, 33))
    operands = [Memory(kernels, tensors[name]) for name in ("words", "scales", "zeros")]
    stride = tensors["scales"].shape[1] if tensors["scales"] is not None else 0
    kernels.run_reconstruct(1, 8, out.pointer, *(o.pointer for o in operands), 33, 61, stride, 8)
    assert torch.equal(out.read(), weight.dequantize(torch.float32).t().half())
