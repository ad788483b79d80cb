"""The marlin kernels on a GPU: random shapes, determinism, capture, compilation.

``AWQC_SHAPES`` sets how many random shapes are tried (default 100).
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from awqc.kernels import marlin_stream
from awqc.kernels.hardware import assumed, hardware
from awqc.kernels.qlinear import dequantize
from awqc.kernels.qlinear_marlin import Marlin

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = int(os.environ.get("AWQC_SHAPES", "100"))
#: Relative error of a product: the result is rounded once, and for many tokens the weights are too. Rounding
#: to nearest is off by a third of the unit in the root mean square; both together by less than the unit.
LIMIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def problem(
    n: int, k: int, group_size: int, zero_point: bool, tokens: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, tuple[object, ...]]:
    """Input, float32 result, and the op's other operands."""
    torch.manual_seed(seed)
    groups = -(-k // (k if group_size == -1 else min(group_size, k)))
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(n, groups, device="cuda") * 0.02 + 0.01).half()
    zeros = torch.full((n, groups), 8, dtype=torch.uint8, device="cuda")
    if zero_point:
        zeros = torch.randint_like(zeros, 0, 16)
    bias = torch.randn(n, device="cuda").to(dtype) if seed % 2 else None
    x = torch.randn(tokens, k, device="cuda").to(dtype)
    expected = x.double() @ dequantize(codes, scales, zeros, group_size).double().t()
    if bias is not None:
        expected += bias.double()
    tensors, constants = Marlin.pack(codes, scales, zeros, bias, 4, group_size)
    return x, expected, (*tensors.values(), *constants)


def assert_close(found: Tensor, expected: Tensor, case: object) -> None:
    error = (found.double() - expected).norm() / expected.norm()
    assert error < LIMIT[found.dtype], f"{case}: relative error {error:.2e}"


@contextmanager
def capability(major: int, minor: int) -> Iterator[None]:
    """Kernels are chosen as for a device of this compute capability."""
    caches = (marlin_stream.has_bulk_copies, marlin_stream.stream)
    at = replace(hardware(torch.device("cuda", 0)), capability=(major, minor))
    for cache in caches:
        cache.cache_clear()
    with assumed(at):
        yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("major", [9, 8])
def test_random_shapes(major: int) -> None:
    if torch.cuda.get_device_capability()[0] < major:
        pytest.skip(f"needs compute capability {major}.0")
    with capability(major, 0):
        launched = marlin_stream.stream(
            marlin_stream.Problem(1, 1, 1, 128, torch.float16, False), torch.device("cuda", 0)
        )
        assert launched.hopper is (major == 9)
        _try_random_shapes()


def _try_random_shapes() -> None:
    draw = random.Random(0)
    for seed in range(SHAPES):
        case = (
            draw.choice([draw.randint(1, 300), draw.randint(1, 3000)]),
            draw.choice([draw.randint(1, 600), 8 * draw.randint(1, 300)]),
            draw.choice([-1, 32, 64, 128, 256]),
            draw.random() < 0.5,
            draw.choice([1, 2, 3, 5, 8, 9, 16, 17, 31, 64, 65, 130, 300, 1100]),
            draw.choice([torch.float16, torch.bfloat16]),
            seed,
        )
        x, expected, operands = problem(*case)
        found = Marlin.op(x, *operands)
        assert_close(found, expected, case)
        assert torch.equal(found, Marlin.op(x, *operands)), f"{case}: not the same bits twice"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "tokens"), [(4096, 1024, 40), (4000, 520, 100), (1024, 4096, 128)])
def test_shapes_of_as_many_pairs_as_processors(n: int, k: int, tokens: int, dtype: torch.dtype) -> None:
    x, expected, operands = problem(n, k, 128 if k % 128 == 0 else 64, True, tokens, dtype, n)
    found = Marlin.op(x, *operands)
    assert_close(found, expected, (n, k, tokens))
    assert torch.equal(found, Marlin.op(x, *operands))


def test_inputs_of_any_strides_and_alignment() -> None:
    x, expected, operands = problem(64, 256, 128, True, 4, torch.float16, 0)
    shifted = torch.empty(4 * 256 + 1, dtype=x.dtype, device="cuda")[1:].view(4, 256).copy_(x)
    for view in (shifted, x.t().contiguous().t(), x.view(2, 2, 256)):
        assert_close(Marlin.op(view, *operands).view(4, 64), expected, view.stride())


def test_no_tokens() -> None:
    x, _, operands = problem(64, 256, 128, True, 4, torch.float16, 0)
    assert Marlin.op(x[:0], *operands).shape == (0, 64)


@pytest.mark.parametrize("tokens", [1, 16, 40, 100, 1100])
def test_a_captured_call_reads_its_input_anew(tokens: int) -> None:
    x, _, operands = problem(256, 512, 128, True, tokens, torch.float16, 0)
    Marlin.op(x, *operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = Marlin.op(Marlin.op(x, *operands).repeat(1, 2), *operands)
    x.normal_()
    graph.replay()
    assert torch.equal(out, Marlin.op(Marlin.op(x, *operands).repeat(1, 2), *operands))


def test_compiles_without_a_graph_break() -> None:
    x, _, operands = problem(256, 512, 128, True, 3, torch.bfloat16, 1)

    def block(x: Tensor) -> Tensor:
        return torch.relu(Marlin.op(x, *operands)) + 1

    assert torch.equal(torch.compile(block, fullgraph=True)(x), block(x))


def test_kernels_of_a_chain_wait_for_each_other() -> None:
    """Dependent launches begin early: a chain of them must still see each predecessor's result."""
    x, _, operands = problem(1024, 1024, 128, True, 1, torch.float16, 0)
    chained = x
    for _ in range(50):
        chained = Marlin.op(chained / chained.abs().amax(), *operands)
    waited = x
    for _ in range(50):
        waited = Marlin.op(waited / waited.abs().amax(), *operands)
        torch.cuda.synchronize()
    assert torch.equal(chained, waited)


def test_opcheck() -> None:
    x, _, operands = problem(64, 256, 64, False, 3, torch.float16, 1)
    torch.library.opcheck(Marlin.op, (x, *operands))


def test_packing_does_not_wait_for_the_device() -> None:
    codes = torch.randint(0, 16, (1024, 1024), dtype=torch.uint8, device="cuda")
    scales, zeros = torch.rand(1024, 8, device="cuda").half(), torch.zeros(1024, 8, device="cuda").byte()
    torch.cuda.set_sync_debug_mode("error")
    try:
        Marlin.pack(codes, scales, zeros, None, 4, 128)
    finally:
        torch.cuda.set_sync_debug_mode("default")
