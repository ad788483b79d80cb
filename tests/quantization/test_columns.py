"""Blocks of columns rounded by the kernel, interpreted where there is no GPU, against the plain loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awqc.quantization import columns, rounding
from awqc.quantization.columns import (
    KERNEL_BLOCK,
    ColumnGrid,
    Columns,
    has_kernel,
    round_block,
    round_block_by_kernel,
)
from awqc.quantization.rounding import compensated_codes, feedback, visiting_order
from awqc.quantized import Scheme, minmax_grid

GPU = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(GPU, reason="interpreted where there is no GPU")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]),
]
pytest.importorskip("triton")


def problem(
    shape: tuple[int, ...], scheme: Scheme, device: str, scaled: bool = False
) -> tuple[Tensor, Tensor, ColumnGrid, Tensor]:
    """A weight ``(N, K)`` or ``(E, N, K)``, the order of its columns, its grid and their feedback."""
    generator = torch.Generator().manual_seed(0)
    *_, n, k = shape
    weight = torch.randn(shape, generator=generator)
    inputs = torch.randn(*shape[:-2], 2 * k, k, generator=generator) * torch.logspace(-1, 1, k)
    mixed = inputs + inputs.mean(-1, keepdim=True)
    weight, mixed = weight.to(device), mixed.to(device)
    spread = torch.rand(k, generator=generator).add(0.5).to(device).expand(n, k) if scaled else None
    found = []
    for one, x in zip(weight.view(-1, n, k), mixed.view(-1, 2 * k, k), strict=True):
        gram = x.T @ x
        order = visiting_order(gram)
        found.append((order, ColumnGrid.of(minmax_grid(one, scheme), order, spread), feedback(gram, order)))
    orders, grids, factors = zip(*found, strict=True)
    if len(shape) == 2:
        return weight, orders[0], grids[0], factors[0]
    return weight, torch.stack(orders), ColumnGrid.stack(grids), torch.stack(factors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("shape", "scheme", "scaled"),
    [
        ((32, 128), Scheme(4, 32), False),
        ((37, 150), Scheme(3, 50), False),  # neither rows nor columns fill the last of what is cut
        ((5, 70), Scheme(8, -1, zero_point=False), False),
        ((33, 96), Scheme(2, 20), True),
        ((3, 20, 45), Scheme(4, 16), False),
    ],
)
def test_the_kernel_does_what_the_loop_does(
    shape: tuple[int, ...], scheme: Scheme, scaled: bool, device: str
) -> None:
    arguments = problem(shape, scheme, device, scaled)
    loop, kernel = Columns.of(*arguments), Columns.of(*arguments)
    for start in range(0, shape[-1], KERNEL_BLOCK):
        end = min(start + KERNEL_BLOCK, shape[-1])
        round_block(loop, start, end)
        round_block_by_kernel(kernel, start, end)
    assert torch.equal(kernel.codes, loop.codes)
    assert len(kernel.codes.unique()) > 2
    # Interpreted, no product is fused with its sum, as on some CPUs; a sum has fewer terms than a block.
    apart = 0 if device == "cuda" else KERNEL_BLOCK * torch.finfo(torch.float32).eps
    assert (kernel.wanted - loop.wanted).abs().max() <= apart * loop.wanted.abs().max()


@pytest.mark.parametrize("device", DEVICES)
def test_ties_go_to_the_even(device: str) -> None:
    """As in torch, and beyond the codes to the first or the last of them."""
    steps = torch.tensor([-1e9, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 1e9], device=device)
    weight = (0.25 * steps)[:, None].repeat(1, 3)
    order = torch.arange(3, device=device)
    scales, zeros = torch.full((1, 8), 0.25, device=device), torch.full((1, 8), 4.0, device=device)
    grid = ColumnGrid(scales, zeros, torch.zeros_like(order), 16)
    rounded = Columns.of(weight, order, grid, torch.zeros(3, 3, device=device))
    round_block_by_kernel(rounded, 0, 3)
    assert rounded.codes.tolist() == [[0, 2, 2, 4, 4, 6, 6, 15]] * 3
    expected = Columns.of(weight, order, grid, torch.zeros(3, 3, device=device))
    round_block(expected, 0, 3)
    assert torch.equal(rounded.codes, expected.codes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(6, 160), (2, 5, 160)])
def test_blocks_of_the_kernel_make_the_same_codes(
    shape: tuple[int, ...], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a weight that lies in another; and of several with feedback of their own."""
    weight, order, grid, factor = problem(shape, Scheme(4, 32), device)
    wider = torch.zeros(*shape[:-1], shape[-1] + 8, device=device)
    wider[..., : shape[-1]] = weight
    monkeypatch.setattr(rounding, "BLOCK", KERNEL_BLOCK)
    monkeypatch.setattr(rounding, "has_kernel", lambda weight: False)
    expected = compensated_codes(weight, grid, factor, order)
    monkeypatch.setattr(rounding, "has_kernel", lambda weight: True)
    assert torch.equal(compensated_codes(wider[..., : shape[-1]], grid, factor, order), expected)


def test_the_loop_is_for_where_the_kernel_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_kernel(torch.zeros(2, 2))
    on_device = torch.zeros(2, 2, dtype=torch.float32)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert has_kernel(on_device)
    assert not has_kernel(on_device.double())
    monkeypatch.setattr(columns.importlib.util, "find_spec", lambda name: None)
    assert not has_kernel(on_device)
