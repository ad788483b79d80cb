"""Schemes, grids and the canonical quantized weight, against the formula of their module."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from awqc.errors import ConfigError
from awqc.quantized import (
    SMALLEST_SCALE,
    QuantizedWeight,
    Scheme,
    expand_groups,
    grid_from_range,
    minmax_grid,
    quantize,
    split_groups,
)

schemes = st.builds(Scheme, st.integers(2, 8), st.sampled_from([-1, 1, 3, 16, 32, 64, 1000]), st.booleans())


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    rows, width, seed = draw(st.integers(1, 5)), draw(st.integers(1, 70)), draw(st.integers(0, 2**16))
    size = draw(st.sampled_from([1e-3, 1.0, 100.0]))
    offset = draw(st.sampled_from([0.0, 1.0, -5.0]))
    return size * (torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) + offset)


@settings(deadline=None, max_examples=60)
@given(weights(), schemes)
def test_codes_scales_and_zeros_mean_what_the_formula_says(weight: Tensor, scheme: Scheme) -> None:
    found = quantize(weight, scheme)
    n, k = weight.shape
    size = k if scheme.group_size == -1 else scheme.group_size
    groups = math.ceil(k / size)
    assert found.codes.shape == (n, k)
    assert found.scales.shape == found.zeros.shape == (n, groups)
    assert (found.codes.dtype, found.scales.dtype, found.zeros.dtype) == (
        torch.uint8,
        torch.float16,
        torch.uint8,
    )
    assert int(found.codes.max()) < 2**scheme.bits
    assert int(found.zeros.max()) < 2**scheme.bits
    if not scheme.zero_point:
        assert (found.zeros == 2 ** (scheme.bits - 1)).all()
    dense = found.dequantize()
    for row in range(n):
        for column in range(k):
            g = column // size
            want = (int(found.codes[row, column]) - int(found.zeros[row, g])) * float(found.scales[row, g])
            assert dense[row, column] == torch.tensor(want)


@settings(deadline=None, max_examples=60)
@given(weights(), schemes)
def test_no_weight_is_further_than_it_may_be(weight: Tensor, scheme: Scheme) -> None:
    """Half a step of the ideal scale; its rounding to half precision (2**-11 of it, or 2**-25 where it is
    subnormal) stretches the grid over its levels, and the zero point's rounding shifts it by half a step."""
    found = quantize(weight, scheme)
    size = scheme.group(weight.shape[1])
    step = expand_groups(found.scales.float(), size, weight.shape[1])
    shift = 0.5 if scheme.zero_point else 0.0
    rounding = (step * 2.0**-11).clamp(min=2.0**-25)
    bound = (0.5 + shift) * step + 2**scheme.bits * rounding
    assert ((found.dequantize() - weight).abs() <= bound).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zero_point", [True, False])
def test_values_on_a_grid_come_back(bits: int, zero_point: bool) -> None:
    scheme = Scheme(bits, -1, zero_point)
    codes = torch.arange(scheme.levels, dtype=torch.uint8)[None]
    scales, zeros = torch.full((1, 1), 0.25).half(), torch.full((1, 1), scheme.levels // 2, dtype=torch.uint8)
    weight = QuantizedWeight(codes, scales, zeros, scheme)
    grid = grid_from_range(torch.tensor([[0.0]]), torch.tensor([[1.0]]), scheme, codes.shape[1])
    grid = type(grid)(scales.float(), zeros.float(), scheme, codes.shape[1])
    assert torch.equal(grid.encode(weight.dequantize()), codes.float())


def test_zero_is_always_representable() -> None:
    """Padding, pruned weights and dead channels stay exactly zero."""
    for scheme in (Scheme(4, 8), Scheme(4, 8, False)):
        weight = torch.cat([torch.zeros(1, 4), torch.full((1, 4), 3.0)], dim=1)
        assert torch.equal(quantize(weight, scheme).dequantize()[0, :4], torch.zeros(4))
        assert torch.equal(quantize(torch.zeros(3, 16), scheme).dequantize(), torch.zeros(3, 16))


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("value", [1e-9, 1e-6, 7e4, 1e6])
def test_scales_stay_within_half_precision(value: float, zero_point: bool) -> None:
    found = quantize(torch.tensor([[value, -value]]), Scheme(4, -1, zero_point))
    scale = float(found.scales)
    assert math.isfinite(scale)
    assert SMALLEST_SCALE <= scale <= 65504


def test_a_symmetric_grid_treats_both_signs_alike() -> None:
    weight = torch.tensor([[-1.0, 1.0, 0.3, -0.3]])
    error = (quantize(weight, Scheme(3, -1, False)).dequantize() - weight).abs()
    scale = float(quantize(weight, Scheme(3, -1, False)).scales)
    # The largest magnitude lies half a step outside on one side, and half a step inside on the other; the
    # scale's rounding moves the ends by 2**-11 of the 4 steps to either.
    assert error.max() <= (0.5 + 4 * 2**-11) * scale


def test_groups_do_not_see_each_other() -> None:
    weight = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    whole = quantize(weight, Scheme(4, 20)).dequantize()
    pieces = [quantize(piece, Scheme(4, -1)).dequantize() for piece in weight.split(20, dim=1)]
    assert torch.equal(whole, torch.cat(pieces, dim=1))


def test_padding_of_a_ragged_group_changes_neither_end() -> None:
    weight = torch.tensor([[1.0, 2.0, -3.0, 4.0, 9.0]])
    assert split_groups(weight, 3).tolist() == [[[1.0, 2.0, -3.0], [4.0, 9.0, 9.0]]]


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_a_width_that_does_not_exist(bits: int) -> None:
    with pytest.raises(ConfigError) as caught:
        Scheme(bits)
    assert str(caught.value) == f"bits={bits}: awqc quantizes to 2, 3, 4, 5, 6, 7 or 8 bits"


@pytest.mark.parametrize("size", [0, -2])
def test_a_group_size_that_does_not_exist(size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        Scheme(4, size)
    assert str(caught.value) == (
        f"group_size={size}: give a positive number of input channels, or -1 for whole rows"
    )


@pytest.mark.parametrize("name", ["scales", "zeros"])
def test_scales_that_do_not_fit_the_codes(name: str) -> None:
    parts = {"scales": torch.ones(4, 2).half(), "zeros": torch.zeros(4, 2, dtype=torch.uint8)}
    parts[name] = parts[name][:, :1]
    with pytest.raises(ConfigError) as caught:
        QuantizedWeight(torch.zeros(4, 32, dtype=torch.uint8), **parts, scheme=Scheme(4, 16))
    assert str(caught.value) == (
        f"{name} of shape (4, 1) do not fit codes of shape (4, 32) with group_size=16: expected (4, 2)"
    )


def test_schemes_read_well() -> None:
    assert str(Scheme()) == "W4 g128 asym"
    assert str(Scheme(3, -1, False)) == "W3 row sym"


def test_the_grid_s_scales_are_what_is_stored() -> None:
    """What is searched is what is stored: rounding the scales comes first, everything else follows."""
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    grid = minmax_grid(weight, Scheme(4, 16))
    assert torch.equal(grid.scales, grid.scales.half().float())
    assert torch.equal(grid.nearest(weight), quantize(weight, Scheme(4, 16)).dequantize())
