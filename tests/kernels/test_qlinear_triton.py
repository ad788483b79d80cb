"""``awqc::qlinear_triton``: its limits, the choice of a route, shapes, and an op's manners."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from awqc.kernels import qlinear_triton
from awqc.kernels.qlinear_triton import TritonGemm, candidates
from awqc.kernels.triton_tile import Tile
from awqc.quantized import QuantizedWeight, Scheme, quantize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = torch.device("cuda")


def weight_of(n: int, k: int, group_size: int = 32) -> QuantizedWeight:
    return quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)), Scheme(4, group_size))


def pack(
    weight: QuantizedWeight, bias: Tensor | None = None
) -> tuple[dict[str, Tensor | None], tuple[int, int]]:
    return TritonGemm.pack(
        weight.codes.to(DEVICE),
        weight.scales.to(DEVICE),
        weight.zeros.to(DEVICE),
        None if bias is None else bias.to(DEVICE),
        4,
        weight.scheme.group_size,
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("meta")}, "runs on cuda, not on meta"),
        ({"dtype": torch.float32}, "multiplies float16 or bfloat16 activations, not torch.float32"),
        ({"bits": 5}, "holds codes of at most 4 bits, not 5"),
        (
            {"group_size": 24},
            "needs groups of a multiple of 16 input channels, not group_size=24 over 256",
        ),
    ],
)
def test_refusals_name_the_limit(change: dict[str, object], reason: str) -> None:
    legal = dict(n=7, k=256, bits=4, group_size=128, dtype=torch.float16, device=CUDA)
    assert TritonGemm.legal(**legal) is None
    assert TritonGemm.legal(**(legal | change)) == reason


def test_refuses_where_triton_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = TritonGemm.legal(7, 256, 4, 128, torch.float16, CUDA)
    assert reason == "needs triton, which is not installed"


def test_the_cpu_is_legal_only_when_interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    reason = TritonGemm.legal(7, 256, 4, 128, torch.float16, torch.device("cpu"))
    assert reason == "runs on cuda, not on cpu"


def test_the_route_by_tokens_is_stable_between_the_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Tile | None] = []
    original = qlinear_triton.choose

    def record(*args: object) -> Tile | None:
        chosen.append(original(*args))
        return chosen[-1]

    monkeypatch.setattr(qlinear_triton, "choose", record)
    tensors, constants = pack(weight_of(16, 64))
    for tokens in (1, 7, 8, 9, 16, 1000, 1001):
        TritonGemm.op(
            torch.ones(tokens, 64, dtype=torch.float16, device=DEVICE), *tensors.values(), *constants
        )
    assert chosen[0] == chosen[1] == chosen[2] != chosen[3] == chosen[4]
    assert chosen[5:] == [None, None]


@pytest.mark.parametrize("tokens", [3, 1000])
def test_shapes_and_strides(tokens: int) -> None:
    tensors, constants = pack(weight_of(16, 64), bias=torch.randn(16).half())
    x = torch.randn(64, tokens).to(DEVICE, torch.float16)

    def run(x: Tensor) -> Tensor:
        return TritonGemm.op(x, *tensors.values(), *constants)

    want = run(x.t().contiguous())
    assert torch.equal(run(x.t()), want)
    assert torch.equal(run(x.t().contiguous().view(1, tokens, 64)), want[None])
    assert run(x.t()[:0]).shape == (0, 16)
    assert run(x.new_empty(2, 0, 64)).shape == (2, 0, 16)


def test_float32_activations_are_multiplied_in_float32() -> None:
    weight, bias = weight_of(16, 64), torch.randn(16).half()
    tensors, constants = pack(weight, bias)
    x = torch.randn(5, 64)
    got = TritonGemm.op(x.to(DEVICE), *tensors.values(), *constants)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu(), x @ weight.dequantize().t() + bias.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    tensors, constants = pack(weight_of(16, 64), bias=torch.randn(16).to(dtype))
    torch.library.opcheck(
        TritonGemm.op, (torch.randn(3, 2, 64).to(DEVICE, dtype), *tensors.values(), *constants)
    )


def test_candidates_cover_what_was_measured() -> None:
    for tokens in qlinear_triton.TOKENS:
        tiles = candidates(tokens)
        assert len(tiles) == len(set(tiles))
        assert all(tile.block_m <= tokens for tile in tiles)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 4, 16, 17, 100, 600])
def test_error_on_a_large_weight(tokens: int, dtype: torch.dtype) -> None:
    weight = weight_of(4096, 4096, 128)
    tensors, constants = pack(weight)
    x = torch.randn(tokens, 4096, device=DEVICE).to(dtype)
    want = x.double() @ weight.dequantize(torch.float64).t().to(DEVICE)
    error = (TritonGemm.op(x, *tensors.values(), *constants).double() - want).norm() / want.norm()
    assert error <= {torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
