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
