"""Packed weights in the place of a parameter: every way in which a forward may read it."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awqc.errors import ConfigError
from awqc.quantized import Scheme, quantize, stack
from awqc.runtime.experts import QuantExperts, Weights, replace_expert_weights
from awqc.runtime.lowering import lower_linear

E, N, K = 3, 32, 64
OFFSETS = torch.tensor([4, 4, 9], dtype=torch.int32)


@pytest.fixture(params=[False, True], ids=["(E, N, K)", "(E, K, N)"])
def packed(request: pytest.FixtureRequest) -> QuantExperts:
    return make(request.param)


def make(transposed: bool, backend: str = "reference") -> QuantExperts:
    generator = torch.Generator().manual_seed(0)
    weights = [quantize(torch.randn(N, K, generator=generator), Scheme(4, 32)) for _ in range(E)]
    return QuantExperts(lower_linear(stack(weights), None, torch.float32, "cpu", backend), transposed)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(1))


def columns(weights: QuantExperts | Weights | Tensor, transposed: bool) -> QuantExperts | Weights | Tensor:
    """The weights as ``(..., K, N)``, by the functions that a forward has."""
    return weights if transposed else weights.transpose(-2, -1)


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two orders of the same sums of K products agree."""
    return bool((found - expected).norm() <= K * torch.finfo(torch.float32).eps * expected.norm())


@pytest.fixture
def no_dequantizing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuantExperts, "dequantize", lambda self: pytest.fail("dequantized"))


def test_it_has_the_looks_of_the_parameter(packed: QuantExperts) -> None:
    shape = (E, K, N) if packed.transposed else (E, N, K)
    assert packed.shape == packed.size() == shape
    assert (packed.size(1), packed.dim(), packed.ndim, len(packed)) == (shape[1], 3, 3, E)
    assert (packed.dtype, packed.device) == (torch.float32, torch.device("cpu"))
    assert packed.mT.shape == packed.transpose(1, 2).shape == (E, shape[2], shape[1])
    assert packed[1].shape == packed[torch.tensor(1)].shape == shape[1:]
    assert packed[torch.tensor([0, 2, 2, 1])].shape == (4, *shape[1:])
    assert torch.equal(packed.transpose(0, 1), packed.dequantize().transpose(0, 1))


def test_grouped_products(packed: QuantExperts) -> None:
    x, dense = rows(9), packed.dequantize()
    expected = F.grouped_mm(x, columns(dense, packed.transposed), offs=OFFSETS)
    weights = columns(packed, packed.transposed)
    assert close(F.grouped_mm(x, weights, offs=OFFSETS), expected)
    assert close(torch._grouped_mm(x, weights, offs=OFFSETS), expected)
    assert close(packed(x, OFFSETS), expected)


def test_products_with_chosen_experts(packed: QuantExperts, no_dequantizing: None) -> None:
    """Every row by an expert of its own, from either side."""
    chosen, x = torch.tensor([2, 0, 2, 1, 0]), rows(5)
    alone = torch.stack([packed(row.expand(E, 1, K))[e, 0] for row, e in zip(x, chosen, strict=True)])
    weights = columns(packed[chosen], packed.transposed)
    assert close(torch.bmm(x.unsqueeze(1), weights).squeeze(1), alone)
    assert close((x.unsqueeze(1) @ weights).squeeze(1), alone)
    assert close(torch.bmm(weights.mT, x.unsqueeze(-1)).squeeze(-1), alone)
    blocks = rows(5, 3)
    several = torch.stack([packed(b.expand(E, 3, K))[e] for b, e in zip(blocks, chosen, strict=True)])
    assert close(torch.bmm(blocks, weights), several)


@pytest.mark.parametrize("index", [1, -1, torch.tensor(2)], ids=str)
def test_products_with_one_expert(packed: QuantExperts, no_dequantizing: None, index: int | Tensor) -> None:
    x = rows(2, 5)
    expected = packed(x.flatten(0, 1).expand(E, 10, K))[index].view(2, 5, N)
    weight = packed[index]
    if packed.transposed:
        found = [x @ weight, torch.matmul(x, weight), F.linear(x, weight.t())]
    else:
        found = [F.linear(x, weight), x @ weight.t(), torch.matmul(x, weight.mT)]
    assert all(close(one, expected) for one in found)
    bias = torch.randn(N)
    assert close(F.linear(x, weight.t() if packed.transposed else weight, bias), expected + bias)


