"""``awqc::qlinear_exllama``: its limits, its launches, its sources, and its results on a device."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from awqc.kernels import configs, nvrtc
from awqc.kernels.cuda_launch import read_source
from awqc.kernels.exllama_block import Block, macros
from awqc.kernels.qlinear_exllama import ExLlama, multiply
from awqc.quantized import QuantizedWeight, Scheme, quantize
from tests.kernels.test_exllama_on_host import in_integers

CUDA = torch.device("cuda")
needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")


def weight_of(n: int, k: int, group_size: int = 32) -> QuantizedWeight:
    return quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)), Scheme(4, group_size))


def pack(
    weight: QuantizedWeight, bias: Tensor | None = None
) -> tuple[dict[str, Tensor | None], tuple[int, int]]:
    moved = weight.to(CUDA)
    bias = None if bias is None else bias.to(CUDA)
    return ExLlama.pack(moved.codes, moved.scales, moved.zeros, bias, 4, weight.scheme.group_size)


@needs_nvrtc
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cpu")}, "runs on cuda, not on cpu"),
        ({"dtype": torch.float32}, "multiplies float16 or bfloat16 activations, not torch.float32"),
        ({"bits": 5}, "holds codes of at most 4 bits, not 5"),
        (
            {"group_size": 48},
            "needs groups of a multiple of 32 input channels, not group_size=48 over 256",
        ),
    ],
)
def test_refusals_name_the_limit(change: dict[str, object], reason: str) -> None:
    legal = dict(n=7, k=256, bits=4, group_size=128, dtype=torch.float16, device=CUDA)
    assert ExLlama.legal(**legal) is None
    assert ExLlama.legal(**(legal | {"k": 100, "group_size": -1})) is None
    assert ExLlama.legal(**(legal | change)) == reason


def test_refuses_where_it_has_not_been_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    reason = ExLlama.legal(7, 256, 4, 128, torch.float16, CUDA)
    assert reason == "is compiled by NVRTC, for NVIDIA GPUs; exllama.cu has not been run on others"


def test_refuses_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awqc.kernels.qlinear_exllama.available", lambda: False)
    reason = ExLlama.legal(7, 256, 4, 128, torch.float16, CUDA)
    assert reason == "needs NVRTC, which torch's CUDA builds bring along: pip install nvidia-cuda-nvrtc"


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_89", "sm_90a"])
def test_every_source_that_ships_compiles(architecture: str) -> None:
    table = configs.measured("qlinear_exllama", torch.device("cpu"))
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    for entry, dtypes in itertools.product(table.values(), ((half, half), (brain, brain), (brain, single))):
        defines = macros(Block(**entry), *dtypes, architecture >= "sm_90")
        assert nvrtc.compile_source(read_source("exllama.cu"), architecture, defines)


def test_the_source_has_no_matrix_instruction_and_no_shuffle() -> None:
    source = read_source("exllama.cu")
    assert not any(word in source for word in ("mma", "__shfl", "cp.async", "atomic", "#include"))


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(130, 608, 128), (300, 96, 32), (64, 1000, -1), (513, 700, 64)]
)
def test_every_block_shape_agrees_with_float64(
    columns: int, tokens: int, n: int, k: int, group_size: int
) -> None:
    weight = weight_of(n, k, group_size)
    tensors, _ = pack(weight)
    operands = [t for t in tensors.values() if t is not None]
    bias = torch.randn(n, device=CUDA).half()
    x = torch.randn(11, k, device=CUDA).half()
    want = in_integers(x) @ weight.dequantize(torch.float64).t().to(CUDA) + bias.double()
    for warps, blocks in ((4, 1), (8, 2), (8, 16)):
        block = Block(tokens=tokens, columns=columns, warps=warps, blocks=blocks)
        got = multiply(x, *operands, bias, n, k if group_size == -1 else group_size, block)
        # Exact sums of 32 products, added in float32, rounded once.
        assert (got.double() - want).norm() <= torch.finfo(torch.float16).eps / 2 * want.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 11, 16, 100])
@pytest.mark.parametrize("outliers", [False, True])
def test_error_on_a_large_weight(outliers: bool, tokens: int, dtype: torch.dtype) -> None:
    weight = weight_of(4096, 4096, 128)
    tensors, constants = pack(weight)
    # A mean far from zero is the hard case of codes that are multiplied with an offset.
    x = (torch.randn(tokens, 4096, device=CUDA) + 1).to(dtype)
    if outliers:
        x[:, ::500] *= 100
        x[:, 1234] = 1500
    want = x.double() @ weight.dequantize(torch.float64).t().to(CUDA)
    error = (ExLlama.op(x, *tensors.values(), *constants).double() - want).norm() / want.norm()
    assert error <= {torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]


@pytest.mark.gpu
def test_the_same_input_gives_the_same_bits() -> None:
    tensors, constants = pack(weight_of(4096, 4096, 128))
    x = torch.randn(8, 4096, device=CUDA).half()
    first = ExLlama.op(x, *tensors.values(), *constants)
    assert all(torch.equal(ExLlama.op(x, *tensors.values(), *constants), first) for _ in range(50))


@pytest.mark.gpu
def test_float32_activations_are_multiplied_in_float32() -> None:
    weight, bias = weight_of(16, 64), torch.randn(16).half()
    tensors, constants = pack(weight, bias)
    x = torch.randn(5, 64)
    got = ExLlama.op(x.to(CUDA), *tensors.values(), *constants)
    torch.testing.assert_close(got.cpu(), x @ weight.dequantize().t() + bias.float())
