"""Quantized linears in ONNX Runtime against the canonical weight: every form, width, group and shape."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from awqc.export.check import check_file, run, session
from awqc.export.linears import Dequantize, Form, MatMulNBits
from awqc.export.lowering import Lowered, lower
from awqc.export.program import DOMAIN, QEXPERTS, QLINEAR
from awqc.quantized import QuantizedWeight, Scheme, quantize

FORMS = [MatMulNBits(), Dequantize()]


def random_weight(scheme: Scheme, *shape: int) -> QuantizedWeight:
    return quantize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(1)) / shape[-1] ** 0.5, scheme
    )


def graph(
    weight: QuantizedWeight, x: Tensor, bias: Tensor | None = None, offsets: Tensor | None = None
) -> ir.Model:
    """What tracing leaves of one quantized linear, or of the linears of experts."""
    tensors = {"codes": weight.codes, "scales": weight.scales, "zeros": weight.zeros, "bias": bias}
    made = {name: ir.tensor(t.numpy(), name=name) for name, t in tensors.items() if t is not None}
    stored = {
        name: ir.Value(name=name, shape=t.shape, type=ir.TensorType(t.dtype), const_value=t)
        for name, t in made.items()
    }
    given = {"x": x} if offsets is None else {"x": x, "offsets": offsets}
    inputs = {
        name: ir.Input(name, ir.Shape(t.shape), ir.TensorType(ir.tensor(t.numpy()).dtype))
        for name, t in given.items()
    }
    attributes = {"bits": weight.scheme.bits, "group_size": weight.scheme.group(weight.in_features)}
    operands = [inputs["x"], *(stored.get(name) for name in tensors), inputs.get("offsets")]
    node = ir.node(
        QEXPERTS if weight.codes.ndim == 3 else QLINEAR,
        operands,
        attributes,
        domain=DOMAIN,
        name="/mlp/up/node",
    )
    y = node.outputs[0]
    y.name, y.type = "y", inputs["x"].type
    y.shape = ir.Shape((*x.shape[:-1], weight.codes.shape[-2]))
    whole = ir.Graph(
        list(inputs.values()), [y], nodes=[node], initializers=list(stored.values()),
        opset_imports={"": 21, DOMAIN: 1}, name="linear",
    )  # fmt: skip
    return ir.Model(whole, ir_version=10)


def lowered(model: ir.Model, form: Form, path: Path) -> Lowered:
    result = lower(model, form, Dequantize())
    ir.save(model, path)
    check_file(path)
    return result


def tolerance(x: Tensor, k: int) -> float:
    """Rounding of float32 products of K terms, or of the result where that is float16."""
    return 4 * k**0.5 * torch.finfo(torch.float32).eps if x.dtype == torch.float32 else 2.0**-10


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


SCHEMES = [
    pytest.param(Scheme(bits, group, zero_point), n, k, id=f"{bits}b-g{group}-{zero_point}-{n}x{k}")
    for bits, group, zero_point, n, k in [
        (4, 32, True, 24, 64),
        (4, 128, True, 16, 256),
        (4, 16, True, 7, 48),  # an odd number of rows, and of blocks
        (4, 32, False, 24, 64),
        (4, 64, True, 16, 96),  # a ragged last group
        (4, 48, True, 16, 144),  # blocks of 16
        (4, -1, True, 16, 80),  # one group of no power of two
        (4, -1, False, 16, 640),  # one group, several blocks
        (4, 512, True, 8, 1024),
        (2, 32, True, 16, 64),
        (3, 32, True, 16, 64),
        (3, 32, False, 16, 64),
        (5, 32, True, 16, 64),
        (8, 32, True, 16, 96),
        (8, -1, False, 16, 64),
    ]
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize(("scheme", "n", "k"), SCHEMES)
def test_a_linear_computes_what_its_weight_says(
    form: Form, scheme: Scheme, n: int, k: int, tmp_path: Path
) -> None:
    weight = random_weight(scheme, n, k)
    x = torch.randn(2, 3, k, generator=torch.Generator().manual_seed(2))
    result = lowered(graph(weight, x), form, tmp_path / "m.onnx")
    assert result == Lowered({"mlp.up": form.name}, {})
    (y,) = run(session(tmp_path / "m.onnx"), {"x": x})
    assert relative(y, x @ weight.dequantize().T) <= tolerance(x, k)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_bias_and_half_precision(form: Form, tmp_path: Path) -> None:
    weight = random_weight(Scheme(4, 32), 16, 64)
    generator = torch.Generator().manual_seed(2)
    x, bias = torch.randn(3, 64, generator=generator).half(), torch.randn(16, generator=generator).half()
    lowered(graph(weight, x, bias), form, tmp_path / "m.onnx")
    (y,) = run(session(tmp_path / "m.onnx"), {"x": x})
    assert y.dtype == torch.float16
    assert relative(y, x.float() @ weight.dequantize().T + bias.float()) <= tolerance(x, 64)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("ends", [[2, 2, 5], [0, 0, 1], [5, 5, 5]], ids=str)
def test_experts_multiply_their_rows(form: Form, ends: list[int], tmp_path: Path) -> None:
    """Also where one has none."""
    weight = random_weight(Scheme(4, 32), 3, 16, 64)
    x = torch.randn(ends[-1], 64, generator=torch.Generator().manual_seed(2))
    offsets = torch.tensor(ends, dtype=torch.int32)
    lowered(graph(weight, x, offsets=offsets), form, tmp_path / "m.onnx")
    (y,) = run(session(tmp_path / "m.onnx"), {"x": x, "offsets": offsets})
    owner = torch.bucketize(torch.arange(ends[-1]), offsets, right=True)
    expected = torch.einsum("sk,snk->sn", x, weight.dequantize()[owner])
    assert relative(y, expected) <= tolerance(x, 64)


def test_experts_with_equally_many_rows(tmp_path: Path) -> None:
    weight = random_weight(Scheme(4, 32), 3, 16, 64)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2))
    lowered(graph(weight, x), MatMulNBits(), tmp_path / "m.onnx")
    (y,) = run(session(tmp_path / "m.onnx"), {"x": x})
    assert relative(y, x @ weight.dequantize().mT) <= tolerance(x, 64)


def test_groups_without_a_block_size_are_dequantized(tmp_path: Path) -> None:
    weight = random_weight(Scheme(4, 24), 16, 96)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(2))
    result = lowered(graph(weight, x), MatMulNBits(), tmp_path / "m.onnx")
    reason = "MatMulNBits has blocks of 16 to 256 channels, powers of two, and none divides 24"
    assert result == Lowered({"mlp.up": "DequantizeLinear"}, {"mlp.up": reason})
    (y,) = run(session(tmp_path / "m.onnx"), {"x": x})
    assert relative(y, x @ weight.dequantize().T) <= tolerance(x, 96)


def stored_bits(model: ir.Model) -> int:
    return sum(8 * value.const_value.nbytes for value in model.graph.initializers.values())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_packed_size(form: Form, tmp_path: Path) -> None:
    """Four bits a code and a zero point, float32 scales, and nothing of the canonical weight."""
    model = graph(random_weight(Scheme(4, 32), 32, 128), torch.zeros(1, 128))
    lowered(model, form, tmp_path / "m.onnx")
    assert stored_bits(model) == 4 * 32 * 128 + (4 + 32) * 32 * 4


def test_symmetric_weights_need_no_zero_points(tmp_path: Path) -> None:
    model = graph(random_weight(Scheme(4, 32, False), 32, 128), torch.zeros(1, 128))
    lowered(model, MatMulNBits(), tmp_path / "m.onnx")
    assert sorted(model.graph.initializers) == ["mlp.up.scales", "mlp.up.weight"]


def test_accuracy_level_rounds_activations(tmp_path: Path) -> None:
    weight = random_weight(Scheme(4, 32), 64, 256)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(2))
    lowered(graph(weight, x), MatMulNBits(accuracy_level=4), tmp_path / "m.onnx")
    (y,) = run(session(tmp_path / "m.onnx"), {"x": x})
    assert tolerance(x, 256) < relative(y, x @ weight.dequantize().T) <= 2.0**-6
