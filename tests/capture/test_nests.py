"""Dataclasses of tensors, as what a forward takes and returns."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import awqc
from awqc.errors import CaptureError
from tests.nets import WIDTH, linear, norm


@dataclass
class Given:
    values: Tensor
    name: str


@dataclass
class Answer:
    scores: Tensor
    inner: Given


class Asked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = norm(), linear(), linear()

    def forward(self, given: Given) -> Answer:
        h = self.first(self.norm(given.values))
        return Answer(self.second(torch.relu(h)), Given(h, given.name))


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.asked, self.last = Asked(), linear()

    def forward(self, x: Tensor) -> Answer:
        answer = self.asked(Given(x, "x"))
        if float(answer.scores.sum()) > 1e9:
            raise ValueError("too large")
        return Answer(self.last(torch.relu(answer.scores)), answer.inner)


@dataclass
class Opaque:
    def __init__(self, x: Tensor) -> None:
        self.hidden = x


class Silent(Asked):
    def forward(self, x: Tensor) -> Opaque:  # type: ignore[override]
        return Opaque(self.first(x))


X = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))


def test_tensors_in_dataclasses_are_inputs_and_outputs() -> None:
    batch = {"given": Given(X, "x")}
    found = awqc.analyze(Asked(), batch)
    assert found.capture.rung == "torch.export"
    assert [str(node.target) for node in found.graph.inputs] == ["given_values"]
    assert len(found.graph.outputs) == 2
    assert set(found.linears) == {"first.weight", "second.weight"}
    assert found.prove(batch) < 1e-9


def test_pieces_hand_dataclasses_on() -> None:
    found = awqc.analyze(Wrapper(), {"x": X})
    assert found.capture.rung == "pieces"
    assert set(found.linears) == {"asked.first.weight", "asked.second.weight", "last.weight"}
    assert found.prove({"x": X}) < 1e-9


def test_a_model_that_returns_no_tensor_is_an_error() -> None:
    with pytest.raises(CaptureError, match="Silent returns no tensor in a tuple, list, dict or dataclass"):
        awqc.analyze(Silent(), {"x": X})
