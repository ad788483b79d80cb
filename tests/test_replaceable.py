"""A quantized linear takes the place of a module only where that is a linear and no more."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import awqc
from awqc.capture import relative_error
from awqc.replaceable import more_than_linear
from tests.nets import WIDTH, Net, inputs, linear, norm


class Product(nn.Module):
    """A linear by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH, WIDTH)), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Rectified(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.relu(super().forward(x))


class Residual(Product):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(x, self.weight)


class Pair(Product):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return F.linear(x, self.weight), None


class Parent(Product):
    def __init__(self) -> None:
        super().__init__()
        self.child = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.child(F.linear(x, self.weight))


@pytest.mark.parametrize("module", [linear(), linear(bias=True), Conv1D(12, WIDTH), Product()])
def test_a_linear_of_any_class_can_be_replaced(module: nn.Module) -> None:
    assert more_than_linear(nn.ModuleDict({"a": module})) == {}


@pytest.mark.parametrize("kind", [lambda: Rectified(WIDTH, WIDTH), Residual, Pair, Parent])
def test_a_module_that_does_more_cannot(kind: object) -> None:
    assert callable(kind)
    with torch.device("meta"):
        assert list(more_than_linear(nn.ModuleDict({"a": kind()}))) == ["a.weight"]


@pytest.mark.parametrize("kind", [lambda: Rectified(WIDTH, WIDTH), Residual, Parent])
def test_a_module_that_does_more_stays_and_the_report_says_so(kind: object) -> None:
    assert callable(kind)
    body = kind()
    net = Net(
        lambda m, x: m.last(m.body(m.first(m.norm(x)))), norm=norm(), first=linear(), body=body, last=linear()
    )
    compiled = awqc.compile(net, [inputs()] * 2, config=awqc.QuantConfig(bits=8, group_size=WIDTH))
    assert isinstance(compiled.get_submodule("body"), type(body))
    row = compiled.report.linears["body.weight"]
    assert (row.decision, row.reason) == (
        "kept",
        f"it belongs to a {type(body).__name__}, which does more than a linear with it",
    )
    with torch.no_grad():
        assert relative_error(compiled(**inputs()), net(**inputs())) < 0.05


def test_hooks_stay_with_what_takes_the_place_of_a_module() -> None:
    net = Net(lambda m, x: m.last(m.first(x)), first=linear(), last=linear())
    net.first.register_forward_hook(lambda module, args, result: 3 * result)
    net.first.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True
    )
    compiled = awqc.compile(net, [inputs()] * 2, config=awqc.QuantConfig(bits=8, group_size=WIDTH))
    with torch.no_grad():
        assert relative_error(compiled(**inputs()), net(**inputs())) < 0.05


def test_calibration_batches_may_be_nested() -> None:
    def compute(m: Net, x: dict[str, list[Tensor]]) -> Tensor:
        return m.last(torch.relu(m.first(x["pair"][0] - x["pair"][1])))

    net = Net(compute, first=linear(), last=linear())  # type: ignore[arg-type]
    batch = {"x": {"pair": [inputs()["x"], inputs()["x"].flip(0)]}}
    compiled = awqc.compile(net, [batch] * 2, config=awqc.QuantConfig(bits=8, group_size=WIDTH))
    with torch.no_grad():
        assert relative_error(compiled(**batch), net(**batch)) < 0.05
