"""Tiles, shares and their ordered sum: the parts of the Triton product that a linear's result hides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from awqc.kernels.jit.gemm_triton import add_shares
from awqc.kernels.qlinear_triton import TritonGemm, multiply
from awqc.kernels.triton_tile import Tile
from awqc.kernels.triton_weight import Weight
from awqc.quantized import QuantizedWeight, Scheme, quantize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def packed(n: int, k: int, group_size: int) -> tuple[QuantizedWeight, Weight]:
    weight = quantize(
        torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)), Scheme(4, group_size)
    )
    tensors, _ = TritonGemm.pack(
        weight.codes.to(DEVICE), weight.scales.to(DEVICE), weight.zeros.to(DEVICE), None, 4, group_size
    )
    operands: dict[str, Tensor] = {name: t for name, t in tensors.items() if t is not None}
    return weight, Weight(**operands, n=n, k=k, group_size=group_size)


@pytest.mark.parametrize(
    ("tokens", "rows", "blocks", "processors", "shares"),
    [
        # 128 tiles on 132 processors that hold 8 each.
        (8, 4096, 16, 132, 8),
        (8, 14336, 16, 132, 2),
        (8, 8192, 112, 132, 4),
        # Never more than blocks, nor fewer than one.
        (8, 32, 3, 132, 3),
        (8, 128256, 16, 132, 1),
        (64, 4096, 16, 132, 1),
    ],
)
def test_shares_fill_the_device_once(
    tokens: int, rows: int, blocks: int, processors: int, shares: int
) -> None:
    tile = Tile(block_m=8, block_n=32, warps=2, stages=3, programs=8)
    assert tile.shares(-(-tokens // 8), rows, blocks, processors) == shares


@pytest.mark.parametrize("programs", [1, 2, 8])
@pytest.mark.parametrize("block_n", [16, 64])
@pytest.mark.parametrize(("n", "k", "group_size"), [(130, 640, 128), (48, 384, 32), (128, 1024, -1)])
def test_every_tile_and_every_number_of_shares(
    programs: int, block_n: int, n: int, k: int, group_size: int
) -> None:
    weight, operands = packed(n, k, group_size)
    x = torch.randn(11, k, generator=torch.Generator().manual_seed(0)).half()
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1)).half()
    tile = Tile(block_m=8, block_n=block_n, warps=2, stages=2, programs=programs)
    got = multiply(x.to(DEVICE), operands, bias.to(DEVICE), tile).cpu().double()
    want = x.double() @ weight.dequantize(torch.float64).t() + bias.double()
    # float32 sums of exact products, rounded once; six of their standard deviations.
    rounding = torch.finfo(torch.float16).eps / 2 * want.abs()
    sums = 6 * k**0.5 * torch.finfo(torch.float32).eps / 2
    energy = (x.double().square() @ weight.dequantize(torch.float64).square().t()).sqrt()
    assert ((got - want).abs() <= 1.01 * rounding + sums * energy).all()


def test_shares_are_added_first_to_last() -> None:
    # In any other order the small terms survive.
    partial = torch.tensor([2.0**24, 1.0, 1.0, -(2.0**24)]).view(4, 1, 1).expand(4, 3, 5).contiguous()
    y = torch.empty(3, 5, dtype=torch.float16, device=DEVICE)
    add_shares[(1,)](partial.to(DEVICE), y, y, y.numel(), 5, 4, block=256, has_bias=False, dependent=False)
    assert not y.any()


@pytest.mark.gpu
def test_the_same_input_gives_the_same_bits() -> None:
    _, operands = packed(4096, 4096, 128)
    x = torch.randn(16, 4096, device=DEVICE).half()
    tile = Tile(block_m=16, block_n=32, warps=2, stages=3, programs=8)
    first = multiply(x, operands, None, tile)
    assert all(torch.equal(multiply(x, operands, None, tile), first) for _ in range(50))
