"""Fused forms on marlin's weights: shapes here (sums: ``test_marlin_on_host.py``), results on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from awqc.kernels.fuse import FuseLinears
from awqc.kernels.marlin_fused import MOST_WEIGHTS
from awqc.kernels.qlinear import dequantize
from awqc.kernels.qlinear_marlin import Marlin

SHARED = torch.ops.awqc.qlinears_marlin.default
GATED = torch.ops.awqc.qlinear_marlin_gated.default
ADD = torch.ops.awqc.qlinear_marlin_add.default
TOKENS = [1, 3, 8, 9, 16, 17, 130]


def test_shapes_are_known_without_running() -> None:
    with FakeTensorMode():
        x, packed = torch.empty(2, 3, 128).half(), torch.empty(2, 1, 4, 1072, dtype=torch.uint8)
        residual = torch.empty(2, 3, 100).half()
        assert GATED(x, packed, packed, 100, 128, False).shape == (2, 3, 100)
        assert ADD(x, packed, None, residual, 100, 128, False).shape == (2, 3, 100)
        found = SHARED(x, [packed, packed], [], [100, 128], 128, False)
        assert [y.shape for y in found] == [(2, 3, 100), (2, 3, 128)]


def weight_of(n: int, k: int, group_size: int, seed: int) -> tuple[Tensor, tuple[int, int, bool], Tensor]:
    """Packed, the op's constants, and dense in float64."""
    generator = torch.Generator("cuda").manual_seed(seed)
    groups = -(-k // (k if group_size == -1 else min(group_size, k)))
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8, device="cuda")
    scales = (torch.rand(n, groups, generator=generator, device="cuda") * 0.02 + 0.01).half()
    zeros = torch.randint(0, 16, (n, groups), generator=generator, dtype=torch.uint8, device="cuda")
    tensors, constants = Marlin.pack(codes, scales, zeros, None, 4, group_size)
    packed = tensors["packed"]
    assert packed is not None
    return packed, constants, dequantize(codes, scales, zeros, group_size, torch.float64)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


#: Of a product, whose result is rounded once, and whose weights are for many tokens.
LIMIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    ("k", "group_size", "sizes"),
    [(4096, 128, (4096, 1024, 1024)), (520, 64, (130, 64, 70, 8)), (96, 32, (64,) * 2)],
)
def test_several_linears(
    k: int, group_size: int, sizes: tuple[int, ...], tokens: int, dtype: torch.dtype
) -> None:
    assert len(sizes) <= MOST_WEIGHTS
    weights = [weight_of(n, k, group_size, n + i) for i, n in enumerate(sizes)]
    x = torch.randn(tokens, k, device="cuda").to(dtype)
    _, group, bf16 = weights[0][1]
    biases = [torch.randn(n, device="cuda").to(dtype) for n in sizes]
    for own in ([], biases):
        found = SHARED(x, [w[0] for w in weights], own, list(sizes), group, bf16)
        again = SHARED(x, [w[0] for w in weights], own, list(sizes), group, bf16)
        for i, (got, (_, _, dense)) in enumerate(zip(found, weights, strict=True)):
            want = x.double() @ dense.t() + (own[i].double() if own else 0)
            assert error(got, want) < LIMIT[dtype], (tokens, i)
            assert torch.equal(got, again[i])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(14336, 4096, 128), (150, 264, 32), (1000, 1000, -1), (40, 128, 64)]
)
def test_a_gate(n: int, k: int, group_size: int, tokens: int, dtype: torch.dtype) -> None:
    gate, (_, group, bf16), dense_gate = weight_of(n, k, group_size, 1)
    up, _, dense_up = weight_of(n, k, group_size, 2)
    x = (torch.randn(tokens, k, device="cuda") / 8).to(dtype)
    got = GATED(x, gate, up, n, group, bf16)
    want = F.silu(x.double() @ dense_gate.t()) * (x.double() @ dense_up.t())
    # For many tokens three results are rounded, not one.
    assert error(got, want) < (3 if tokens > 16 else 1) * LIMIT[dtype]
    assert torch.equal(got, GATED(x, gate, up, n, group, bf16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("n", "k", "group_size"), [(4096, 14336, 128), (8192, 8192, 128), (150, 264, 32)])
def test_a_residual(n: int, k: int, group_size: int, tokens: int, dtype: torch.dtype) -> None:
    packed, (_, group, bf16), dense = weight_of(n, k, group_size, 1)
    x, residual = (
        torch.randn(tokens, k, device="cuda").to(dtype),
        torch.randn(tokens, n, device="cuda").to(dtype),
    )
    bias = torch.randn(n, device="cuda").to(dtype) if n % 4 else None
    got = ADD(x, packed, bias, residual, n, group, bf16)
    want = x.double() @ dense.t() + residual.double() + (0 if bias is None else bias.double())
    assert error(got, want) < (2 if tokens > 16 else 1) * LIMIT[dtype]
    assert torch.equal(got, ADD(x, packed, bias, residual, n, group, bf16))


class Layer(nn.Module):
    """Linears of a decoder layer around an elementwise stand-in for attention."""

    def __init__(self) -> None:
        super().__init__()
        for name, (n, k) in {
            "q": (512, 256),
            "k": (512, 256),
            "o": (256, 512),
            "g": (768, 256),
            "u": (768, 256),
            "d": (256, 768),
        }.items():
            packed, constants, _ = weight_of(n, k, 128, len(name) + n)
            self.register_buffer(name, packed)
            setattr(self, f"{name}_constants", constants)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return Marlin.op(x, getattr(self, name), None, *getattr(self, f"{name}_constants"))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.linear("o", torch.tanh(self.linear("q", x)) * self.linear("k", x))
        h = F.rms_norm(x, x.shape[-1:])
        return x + self.linear("d", F.silu(self.linear("g", h)) * self.linear("u", h))


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
@torch.compiler.config.patch(force_disable_caches=True)  # the pass must be called
def test_a_compiled_layer_is_fused_and_captured(graphs: bool) -> None:
    layer, x = Layer(), torch.randn(1, 1, 256, device="cuda").half() / 8
    fuse = FuseLinears()
    options = {"post_grad_custom_post_pass": fuse, "triton.cudagraphs": graphs}
    compiled = torch.compile(layer, fullgraph=True, options=options)
    for _ in range(3):
        got = compiled(x).clone()
        assert fuse.made == {"gated": 1, "add": 2, "shared": 1}
        # One rounding in the place of up to four, twice in a row.
        assert error(got, layer(x).double()) < 16 * torch.finfo(torch.float16).eps
        x = torch.randn_like(x) / 8
