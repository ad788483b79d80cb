"""Clipped grids: the best of the ladder for every group, by the exact loss of that group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awqc.quantization.clipping import SHRINKS, clipped_grid
from awqc.quantization.loss import gram_blocks, group_losses, output_loss
from awqc.quantized import Scheme, grid_from_range, minmax_grid, split_groups


def problem(width: int, rows: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight with heavy tails and a Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator) ** 3
    x = torch.randn(3 * width, width, generator=generator)
    return weight, x.T @ x


@pytest.mark.parametrize(
    "scheme", [Scheme(3, 16), Scheme(4, 16, False), Scheme(3, -1), Scheme(2, 20)], ids=str
)
def test_every_group_takes_the_best_of_the_ladder(scheme: Scheme) -> None:
    """Against a plain loop over rows and groups, ragged last group (48 = 20 + 20 + 8) included."""
    width = 48
    weight, gram = problem(width)
    size = scheme.group(width)
    _, share = clipped_grid(weight, scheme, gram_blocks(gram, size))
    for row in range(len(weight)):
        for group in range(scheme.groups(width)):
            columns = slice(group * size, min((group + 1) * size, width))
            w, h = weight[row : row + 1, columns], gram[columns, columns].double()
            losses = []
            for shrink in SHRINKS:
                low, high = w.amin(1, keepdim=True) * shrink, w.amax(1, keepdim=True) * shrink
                error = grid_from_range(low, high, Scheme(scheme.bits, -1, scheme.zero_point), w.shape[1])
                e = (error.nearest(w) - w).double()[0]
                losses.append(float(e @ h @ e))
            chosen = SHRINKS.index(round(float(share[row, group]), 4))
            # Equal up to the float32 sums of the implementation.
            assert losses[chosen] <= min(losses) * (1 + 64 * size * torch.finfo(torch.float32).eps)


def test_without_a_ladder_it_is_the_min_max_grid() -> None:
    weight, gram = problem(32)
    grid, share = clipped_grid(weight, Scheme(4, 16), gram_blocks(gram, 16), shrinks=(1.0,))
    want = minmax_grid(weight, Scheme(4, 16))
    assert torch.equal(grid.scales, want.scales)
    assert torch.equal(grid.zeros, want.zeros)
    assert torch.equal(share, torch.ones(6, 2))


def test_tails_are_cut_and_a_flat_weight_is_not() -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    _, gram = problem(128)
    _, share = clipped_grid(weight, Scheme(2, 64), gram_blocks(gram, 64))
    assert (share < 1).float().mean() > 0.5
    levels = torch.tensor([-0.5, 0.0, 0.5, 1.0]).repeat(2, 32)  # exactly the values of a 2-bit group
    _, share = clipped_grid(levels, Scheme(2, 64), gram_blocks(gram, 64))
    assert torch.equal(share, torch.ones(2, 2))


def test_input_scales_are_undone_in_the_loss() -> None:
    """Clipping ``W diag(s)`` for the unscaled input is clipping it for the scaled Gram matrix."""
    weight, gram = problem(32)
    scales = torch.exp2(torch.arange(32) % 4 - 1.5)
    scheme = Scheme(3, 16)
    columns = scales.expand_as(weight)
    one, share = clipped_grid(weight * scales, scheme, gram_blocks(gram, 16), columns=columns)
    moved = gram / scales / scales[:, None]
    other, same = clipped_grid(weight * scales, scheme, gram_blocks(moved, 16))
    assert torch.equal(share, same)
    assert torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("size", [16, -1])  # a ragged last group, and whole rows
def test_rounding_in_groups_is_what_codes_stand_for(size: int) -> None:
    weight, _ = problem(40)
    grid = minmax_grid(weight, Scheme(4, size))
    assert torch.equal(grid.nearest(weight), grid.decode(grid.encode(weight)))


def test_a_candidate_without_a_loss_is_not_chosen() -> None:
    weight, gram = problem(16)
    blocks = gram_blocks(gram, 16)
    blocks[..., 0, 0] = torch.nan
    grid, share = clipped_grid(weight, Scheme(4, 16), blocks)
    assert torch.equal(grid.scales, minmax_grid(weight, Scheme(4, 16)).scales)
    assert bool((share == 1).all())


def test_losses_of_groups_add_up_when_groups_do_not_interact() -> None:
    weight, gram = problem(48)
    blocks = gram_blocks(gram, 16)
    alone = torch.block_diag(*blocks)
    by_group = group_losses(split_groups(weight, 16), blocks).double().sum()
    whole = output_loss(weight.double(), alone.double())
    assert abs(by_group - whole) <= 48 * torch.finfo(torch.float32).eps * whole


def test_a_ragged_last_block_is_padded_with_zeros() -> None:
    _, gram = problem(20)
    blocks = gram_blocks(gram, 16)
    assert blocks.shape == (2, 16, 16)
    assert torch.equal(blocks[1, :4, :4], gram[16:, 16:])
    assert blocks[1].count_nonzero() == 16
