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
    lambda h: h * (h > 0),
    lambda h: torch.where(h.amax(1, keepdim=True) > 0, h, 0.0),
    lambda h: torch.where(h < 0.5, h, h * 2),
    lambda h: h.cumsum(1),
    lambda h: h.cumsum(-1),
    lambda h: F.pad(h, (0, 0, 1, 0))[:, :3],
    lambda h: F.pad(h, (2, 0))[..., :WIDTH],
    lambda h: h.sort(dim=1)[0],
    lambda h: h.topk(2, dim=1)[0].sum(1, keepdim=True).expand_as(h),
    lambda h: h.max(dim=-1, keepdim=True)[0].expand_as(h),
    lambda h: h.gather(1, h.sum((0, 2)).argsort()[None, :, None].expand_as(h)),
    lambda h: h.gather(1, torch.tensor([2, 0, 1])[None, :, None].expand_as(h)),
    lambda h: torch.zeros_like(h).index_add(1, torch.tensor([0, 0, 2]), h),
    lambda h: h.index_add(1, torch.tensor([1]), h[:, :1]),
    lambda h: h.index_select(1, torch.tensor([1, 1, 0])),
    lambda h: h.scatter(1, torch.zeros_like(h, dtype=torch.long), h),
    lambda h: F.glu(torch.cat([h, h], dim=-1)),
    lambda h: F.avg_pool1d(h, 3, 1, 1),
    lambda h: F.max_pool1d(h.mT, 3, 1, 1).mT,
    lambda h: h / (1 + h.norm(dim=1, keepdim=True)),
    lambda h: h / (h.abs().sum(1, keepdim=True)).clamp(min=1e-3),
    lambda h: torch.lerp(h, h.flip(1), 0.3),
    lambda h: h.sign() * h.abs().sqrt(),
]
SEVERAL: list[tuple[int, Callable[..., Tensor]]] = [
    (2, torch.add),
    (2, torch.sub),
    (2, torch.mul),
    (2, lambda g, u: F.silu(g) * u),
    (2, lambda g, u: torch.cat([g, u], dim=-1)[..., ::2]),
    (2, lambda a, v: torch.softmax(a @ a.transpose(-1, -2), dim=-1) @ v),
    (2, lambda a, b: torch.stack([a, b]).sum(0)),
    (2, lambda a, b: torch.einsum("bsd,btd->bst", a, b)[..., :1] * b),
    (2, lambda a, b: torch.einsum("bsd,bte->bde", a, b).mean(1, keepdim=True).expand_as(b)),
    (2, torch.maximum),
    (2, lambda a, b: torch.where(a > 0, b, a)),
    (2, lambda a, b: torch.where(a > b, b, a)),
    (2, lambda a, b: a.scatter_add(1, torch.ones_like(a, dtype=torch.long), b)),
    (2, lambda a, b: torch.baddbmm(a, a.bmm(b.mT).tanh(), b)),
    (3, torch.addcmul),
    (3, _attend),
]


EXPERTS = 3


def _experts(
    draw: random.Random, h: Tensor, router: nn.Linear, up: Tensor, bias: Tensor, down: Tensor
) -> Tensor:
    """A mixture of experts over the tokens of ``h``, in one of several ways of writing it."""
    flat, grouped = h.flatten(0, 1), torch.ops.awqc.grouped_linear
    experts, order = router(flat)[:, :EXPERTS].topk(2)[1].flatten().sort()
    offsets = torch.histc(experts.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
    between = draw.choice([torch.relu, F.silu, lambda t: t[:, [1, 0, 2, 3, 4, 5, 7, 6]], lambda t: t.flip(0)])
    kind = draw.randrange(4)
    if kind == 0:
        y = grouped(flat[order // 2], up, offsets)
        y = grouped(between(y + bias[experts] if draw.randrange(2) else y), down, offsets)
        y = torch.zeros_like(flat).index_add(0, order // 2, y)
    elif kind == 1:
        y = torch.bmm(flat.expand(EXPERTS, -1, -1), up.mT) + bias[:, None]
        y = torch.bmm(torch.relu(y), down.mT).sum(0)
    elif kind == 2:
        first = experts[: len(flat)]
        y = torch.einsum("sk,snk->sn", flat, up[first]) + bias[first]
        y = torch.einsum("sk,snk->sn", between(y), down[first])
    else:
        y = F.linear(torch.relu(F.linear(flat, up[1], bias[1])), down[1])
    return y.view(h.shape)


class Program(nn.Module):
    """A few steps over tensors of width 8; weights, gains, biases and norms are drawn from a small pool, so
    that many are shared."""

    def __init__(self, seed: int, steps: int = 9) -> None:
        super().__init__()
        self.seed, self.steps = seed, steps
        self.linears = nn.ModuleList([linear(bias=i % 2 == 0) for i in range(5)])
        self.norms = nn.ModuleList([norm(), nn.LayerNorm(WIDTH, bias=False)])
        self.vectors = nn.ParameterList([torch.ones(WIDTH) for _ in range(3)])
        self.kernels = nn.ParameterList([torch.ones(WIDTH, size, 3) for size in (1, 2, WIDTH)])
        self.stacks = nn.ParameterList([torch.ones(EXPERTS, WIDTH, WIDTH) for _ in range(2)])
        self.bias = nn.Parameter(torch.ones(EXPERTS, WIDTH))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) * WIDTH**-0.5 + (parameter.ndim == 1)
                )

    def forward(self, x: Tensor) -> Tensor:
        draw, known = random.Random(self.seed), [x]

        def pick() -> Tensor:
            return known[max(0, len(known) - draw.choice([1, 1, 1, 2, 3]))]

        for _ in range(self.steps):
            kind = draw.randrange(10)
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
            elif kind == 6:
                kernel = self.kernels[draw.randrange(3)]
                bias = draw.choice([None, *self.vectors])
                h = F.conv1d(pick().mT, kernel, bias, padding=1, groups=WIDTH // kernel.shape[1]).mT
            elif kind == 7:
                up, down = draw.sample(list(self.stacks), 2)
                h = _experts(draw, pick(), self.linears[draw.randrange(5)], up, self.bias, down)
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
    monkeypatch.setitem(rules._RULES, torch.ops.aten.silu.default, lambda op: op.value(op.args[0]))
    errors = (fold_error(program, awqc.analyze(program, inputs())) for program in map(Program, range(40)))
    assert any(error > 1e-3 for error in errors)
