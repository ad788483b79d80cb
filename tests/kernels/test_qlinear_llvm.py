"""``awqc::qlinear_llvm``: every instruction set that this CPU has, against float64 arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from awqc.kernels import llvm, qlinear_llvm
from awqc.kernels.dot_products import TILE
from awqc.kernels.qlinear import dequantize
from awqc.kernels.qlinear_llvm import LlvmInt4, dot_rows
from awqc.quantized import QuantizedWeight, Scheme, quantize

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(llvm.missing() is not None, reason=f"awqc's own CPU kernel {llvm.missing()}")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=llvm.host_isas(), ids=lambda isa: isa.name)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[llvm.Isa]:
    def forget() -> None:
        qlinear_llvm.dot_rows.cache_clear()
        qlinear_llvm._function.cache_clear()

    monkeypatch.setattr(llvm, "host_isas", lambda: (request.param,))
    forget()
    yield request.param
    forget()


def weight_of(n: int, k: int, scheme: Scheme) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(n + k + scheme.bits)
    return quantize(torch.randn(n, k, generator=generator) / k**0.5, scheme)


def pack(
    weight: QuantizedWeight, bias: Tensor | None = None, dense: bool = False
) -> tuple[dict[str, Tensor | None], tuple[int, int]]:
    scheme = weight.scheme
    return LlvmInt4.pack(
        weight.codes, weight.scales, weight.zeros, bias, scheme.bits, scheme.group_size, dense=dense
    )


def run(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    tensors, constants = pack(weight, bias)
    return LlvmInt4.op(x, *tensors.values(), *constants)


def assert_within_bound(got: Tensor, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
    """What roundings can do at most.

    An activation is off by half a step, and a step is at most the largest of any 256 activations over 127 *
    256, plus one float32 rounding of its own. Sums, of codes and of zero points apart, pass a float32
    rounding for each of at most K / 16 chunks and six more. The result is rounded once, to the dtype of
    ``x``.
    """
    x64, eps = x.double(), torch.finfo(torch.float32).eps
    k = weight.codes.shape[1]
    matrix = dequantize(weight.codes, weight.scales, weight.zeros, weight.scheme.group_size, torch.float64)
    codes = dequantize(
        weight.codes, weight.scales, -weight.zeros.double(), weight.scheme.group_size, torch.float64
    )
    largest = x64.abs().amax(-1, keepdim=True)
    steps = largest / (127 * 256)
    offset = torch.zeros(()) if bias is None else bias.double()
    want = x64 @ matrix.T + offset
    bound = steps * (0.5 + 1e-3) * matrix.abs().sum(-1) + (k / 16 + 6) * eps / 2 * (x64.abs() @ codes.abs().T)
    bound = bound + torch.finfo(x.dtype).eps / 2 * (want.abs() + bound) + eps * offset.abs()
    excess = (got.double() - want).abs() - bound
    assert (excess <= 0).all(), f"outside its bound by {excess.max():.3g} of {bound.min():.3g}"


SHAPES = [
    (16, 16, Scheme(4, 16)),
    (64, 256, Scheme(4, 32)),
    (1, 1, Scheme(2, -1)),
    (7, 33, Scheme(3, -1)),
    (33, 300, Scheme(4, 128)),
    (50, 320, Scheme(4, 256)),
    (24, 480, Scheme(4, 48, zero_point=False)),
    (17, 1040, Scheme(4, -1)),
    (80, 512, Scheme(3, 512)),
    (16, 96, Scheme(2, 32, zero_point=False)),
]


@pytest.mark.parametrize(("n", "k", "scheme"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_float64(isa: llvm.Isa, n: int, k: int, scheme: Scheme, dtype: torch.dtype) -> None:
    weight = weight_of(n, k, scheme)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    for rows in range(2 * TILE[isa.name] + 2):
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)
        got = run(x, weight, bias)
        assert (got.shape, got.dtype) == ((rows, n), dtype)
        assert_within_bound(got, x, weight, bias)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 700),
    group=st.sampled_from([-1, 16, 32, 48, 80, 128, 192, 256, 384]),
    bits=st.integers(2, 4),
    zero_point=st.booleans(),
    rows=st.integers(1, 6),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 1e20]),
    outlier=st.sampled_from([1.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_any_size(
    n: int, k: int, group: int, bits: int, zero_point: bool, rows: int, size: float, outlier: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scheme = Scheme(bits, group, zero_point)
    if LlvmInt4.legal(n, k, bits, group, torch.float32, CPU) is not None:
        return
    weight = quantize(torch.randn(n, k, generator=generator), scheme)
    x = torch.randn(rows, k, generator=generator) * size
    x[:, k // 2] *= outlier
    assert_within_bound(run(x, weight), x, weight)


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16], ids=str)
def test_scales_keep_their_dtype(isa: llvm.Isa, scales: torch.dtype) -> None:
    found = weight_of(40, 256, Scheme(4, 64))
    weight = QuantizedWeight(found.codes, found.scales.to(scales) * 1.01, found.zeros, found.scheme)
    x = torch.randn(3, 256)
    assert pack(weight)[0]["scales"].dtype == scales
    assert_within_bound(run(x, weight), x, weight)


def test_tensors_may_lie_anywhere(isa: llvm.Isa) -> None:
    """As they do in a mapped file: at multiples of their own elements, no more."""
    weight, x, bias = weight_of(40, 256, Scheme(4, 64)), torch.randn(5, 256), torch.randn(40)
    tensors, constants = pack(weight, bias)

    def moved(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        wide = tensor.new_empty(tensor.numel() + 1)
        wide[1:] = tensor.flatten()
        return wide[1:].view(tensor.shape)

    got = LlvmInt4.op(moved(x), *map(moved, tensors.values()), *constants)
    assert torch.equal(got, run(x, weight, bias))
    apart = torch.stack([bias, bias], 1)[:, 0]
    tensors, constants = pack(weight, apart)
    assert torch.equal(LlvmInt4.op(x, *tensors.values(), *constants), got)


def test_the_bound_notices_one_wrong_code(isa: llvm.Isa) -> None:
    weight = weight_of(32, 512, Scheme(4, 128))
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(0))
    codes = weight.codes.clone()
    codes[5, int(x[0].abs().argmax())] ^= 1
    wrong = QuantizedWeight(codes, weight.scales, weight.zeros, weight.scheme)
    with pytest.raises(AssertionError, match="outside its bound"):
        assert_within_bound(run(x, wrong), x, weight)


def test_a_row_is_the_same_in_any_company_and_on_any_threads(isa: llvm.Isa) -> None:
    weight, x = weight_of(4096, 512, Scheme(4, 128)), torch.randn(2 * TILE[isa.name] + 1, 512)
    together, before = run(x, weight), torch.get_num_threads()
    assert torch.equal(together, torch.cat([run(row, weight) for row in x.split(1)]))
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(together, run(x, weight))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_so_and_in_its_row(isa: llvm.Isa, value: float) -> None:
    weight, x = weight_of(48, 256, Scheme(4, 64)), torch.randn(3, 256)
    want = run(x, weight)
    x[1, 100] = value
    got = run(x, weight)
    assert not got[1].isfinite().any()
    assert torch.equal(got[::2], want[::2])


def test_zero_and_next_to_zero(isa: llvm.Isa) -> None:
    weight, bias = weight_of(48, 256, Scheme(4, 64)), torch.randn(48)
    for x in (torch.zeros(2, 256), torch.full((2, 256), 1e-40), torch.full((2, 256), -1e-35)):
        assert torch.equal(run(x, weight, bias), bias.expand(2, 48))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cuda:1")}, "runs on cpu, not on cuda:1"),
        ({"dtype": torch.float64}, "takes float32, float16 or bfloat16 activations, not torch.float64"),
        ({"bits": 5}, "holds codes of at most 4 bits, not 5"),
        (
            {"group_size": 24},
            "needs groups of a multiple of 16 input channels, not group_size=24 over 256",
        ),
    ],
)
def test_refusals_name_the_limit(change: dict[str, object], reason: str) -> None:
    legal = dict(n=64, k=256, bits=4, group_size=128, dtype=torch.float32, device=CPU)
    assert LlvmInt4.legal(**legal) is None
    assert LlvmInt4.legal(**(legal | change)) == reason


def test_a_machine_that_cannot_run_it_is_a_refusal(without_llvm: str) -> None:
    assert LlvmInt4.legal(64, 256, 4, 128, torch.float32, CPU) == without_llvm


@pytest.mark.parametrize(
    ("k", "group", "chunk"),
    [
        (512, 512, 256),
        (512, 96, 32),
        (352, 256, 256),
        (4100, -1, 256),
        (40, -1, 64),
        (300, -1, 64),
        (64, 128, 64),
    ],
)
def test_chunks_split_groups_and_whole_rows_take_the_cheapest(k: int, group: int, chunk: int) -> None:
    tensors, constants = pack(weight_of(16, k, Scheme(4, group)))
    assert constants == (16, chunk)
    assert tensors["scales"].shape == (1, -(-k // chunk), 16)


@pytest.mark.parametrize(("n", "k", "scheme"), SHAPES, ids=str)
def test_unpack_gives_everything_back(n: int, k: int, scheme: Scheme) -> None:
    weight = weight_of(n, k, scheme)
    tensors, _ = pack(weight)
    found = LlvmInt4.unpack(tensors["packed"], tensors["scales"], tensors["zeros"], n, k, scheme.group_size)
    for got, want in zip(found, (weight.codes, weight.scales, weight.zeros), strict=True):
        assert torch.equal(got, want)


def test_the_dense_copy_serves_inputs_of_many_rows_only(isa: llvm.Isa) -> None:
    tensors, constants = pack(weight_of(16, 64, Scheme(4, 32)), dense=True)
    tensors["dense"] = torch.zeros_like(tensors["dense"])
    few, many = torch.ones(dot_rows(), 64), torch.ones(1, dot_rows() + 1, 64)
    assert LlvmInt4.op(few, *tensors.values(), *constants).all()
    assert not LlvmInt4.op(many, *tensors.values(), *constants).any()
    tensors["dense"] = None
    assert LlvmInt4.op(many, *tensors.values(), *constants).all()


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_and_strides(many: bool, dtype: torch.dtype) -> None:
    rows = dot_rows() + 1 if many else 3
    tensors, constants = pack(weight_of(21, 64, Scheme(4, 32)), bias=torch.randn(21), dense=True)
    x = torch.randn(64, rows).to(dtype)

    def call(x: Tensor) -> Tensor:
        return LlvmInt4.op(x, *tensors.values(), *constants)

    want = call(x.t().contiguous())
    assert want.dtype == dtype
    assert want.is_contiguous()
    assert torch.equal(call(x.t()), want)
    assert torch.equal(call(x.t().contiguous().view(1, rows, 64)), want[None])
    assert call(x.t()[:0]).shape == (0, 21)
    assert call(torch.empty(2, 0, 64, dtype=dtype)).shape == (2, 0, 21)
    wide = x.t().double()
    assert call(wide).dtype == torch.float64
    assert many or torch.equal(call(wide), call(wide.float()).double())


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dense: bool, dtype: torch.dtype) -> None:
    tensors, constants = pack(weight_of(21, 64, Scheme(4, 32)), bias=torch.randn(21), dense=dense)
    torch.library.opcheck(LlvmInt4.op, (torch.randn(3, 4, 64).to(dtype), *tensors.values(), *constants))


def test_one_graph_serves_both_sides_of_the_row_limit() -> None:
    tensors, constants = pack(weight_of(21, 64, Scheme(4, 32)), dense=True)

    def block(x: Tensor) -> Tensor:
        return LlvmInt4.op(x * 2, *tensors.values(), *constants) + 1

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (dot_rows() - 3, dot_rows() + 2):  # of no other size in the graph, or it gets tied to it
            x = torch.randn(rows, 64)
            assert torch.equal(compiled(x), block(x))
