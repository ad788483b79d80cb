"""``awqc::qexperts``: every expert is a linear of its own, and every kernel agrees with the reference."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from awqc.kernels import qexperts, registry  # noqa: F401  the first defines the op
from awqc.kernels.qlinear import qlinear
from awqc.quantized import QuantizedWeight, Scheme, quantize, stack

QEXPERTS = torch.ops.awqc.qexperts.default
EXPERTS, N, K = 4, 48, 64
#: Ends of the experts' rows: the second has none, and the last two of eleven rows belong to nobody.
OFFSETS = torch.tensor([3, 3, 8, 9])


def make_weight(scheme: Scheme, n: int = N, k: int = K) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(n * k + scheme.bits)
    return stack([quantize(torch.randn(n, k, generator=generator), scheme) for _ in range(EXPERTS)])


def parts(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    return weight.codes, weight.scales, weight.zeros


def rows(count: int, dtype: torch.dtype = torch.float32, k: int = K) -> Tensor:
    return torch.randn(count, k, generator=torch.Generator().manual_seed(count)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64, torch.float32])
def test_each_expert_runs_its_own_rows(dtype: torch.dtype, kind: torch.dtype) -> None:
    weight, x = make_weight(Scheme(4, 32)), rows(11, dtype)
    got = QEXPERTS(x, OFFSETS.to(kind), *parts(weight), 32)
    assert got.dtype == dtype
    start = 0
    for expert, end in enumerate(OFFSETS.tolist()):
        alone = qlinear(x[start:end], *(part[expert] for part in parts(weight)), None, 32)
        assert torch.equal(got[start:end], alone)
        start = end
    assert torch.equal(got[9:], torch.zeros(2, N, dtype=dtype))


def test_a_block_of_rows_for_each_expert_needs_no_offsets() -> None:
    weight, x = make_weight(Scheme(3, -1)), rows(EXPERTS * 5).view(EXPERTS, 5, K)
    got = QEXPERTS(x, None, *parts(weight), -1)
    want = QEXPERTS(x.flatten(0, 1), torch.arange(5, 21, 5), *parts(weight), -1)
    assert torch.equal(got, want.view(EXPERTS, 5, N))


@pytest.mark.parametrize("shape", [(0, K), (EXPERTS, 0, K)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    offsets = torch.zeros(EXPERTS, dtype=torch.int32) if len(shape) == 2 else None
    assert QEXPERTS(torch.empty(shape), offsets, *parts(make_weight(Scheme(4, 32))), 32).shape == (
        *shape[:-1],
        N,
    )


@pytest.mark.parametrize("blocks", [False, True])
def test_the_op_is_well_behaved(blocks: bool) -> None:
    x, offsets = (rows(8).view(EXPERTS, 2, K), None) if blocks else (rows(11), OFFSETS)
    torch.library.opcheck(QEXPERTS, (x, offsets, *parts(make_weight(Scheme(4, 32))), 32))


@pytest.mark.parametrize("name", registry.kernels("qexperts"))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 128])
@pytest.mark.parametrize("dense", [False, True])
def test_every_legal_kernel_agrees_with_the_reference(
    name: str, bits: int, group_size: int, dense: bool
) -> None:
    kernel, n, k, dtype = registry.kernels("qexperts")[name], 80, 256, torch.bfloat16
    options = {"dense": dense} if "dense" in inspect.signature(kernel.pack).parameters else {}
    if dense and not options:
        return
    if reason := kernel.legal(n, k, bits, group_size, dtype, torch.device("cpu")):
        assert "\n" not in reason
        return
    weight, x = make_weight(Scheme(bits, group_size), n, k), rows(20, dtype, k)
    offsets = torch.tensor([1, 1, 12, 18])
    tensors, constants = kernel.pack(*parts(weight), None, bits, group_size, **options)
    got = kernel.op(x, offsets, *tensors.values(), *constants)
    want = QEXPERTS(x.double(), offsets, *parts(weight), group_size)
    # x, scales, weights and output are each rounded to bfloat16 at most once.
    assert (got.double() - want).norm() <= 4 * torch.finfo(dtype).eps / 2 * want.norm()
    assert torch.equal(got[18:], torch.zeros(2, n, dtype=dtype))
    blocks = kernel.op(x.view(EXPERTS, 5, k), None, *tensors.values(), *constants).double()
    want = QEXPERTS(x.double().view(EXPERTS, 5, k), None, *parts(weight), group_size)
    assert (blocks - want).norm() <= 4 * torch.finfo(dtype).eps / 2 * want.norm()
    torch.library.opcheck(kernel.op, (x, offsets, *tensors.values(), *constants))
