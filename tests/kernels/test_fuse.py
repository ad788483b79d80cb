"""Fusing linears of a compiled model: what becomes what, what stays, and that the function does.

marlin's ops run on GPUs alone; here they have implementations by dequantizing, so that the whole way through
the compiler is tried.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from awqc.kernels import marlin_layout as layout
from awqc.kernels.fuse import FuseLinears
from awqc.kernels.qlinear import dequantize

QLINEAR = torch.ops.awqc.qlinear_marlin
GROUP = 64


def dense(packed: Tensor, n: int, k: int) -> Tensor:
    codes, scales, zeros = layout.unpack(packed, n, k, GROUP, torch.float16)
    return dequantize(codes, scales, zeros, GROUP)


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    library = torch.library.Library("awqc", "IMPL")

    def one(x: Tensor, packed: Tensor, bias: Tensor | None, n: int, group: int, bf16: bool) -> Tensor:
        y = x.float() @ dense(packed, n, x.shape[-1]).t()
        return (y if bias is None else y + bias.float()).to(x.dtype)

    def several(
        x: Tensor, packed: list[Tensor], bias: list[Tensor], n: list[int], *rest: object
    ) -> list[Tensor]:
        biases = bias or [None] * len(packed)
        return [one(x, p, b, m, GROUP, False) for p, b, m in zip(packed, biases, n, strict=True)]

    def gated(x: Tensor, gate: Tensor, up: Tensor, n: int, *rest: object) -> Tensor:
        first, second = (x.float() @ dense(w, n, x.shape[-1]).t() for w in (gate, up))
        return (F.silu(first) * second).to(x.dtype)

    def add(
        x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor, n: int, *rest: object
    ) -> Tensor:
        return (one(x.float(), packed, bias, n, GROUP, False) + residual.float()).to(x.dtype)

    library.impl("qlinear_marlin", one, "CPU")
    library.impl("qlinears_marlin", several, "CPU")
    library.impl("qlinear_marlin_gated", gated, "CPU")
    library.impl("qlinear_marlin_add", add, "CPU")
    # A graph that is found on disk has been through the pass already, which then is not called.
    with torch.compiler.config.patch(force_disable_caches=True):
        yield
    library._destroy()
    torch._dynamo.reset()


class Linear(torch.nn.Module):
    def __init__(self, k: int, n: int, bias: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(n + k + bias)
        codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        scales = (torch.rand(n, -(-k // GROUP), generator=generator) * 0.02 + 0.01).half()
        zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
        self.register_buffer("packed", layout.pack(codes, scales, zeros, GROUP))
        self.register_buffer("bias", torch.randn(n, generator=generator).half() if bias else None)
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        return QLINEAR(x, self.packed, self.bias, self.n, GROUP, False)


def compiled(model: torch.nn.Module, x: Tensor) -> tuple[Tensor, dict[str, int]]:
    fuse = FuseLinears()
    got = torch.compile(model, fullgraph=True, options={"post_grad_custom_post_pass": fuse})(x)
    return got, fuse.made


class Block(torch.nn.Module):
    """A decoder layer without attention's product."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = Linear(64, 128, bias), Linear(64, 32, bias), Linear(64, 128, bias)
        self.o = Linear(128, 64, bias)
        self.gate, self.up, self.down = Linear(64, 192), Linear(64, 192), Linear(192, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = F.rms_norm(x, (64,))
        mixed = self.q(h) * self.k(h).mean(-1, keepdim=True) + torch.tanh(self.v(h))
        x = x + self.o(mixed)
        h = F.rms_norm(x, (64,))
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_decoder_layer(bias: bool, dtype: torch.dtype) -> None:
    block, x = Block(bias), torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    got, made = compiled(block, x)
    assert made == {"gated": 1, "add": 2, "shared": 1}
    want = block(x)
    # One rounding in the place of up to four.
    assert (got - want).norm() <= 8 * torch.finfo(dtype).eps * want.norm()


def run(function: Callable[..., Tensor], *linears: Linear) -> dict[str, int]:
    """What is fused in ``function(x, *linears)``, which must stay the same."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = torch.nn.ModuleList(linears)

        def forward(self, x: Tensor) -> Tensor:
            return function(x, *self.linears)

    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).half()
    got, made = compiled(Model(), x)
    want = function(x, *linears)
    assert (got - want).norm() <= 8 * torch.finfo(torch.float16).eps * want.norm()
    return made


def test_what_others_read_is_not_taken_away() -> None:
    first, second = Linear(64, 64), Linear(64, 64, True)

    def gate_is_read(x: Tensor, gate: Linear, up: Linear) -> Tensor:
        g = gate(x)
        return F.silu(g) * up(x.sin()) + g

    def sum_is_read(x: Tensor, a: Linear, b: Linear) -> Tensor:
        y = a(x)
        return (x + y) * y.cos()

    assert run(gate_is_read, first, second) == {"gated": 0, "add": 0, "shared": 0}
    assert run(sum_is_read, first, second) == {"gated": 0, "add": 0, "shared": 0}


def test_a_gate_with_a_bias_or_another_input_stays() -> None:
    plain, biased = Linear(64, 64), Linear(64, 64, True)
    assert run(lambda x, g, u: F.silu(g(x)) * u(x), biased, plain)["gated"] == 0
    assert run(lambda x, g, u: F.silu(g(x)) * u(x.sin()), plain, Linear(64, 64))["gated"] == 0
    assert run(lambda x, g, u: F.silu(g(x)) * u(x), plain, Linear(64, 64))["gated"] == 1
    assert run(lambda x, g, u: u(x) * F.silu(g(x)), plain, Linear(64, 64))["gated"] == 1


def test_only_a_residual_of_the_results_shape_is_added() -> None:
    linear = Linear(64, 64)
    assert run(lambda x, a: a(x) + x[0], linear)["add"] == 0
    assert run(lambda x, a: torch.add(a(x), x, alpha=2), linear)["add"] == 0
    assert run(lambda x, a: x + a(x), linear)["add"] == 1


def test_biases_are_all_or_none_and_weights_four_at_most() -> None:
    def together(x: Tensor, *linears: Linear) -> Tensor:
        return torch.cat([linear(x) for linear in linears], -1)

    assert run(together, Linear(64, 64), Linear(64, 32, True))["shared"] == 0
    assert run(together, *(Linear(64, 16 * n) for n in range(1, 6)))["shared"] == 1
    assert run(together, *(Linear(64, 16 * n, True) for n in range(1, 7)))["shared"] == 2


def test_options_that_were_copied_are_the_same() -> None:
    """transformers copies them at every generation, and compiles again if they differ."""
    options = {"post_grad_custom_post_pass": FuseLinears()}
    assert copy.deepcopy(options) == options
