"""The grouped linear of experts: what it computes, whatever the dtype."""

from __future__ import annotations

import pytest
import torch

from awqc.grouped import grouped_linear, split_rows

OFFSETS = torch.tensor([2, 2, 7], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_row_meets_the_weight_of_its_expert(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 4, generator=generator).to(dtype)
    weight = torch.randn(3, 5, 4, generator=generator).to(dtype)
    found = grouped_linear(x, weight, OFFSETS)
    expert = [0, 0, 2, 2, 2, 2, 2]
    expected = torch.einsum("sk,snk->sn", x.double(), weight[expert].double())
    # A product of 4 terms, and rounding to the dtype.
    bound = (
        8
        * torch.finfo(dtype).eps
        * torch.einsum("sk,snk->sn", x.double().abs(), weight[expert].double().abs())
    )
    assert found.dtype == dtype
    assert ((found.double() - expected).abs() <= bound).all()


def test_rows_of_no_expert_are_zero() -> None:
    found = grouped_linear(torch.ones(9, 4), torch.ones(3, 5, 4), OFFSETS)
    assert found[:7].eq(4).all()
    assert found[7:].eq(0).all()


def test_rows_are_split_into_views() -> None:
    x = torch.arange(18.0).reshape(9, 2)
    pieces = split_rows(x, OFFSETS)
    assert [len(piece) for piece in pieces] == [2, 0, 5]
    assert pieces[2].data_ptr() == x[2].data_ptr()


def test_the_op_is_traced_by_shape() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch.library.opcheck(
        torch.ops.awqc.grouped_linear.default,
        (torch.randn(7, 4), torch.randn(3, 5, 4), OFFSETS),
        test_utils=("test_schema", "test_faketensor"),
    )
    with FakeTensorMode():
        fake = grouped = torch.ops.awqc.grouped_linear(
            torch.empty(7, 4), torch.empty(3, 5, 4), torch.empty(3, dtype=torch.int32)
        )
    assert grouped.shape == fake.shape == (7, 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("transposed", [False, True])
def test_one_launch_computes_what_single_products_do(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 64, generator=generator).bfloat16()
    weight = torch.randn(5, 64, 32, generator=generator).mT if transposed else torch.randn(5, 32, 64)
    weight, offsets = weight.bfloat16(), torch.tensor([10, 10, 47, 90, 93], dtype=torch.int32)
    found = grouped_linear(x.cuda(), weight.cuda(), offsets.cuda()).cpu()
    expected = grouped_linear(x.double(), weight.double(), offsets)
    size = grouped_linear(x.double().abs(), weight.double().abs(), offsets)
    assert (
        (found.double() - expected).abs()
        <= 64 * torch.finfo(torch.float32).eps * size + 2**-8 * expected.abs()
    ).all()
    assert found[93:].eq(0).all()