def test_blocks_of_rows(packed: QuantExperts, no_dequantizing: None) -> None:
    x = rows(E, 4)
    assert torch.equal(torch.bmm(x, columns(packed, packed.transposed)), packed(x))


def test_whatever_else_a_forward_does_is_done_on_dequantized_weights(packed: QuantExperts) -> None:
    dense, x = packed.dequantize(), rows(4)
    kind = "sk,ekn->sen" if packed.transposed else "sk,enk->sen"
    assert torch.equal(torch.einsum(kind, x, packed), torch.einsum(kind, x, dense))
    assert torch.equal(packed[:2], dense[:2])
    assert torch.equal(packed[1].sum(), dense[1].sum())
    assert torch.equal(torch.abs(packed), dense.abs())
    assert torch.equal(packed.permute(1, 0, 2), dense.permute(1, 0, 2))
    with pytest.raises(AttributeError, match="no_such_attribute"):
        packed.no_such_attribute  # noqa: B018


def test_codes_stay_and_activations_change_dtype(packed: QuantExperts) -> None:
    before = packed.codes.clone()
    packed.half()
    assert packed.dtype == packed[0].dtype == torch.float16
    assert packed.codes.dtype == torch.uint8
    assert torch.equal(packed.codes, before)
    assert packed(rows(9).half(), OFFSETS).dtype == torch.float16
    assert "3 experts, in_features=64, out_features=32, W4 g32 asym, backend=reference" in repr(packed)


class Owner(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.stacked = nn.Parameter(torch.zeros(shape))
        self.tied = self.inner.stacked

    def forward(self, x: Tensor) -> Tensor:
        return F.grouped_mm(x, self.inner.stacked.mT, offs=OFFSETS)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_it_takes_the_place_of_the_parameter_under_all_its_names(backend: str) -> None:
    model, packed = Owner(E, N, K), make(False, backend)
    replace_expert_weights(model, {"inner.stacked": packed})
    assert model.inner.stacked is model.tied is packed
    assert not list(model.parameters())
    x = rows(9)
    assert torch.equal(model(x), packed(x, OFFSETS))
    other = Owner(E, N, K)
    replace_expert_weights(other, {"inner.stacked": make(False, backend)})
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("transposed", [False, True])
def test_compiled_into_one_graph(transposed: bool) -> None:
    """Weights that are passed on as they are, transposed, and picked."""
    import transformers.integrations.moe  # noqa: F401  defines the op that it takes when it is compiled

    packed = make(transposed)

    class Forward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = packed

        def forward(self, x: Tensor, offsets: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
            weight = self.weight if transposed else self.weight.transpose(-2, -1)
            grouped = torch.ops.transformers.grouped_mm_fallback(x.to(weight.dtype), weight, offs=offsets)
            return grouped, torch.bmm(x.unsqueeze(1), columns(self.weight[chosen], transposed)).squeeze(1)

    x, chosen = rows(9), torch.arange(9) % E
    graph = torch.compile(Forward(), fullgraph=True, backend="eager")
    assert all(map(torch.equal, graph(x, OFFSETS, chosen), Forward()(x, OFFSETS, chosen)))


def test_what_does_not_fit() -> None:
    model = Owner(E, K, N)
    message = (
        "Owner has inner.stacked of shape (3, 64, 32): the weights of 3 experts do not fit there, which make "
        "a parameter of shape (3, 32, 64) (inner.stacked)"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace_expert_weights(model, {"inner.stacked": make(False)})
    message = "Owner has no such parameter: the weights of 3 experts do not fit there, which make a"
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace_expert_weights(model, {"elsewhere": make(False)})
    assert isinstance(model.inner.stacked, nn.Parameter)
