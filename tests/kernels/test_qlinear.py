"""``awqc::qlinear``: the reference against float64 arithmetic spelled out, and its manners as an op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awqc.kernels.qlinear import dequantize
from awqc.quantized import Scheme, quantize

QLINEAR = torch.ops.awqc.qlinear.default


def arguments(
    n: int, k: int, group_size: int, *, bias: bool = True, bits: int = 4
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
    generator = torch.Generator().manual_seed(n * k + group_size)
    weight = quantize(torch.randn(n, k, generator=generator), Scheme(bits, group_size))
    vector = torch.randn(n, generator=generator) if bias else None
    return weight.codes, weight.scales, weight.zeros, vector, group_size


def spelled_out(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """The weight in float64, one column at a time."""
    k = codes.shape[1]
    columns = []
    for column in range(k):
        group = 0 if group_size == -1 else column // group_size
        columns.append((codes[:, column].double() - zeros[:, group].double()) * scales[:, group].double())
    return torch.stack(columns, 1)


@pytest.mark.parametrize("group_size", [-1, 16, 32, 50, 128])
def test_dequantize_is_exact_in_float32(group_size: int) -> None:
    # 8-bit differences times 11-bit scales need 19 of float32's 24 bits.
    codes, scales, zeros, _, _ = arguments(6, 96, group_size, bits=8)
    weight = dequantize(codes, scales, zeros, group_size)
    assert torch.equal(weight.double(), spelled_out(codes, scales, zeros, group_size))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_float32_arithmetic_with_one_rounding_to_the_dtype_of_x(dtype: torch.dtype, bias: bool) -> None:
    n, k, group_size = 24, 80, 32
    args = arguments(n, k, group_size, bias=bias)
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = QLINEAR(x, *args)
    assert got.dtype == dtype
    weight = spelled_out(*args[:3], group_size)
    want = x.double() @ weight.t() + (args[3].double() if bias else 0)
    magnitude = x.double().abs() @ weight.t().abs() + 1
    arithmetic = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    bound = (k + 1) * arithmetic * magnitude + torch.finfo(dtype).eps / 2 * want.abs()
    assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(96,), (1, 96), (0, 96), (2, 0, 96), (2, 3, 96)])
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    args = arguments(8, 96, 32)
    x = torch.randn(shape)
    got = QLINEAR(x, *args)
    assert got.shape == (*shape[:-1], 8)
    torch.testing.assert_close(got.view(-1, 8), QLINEAR(x.view(-1, 96), *args))


def test_strided_input() -> None:
    args = arguments(8, 96, 32)
    x = torch.randn(96, 5).t()
    torch.testing.assert_close(QLINEAR(x, *args), QLINEAR(x.contiguous(), *args))


def test_arguments_are_left_alone() -> None:
    args = arguments(8, 96, 32)
    x = torch.randn(2, 96)
    before = [t.clone() for t in (x, *args[:4])]
    QLINEAR(x, *args)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *args[:4]), strict=True))


@pytest.mark.parametrize("group_size", [-1, 32, 50])
def test_opcheck(group_size: int) -> None:
    torch.library.opcheck(QLINEAR, (torch.randn(2, 3, 96), *arguments(8, 96, group_size)))


def test_meta_tensors_give_the_shape() -> None:
    codes, scales, zeros, bias, group_size = (
        t.to("meta") if isinstance(t, Tensor) else t for t in arguments(8, 96, 32)
    )
    x = torch.empty(4, 7, 96, dtype=torch.bfloat16, device="meta")
    out = QLINEAR(x, codes, scales, zeros, bias, group_size)
    assert (out.shape, out.dtype, out.device.type) == ((4, 7, 8), torch.bfloat16, "meta")


def test_compiles_without_a_graph_break() -> None:
    args = arguments(8, 96, 32)

    def block(x: Tensor) -> Tensor:
        return torch.relu(QLINEAR(x, *args)) + 1

    x = torch.randn(2, 96)
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))
