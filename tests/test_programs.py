"""Programs drawn at random: whatever the scale flow finds in them must fold."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import awqc
from awqc import rules
from tests.nets import WIDTH, fold_error, inputs, linear, norm


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = [t.unflatten(-1, (2, 4)).transpose(-3, -2) for t in (q, k, v)]
    return F.scaled_dot_product_attention(*heads).transpose(-3, -2).flatten(-2)


def _swap_halves(h: Tensor) -> Tensor:
    left, right = h.chunk(2, dim=-1)
    return torch.cat([-right, left], dim=-1)


#: Functions of one, two or three tensors (..., WIDTH); most let scales pass, some stop them.
ONE: list[Callable[[Tensor], Tensor]] = [
    torch.relu,
    torch.neg,
    torch.abs,
    F.silu,
    torch.tanh,
    _swap_halves,
    lambda h: h.clone().relu_(),
    lambda h: h * 0.5,
    lambda h: h + 0.25,
    lambda h: h.square() * 0.1,
    lambda h: h.flip(-1),
    lambda h: h.roll(2, -1),
    lambda h: h.clamp(min=0),
    lambda h: h[..., [3, 1, 4, 1, 5, 0, 2, 6]],
    lambda h: h.view(2, 3, 2, 4).transpose(-1, -2).reshape(2, 3, WIDTH),
    lambda h: h[..., :4].repeat(1, 1, 2),
    lambda h: h.unflatten(-1, (4, 2))[..., :1].expand(2, 3, 4, 2).flatten(-2),
    lambda h: h.mean(1, keepdim=True).expand(2, 3, WIDTH),
    lambda h: h.masked_fill(torch.ones(3, 1, dtype=torch.bool).tril(-1).bool(), 0.0),
    lambda h: torch.cat([h[..., :4], h[..., 4:].tanh()], dim=-1),
]
SEVERAL: list[tuple[int, Callable[..., Tensor]]] = [
    (2, torch.add),
    (2, torch.sub),
    (2, torch.mul),
    (2, lambda g, u: F.silu(g) * u),
    (2, lambda g, u: torch.cat([g, u], dim=-1)[..., ::2]),
    (2, lambda a, v: torch.softmax(a @ a.transpose(-1, -2), dim=-1) @ v),
    (2, lambda a, b: torch.stack([a, b]).sum(0)),
    (3, _attend),
]


class Program(nn.Module):
    """A few steps over tensors of width 8; weights, gains, biases and norms are drawn from a small pool, so
    that many are shared."""

    def __init__(self, seed: int, steps: int = 9) -> None:
        super().__init__()
        self.seed, self.steps = seed, steps
        self.linears = nn.ModuleList([linear(bias=i % 2 == 0) for i in range(5)])
        self.norms = nn.ModuleList([norm(), nn.LayerNorm(WIDTH, bias=False)])
        self.vectors = nn.ParameterList([torch.ones(WIDTH) for _ in range(3)])
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) * WIDTH**-0.5 + (parameter.ndim == 1)
                )

    def forward(self, x: Tensor) -> Tensor:
        draw, known = random.Random(self.seed), [x]

        def pick() -> Tensor:
            return known[max(0, len(known) - 1 - draw.randrange(3))]

        for _ in range(self.steps):
            kind = draw.randrange(8)
            if kind < 3:
                h = self.linears[draw.randrange(5)](pick())
            elif kind == 3:
                h = self.norms[draw.randrange(2)](pick())
            elif kind == 4:
                vector = self.vectors[draw.randrange(3)]
                h = pick() * vector if draw.randrange(2) else pick() + vector
            elif kind == 5:
                count, function = SEVERAL[draw.randrange(len(SEVERAL))]
                h = function(*(pick() for _ in range(count)))
            else:
                h = ONE[draw.randrange(len(ONE))](pick())
            known.append(h)
        return self.linears[draw.randrange(5)](known[-1])


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_found_in_a_random_program_folds(seed: int) -> None:
    program = Program(seed)
    assert fold_error(program, awqc.analyze(program, inputs())) < 1e-9


def test_random_programs_do_have_groups() -> None:
    found = sum(len(awqc.analyze(Program(seed), inputs()).groups) > 0 for seed in range(10))
    assert found >= 3


def test_the_programs_notice_a_wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules._RULES, torch.ops.aten.tanh.default, lambda op: op.value(op.args[0]))
    errors = (fold_error(program, awqc.analyze(program, inputs())) for program in map(Program, range(40)))
    assert any(error > 1e-3 for error in errors)
