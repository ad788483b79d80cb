"""Sums over the tokens of an activation."""

from __future__ import annotations

import pytest
import torch

from awqc.observers.input_statistics import InputStatistics, gram_block


@pytest.mark.parametrize("width", [7, 256, 300, 2304, 4096])
def test_gram_matrices_are_whole_however_they_are_cut(width: int) -> None:
    x = torch.randn(16, width, generator=torch.Generator().manual_seed(0))
    statistics = InputStatistics.empty(width, torch.device("cpu"))
    statistics.add(x[:12], held_out=False)
    statistics.add(x[12:], held_out=True)
    statistics.finish()
    bound = 16 * torch.finfo(torch.float32).eps
    for found, rows in ((statistics.gram, x[:12].double()), (statistics.held_out, x[12:].double())):
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, found.T)
        assert float((found - rows.T @ rows).norm() / (rows.T @ rows).norm()) < bound
    assert torch.allclose(statistics.mean_abs, x[:12].abs().mean(0))


def test_wide_matrices_are_cut_into_few_blocks() -> None:
    assert [gram_block(width) for width in (1, 256, 2048, 2049, 4096, 14336)] == [
        256,
        256,
        256,
        512,
        512,
        1792,
    ]
