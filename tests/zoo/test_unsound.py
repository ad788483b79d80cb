"""Blocks in which a fold would change what the model computes are refused, with the op that forbids it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import awqc
from tests.zoo.build import randomize
from tests.zoo.inputs import noise

WIDTH = 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)


class NormReadByNonlinearity(Block):
    """The norm's output goes through a tanh as well, which no column of a weight could undo."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.second(torch.relu(self.first(h))) * torch.tanh(h)


class ResidualReader(Block):
    """``first`` reads the residual itself, and so does everything after it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.second(torch.relu(self.norm(x)))
        return x + self.first(x)


class BranchOnValues(Block):
    """Which linear runs depends on the values of the norm."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        chosen = self.first if h.sum() > 0 else self.second
        return x + chosen(h)


def reasons(module: nn.Module) -> dict[str, str]:
    """Why linears have no group, by their names, with the groups of the others proven."""
    module, batch = randomize(module.eval()), {"x": noise(1, 4, WIDTH)}
    found = awqc.analyze(module, batch)
    assert found.prove(batch) < 1e-9
    return {name: reason for name, reason in found.linears.items() if isinstance(reason, str)}


def test_a_norm_that_a_nonlinearity_reads() -> None:
    assert reasons(NormReadByNonlinearity()) == {
        "first.weight": "aten.tanh (tanh): no scale passes through aten.tanh"
    }


def test_a_linear_that_reads_the_residual() -> None:
    found = reasons(ResidualReader())
    assert set(found) == {"first.weight"}
    assert found["first.weight"].startswith("aten.add (add"), found


def test_a_branch_on_values() -> None:
    """No graph says what the block computes: it is called as it is, and nothing in it is scaled."""
    assert reasons(BranchOnValues()) == {
        "first.weight": "BranchOnValues (branch_on_values): no scale passes through BranchOnValues"
    }
