"""``awqc::qlinear_cpu`` and the packing of ATen's 4-bit kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awqc.kernels import qlinear_aten
from awqc.kernels.qlinear_aten import INT4_ROWS, AtenInt4
from awqc.quantized import QuantizedWeight, Scheme, quantize

CPU = torch.device("cpu")


def weight_of(n: int, k: int, bits: int = 4, group_size: int = 32) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(n + k + bits)
    return quantize(torch.randn(n, k, generator=generator), Scheme(bits, group_size))


def pack(
    weight: QuantizedWeight, bias: Tensor | None = None, dense: bool = True
) -> tuple[dict[str, Tensor | None], tuple[int]]:
    scheme = weight.scheme
    return AtenInt4.pack(
        weight.codes, weight.scales, weight.zeros, bias, scheme.bits, scheme.group_size, dense=dense
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cuda:1")}, "runs on cpu, not on cuda:1"),
        (
            {"dtype": torch.float64},
            "computes in bfloat16: float32, float16 or bfloat16 activations, not torch.float64",
        ),
        ({"bits": 5}, "holds codes of at most 4 bits, not 5"),
        ({"n": 50257}, "needs a multiple of 16 output features, not 50257"),
        (
            {"group_size": 48},
            "needs groups that split into 32, 64, 128 or 256 input channels, not group_size=48 over 256",
        ),
        (
            {"k": 300, "group_size": 128},
            "needs groups that split into 32, 64, 128 or 256 input channels, not group_size=128 over 300",
        ),
        (
            {"k": 80, "group_size": -1},
            "needs groups that split into 32, 64, 128 or 256 input channels, not group_size=-1 over 80",
        ),
    ],
)
def test_refusals_name_the_limit(change: dict[str, object], reason: str) -> None:
    legal = dict(n=64, k=256, bits=4, group_size=128, dtype=torch.float32, device=CPU)
    assert AtenInt4.legal(**legal) is None
    assert AtenInt4.legal(**(legal | change)) == reason


@pytest.mark.parametrize(
    ("k", "group_size", "kernel_group"),
    [
        (512, 32, 32),
        (512, 256, 256),
        (512, 512, 256),
        (384, 384, 128),
        (512, -1, 256),
        (96, -1, 32),
        (64, 128, 64),
        # The last group is ragged, yet whole in groups of the kernel.
        (320, 128, 64),
        (352, 256, 32),
    ],
)
def test_groups_split_exactly(k: int, group_size: int, kernel_group: int) -> None:
    weight = weight_of(16, k, group_size=group_size)
    tensors, constants = pack(weight)
    assert constants == (kernel_group,)
    scales = tensors["scales_and_zeros"][:, :, 0].t().repeat_interleave(kernel_group, 1)
    group = k if group_size == -1 else group_size
    want = torch.stack([weight.scales[:, column // group] for column in range(k)], 1)
    assert torch.equal(scales, want.bfloat16())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_below_4_bits_lie_around_the_kernels_zero(bits: int) -> None:
    # Symmetric groups then have no zero term at all, so nothing of it is rounded.
    weight = quantize(torch.randn(16, 64), Scheme(bits, 32, zero_point=False))
    assert not pack(weight)[0]["scales_and_zeros"][..., 1].any()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (64, 96), (80, 64), (208, 160), (48, 1024)])
def test_unpack_gives_the_codes_back(n: int, k: int, bits: int) -> None:
    weight = weight_of(n, k, bits)
    assert torch.equal(AtenInt4.unpack(pack(weight)[0]["packed"], bits), weight.codes)


def test_unpack_notices_an_order_that_does_not_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(weight_of(128, 32))[0]["packed"]
    original = qlinear_aten._pack

    def other_order(codes: Tensor) -> Tensor:
        return original(codes.flip(0)) if codes.shape[0] == 128 else original(codes)

    monkeypatch.setattr(qlinear_aten, "_pack", other_order)
    with pytest.raises(RuntimeError) as error:
        AtenInt4.unpack(packed, 4)
    assert str(error.value) == (
        f"the 4-bit packing of torch {torch.__version__} on this CPU does not repeat every 64 rows: "
        "the codes of a 128x32 weight cannot be read back"
    )


def test_the_dense_copy_serves_inputs_of_many_rows_only() -> None:
    tensors, constants = pack(weight_of(16, 64))
    tensors["dense"] = torch.zeros_like(tensors["dense"])
    few, many = torch.ones(INT4_ROWS, 64), torch.ones(1, INT4_ROWS + 1, 64)
    assert AtenInt4.op(few, *tensors.values(), *constants).all()
    assert not AtenInt4.op(many, *tensors.values(), *constants).any()
    tensors["dense"] = None
    assert AtenInt4.op(many, *tensors.values(), *constants).all()


@pytest.mark.parametrize("rows", [INT4_ROWS, INT4_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shapes_and_strides(rows: int, dtype: torch.dtype) -> None:
    tensors, constants = pack(weight_of(16, 64), bias=torch.randn(16))
    x = torch.randn(64, rows).to(dtype)

    def run(x: Tensor) -> Tensor:
        return AtenInt4.op(x, *tensors.values(), *constants)

    want = run(x.t().contiguous())
    assert want.dtype == dtype
    assert torch.equal(run(x.t()), want)
    assert torch.equal(run(x.t().contiguous().view(1, rows, 64)), want[None])
    assert run(x.t()[:0]).shape == (0, 16)
    assert run(torch.empty(2, 0, 64, dtype=dtype)).shape == (2, 0, 16)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dense: bool, dtype: torch.dtype) -> None:
    tensors, constants = pack(weight_of(16, 64), bias=torch.randn(16), dense=dense)
    torch.library.opcheck(AtenInt4.op, (torch.randn(3, 4, 64).to(dtype), *tensors.values(), *constants))


def test_one_graph_serves_both_sides_of_the_row_limit() -> None:
    tensors, constants = pack(weight_of(16, 64))

    def block(x: Tensor) -> Tensor:
        return AtenInt4.op(x * 2, *tensors.values(), *constants) + 1

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (INT4_ROWS - 3, INT4_ROWS + 1):  # of no other size in the graph, or it gets tied to it
            x = torch.randn(rows, 64)
            assert torch.equal(compiled(x), block(x))
