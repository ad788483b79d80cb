"""``QuantLinear`` in a model: dtype and device moves, state, copies; and putting it there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from awqc.errors import ConfigError
from awqc.quantized import QuantizedWeight, Scheme, quantize
from awqc.runtime.linear import QuantLinear, replace_linears
from awqc.runtime.lowering import lower_linear

BACKENDS = ["reference", "cpu"]


def linear(
    backend: str = "auto", n: int = 32, k: int = 64, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> QuantLinear:
    vector = torch.randn(n).to(dtype) if bias else None
    return QuantLinear(
        lower_linear(quantize(torch.randn(n, k), Scheme(4, 32)), vector, dtype, "cpu", backend)
    )


def assert_same_weight(got: QuantizedWeight, want: QuantizedWeight) -> None:
    for name in ("codes", "scales", "zeros"):
        assert getattr(got, name).dtype == getattr(want, name).dtype
        assert torch.equal(getattr(got, name), getattr(want, name))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_changes_its_dtype_keeps_the_packed_one(backend: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 64), linear(backend))
    before = {name: t.clone() for name, t in model[1].state_dict().items()}
    weight, _ = model[1].unpack()
    x = torch.randn(3, 64)
    want = model[1](x.to(dtype).float())
    model.to(dtype)
    assert model[0].weight.dtype == dtype
    for name, tensor in model[1].state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert model(x.to(dtype)).dtype == dtype
    got = model[1](x.to(dtype))
    assert got.dtype == dtype
    # The same products; the order of their float32 sum may differ, and the result is rounded to another
    # dtype before and after the bias.
    magnitude = x.abs() @ weight.dequantize().abs().t() + model[1].bias.abs()
    bound = (2 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps) * magnitude
    assert ((got.double() - want).abs() <= bound).all()
    assert_same_weight(model[1].unpack()[0], weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_moves_between_devices(backend: str) -> None:
    module = linear(backend).to("meta", torch.float16)
    assert {t.device.type for t in module.buffers()} == {"meta"}
    assert module.to_empty(device="cpu").bias.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_carries_everything(backend: str, bias: bool) -> None:
    one, other = linear(backend, bias=bias), linear(backend, bias=bias)
    x = torch.randn(12, 64)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    for rows in (1, 12):
        assert torch.equal(one(x[:rows]), other(x[:rows]))
    assert_same_weight(other.unpack()[0], one.unpack()[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_deep_copy_is_independent(backend: str) -> None:
    module = linear(backend)
    x = torch.randn(2, 64)
    want = module(x)
    twin = copy.deepcopy(module)
    module.bias.zero_()
    assert torch.equal(twin(x), want)


def test_gives_back_what_was_lowered() -> None:
    weight, bias = quantize(torch.randn(32, 64), Scheme(3, 32)), torch.randn(32)
    module = QuantLinear(lower_linear(weight, bias, torch.float32, "cpu"))
    got, same_bias = module.unpack()
    assert_same_weight(got, weight)
    assert got.scheme == weight.scheme
    assert torch.equal(same_bias, bias)


def test_repr() -> None:
    assert repr(linear("cpu")) == (
        "QuantLinear(in_features=64, out_features=32, bias=True, W4 g32 asym, backend=cpu)"
    )
    assert "bias=False" in repr(linear(bias=False))


class Tied(nn.Module):
    """One linear under two names, in two containers, beside a norm and GPT-2's transposed linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32))
        self.again = nn.ModuleDict({"shared": self.first[0]})
        self.transposed = Conv1D(nf=32, nx=64)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.again["shared"](x) + self.transposed(x)


def test_replaces_a_shared_linear_under_all_its_names() -> None:
    model = Tied().eval()
    shared, transposed = linear(), linear()
    replace_linears(model, {"again.shared": shared, "transposed": transposed})
    assert model.first[0] is shared
    assert model.again["shared"] is shared
    assert model.transposed is transposed
    assert not shared.training
    assert model(torch.randn(2, 64)).shape == (2, 32)
    assert [name for name, _ in model.named_buffers() if name.endswith("bias")] == [
        "first.0.bias",
        "transposed.bias",
    ]


def test_two_names_of_one_linear_with_one_replacement() -> None:
    model, shared = Tied(), linear()
    replace_linears(model, {"again.shared": shared, "first.0": shared})
    assert model.first[0] is model.again["shared"] is shared


@pytest.mark.parametrize(
    ("name", "n", "message"),
    [
        ("first.7", 32, "Tied holds no module named 'first.7'"),
        ("", 32, "Tied holds no module named ''"),
        (
            "first",
            32,
            "first has no weight tensor: a quantized linear of 64 inputs and 32 outputs does not fit there",
        ),
        (
            "first.1",
            32,
            "first.1 has a weight of shape (32,): "
            "a quantized linear of 64 inputs and 32 outputs does not fit there",
        ),
        (
            "transposed",
            48,
            "transposed has a weight of shape (64, 32): "
            "a quantized linear of 64 inputs and 48 outputs does not fit there",
        ),
    ],
)
def test_a_name_that_does_not_fit_changes_nothing(name: str, n: int, message: str) -> None:
    model = Tied()
    before = dict(model.named_modules(remove_duplicate=False))
    with pytest.raises(ConfigError) as error:
        replace_linears(model, {"first.0": linear(), name: linear(n=n)})
    assert str(error.value) == message
    assert dict(model.named_modules(remove_duplicate=False)) == before


def test_two_names_of_one_linear_with_two_replacements() -> None:
    with pytest.raises(ConfigError) as error:
        replace_linears(Tied(), {"first.0": linear(), "again.shared": linear()})
    assert str(error.value) == (
        "again.shared is another name of a module that is replaced by a different linear"
    )


@pytest.mark.parametrize("scaled", [False, True])
def test_a_forward_that_looks_at_the_weight_finds_one(scaled: bool) -> None:
    quantized = linear("reference", bias=False)
    if scaled:
        quantized.input_scale = torch.rand(64) + 0.5
    weight, x = quantized.weight, torch.randn(3, 64)
    assert (weight.shape, weight.size(1)) == ((32, 64), 64)
    assert (weight.dtype, weight.device) == (torch.float32, torch.device("cpu"))
    dense = quantized.dequantize()
    assert torch.equal(weight.to(torch.float64), dense.double())
    found = torch.nn.functional.linear(x, weight)
    assert torch.equal(found, x @ dense.T)
    bound = 64 * torch.finfo(torch.float32).eps
    assert (found - quantized(x)).norm() <= bound * found.norm()
    assert quantized.half().weight.dtype == torch.float16
    assert list(quantized.state_dict()).count("weight") == 0
