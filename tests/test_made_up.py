"""Checks of whole graphs on made-up weights, and eager models that are lent each weight for an op."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awqc.capture import capture, eager_outputs
from awqc.errors import CaptureError, VerifyError
from awqc.made_up import stand_ins
from awqc.memory import MemoryLimit
from awqc.program import Env, Program
from awqc.scaleflow.sites import Site
from awqc.storage.source import ModelSource, aliases, named_tensors, open_source
from awqc.weights import Weights
from tests.mixtures import build
from tests.models import gpt2, llama
from tests.test_streaming import compile_to

CPU = torch.device("cpu")
#: Of weights that do not fit anywhere.
LITTLE = MemoryLimit(1000, 1000)


class Peeks(nn.Module):
    """Reads a weight of a module that it never calls, transposed, and asks for what a tensor looks like."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("table", torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.b.weight
        x = self.a(x.to(weight.device, weight.dtype)) + self.table
        return x @ weight.T + F.linear(x, weight.data)[..., : weight.shape[0]] / weight.size(1)


def ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(0))}


SUBJECTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "llama": (llama, ids),
    "gpt2": (gpt2, ids),
    "mixtral": (lambda: build("mixtral"), ids),
    "peeks": (Peeks, lambda: {"x": torch.ones(2, 8)}),
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_lent_weights_compute_what_held_ones_do(name: str) -> None:
    make, inputs = SUBJECTS[name]
    module = make().eval()
    tensors = dict(named_tensors(module))
    held = Weights(list(tensors), lambda n: tensors[n].detach(), torch.float32, "cpu", aliases(module))
    lent = held.like(torch.float32)
    lent.streamed = True
    expected = eager_outputs(module, inputs(), held)
    found = eager_outputs(module, inputs(), lent)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not lent._resident
    assert all(t is tensors[n] for n, t in named_tensors(module))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = tmp_path_factory.mktemp("source")
    llama().save_pretrained(folder)
    return open_source(folder)


def test_made_up_weights_are_like_trained_ones(source: ModelSource) -> None:
    read = stand_ins(source, LITTLE, CPU)
    assert read is not None
    for name, tensor in named_tensors(source.module):
        value = read(name, torch.float64 if tensor.is_meta else None)
        assert value.shape == tensor.shape
        if tensor.is_meta:
            assert value.dtype == torch.float64
            assert torch.equal(value, read(name, torch.float64))
            size = value.std() * (tensor.shape[-1] ** 0.5 if tensor.ndim > 1 else 8)
            assert size == pytest.approx(1, abs=5 / tensor.numel() ** 0.5)
        else:
            assert torch.equal(value, tensor)
            assert value is not tensor  # the caller may overwrite it
    q, k = (read(f"model.layers.0.self_attn.{n}_proj.weight", torch.float32)[:32] for n in "qk")
    assert (q @ k.T).abs().max() < 1  # rows have norm one: none is like another


def test_weights_that_fit_have_no_stand_in(source: ModelSource) -> None:
    assert stand_ins(source, MemoryLimit(), CPU) is None
    # A fold is proven with the weights in float32, and in float64 as they are and folded, all there at once.
    all_held = 20 * sum(t.numel() for _, t in named_tensors(source.module) if t.is_meta)
    assert stand_ins(source, MemoryLimit(device=all_held), CPU) is None
    assert stand_ins(source, MemoryLimit(device=all_held - 1), CPU) is not None
    assert stand_ins(open_source(llama()), LITTLE, CPU) is None


def test_a_graph_that_differs_from_the_model_is_noticed(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "stand_ins", stand_ins(source, LITTLE, CPU))
    seen, read = list[str](), source.read
    monkeypatch.setattr(source, "read", lambda name: seen.append(name) or read(name))  # type: ignore[func-returns-value]
    graph = capture(source, ids(), checks={"ids": ids()})
    assert graph.facts
    assert not [name for name in seen if name.endswith("weight")]
    run = Program.run

    def wrong(self: Program, env: Env, *rest: Any) -> None:
        larger = Larger(env)
        run(self, larger, *rest)
        env.update(larger)

    monkeypatch.setattr(Program, "run", wrong)
    with pytest.raises(CaptureError, match="differs from eager execution"):
        capture(source, ids(), checks={"ids": ids()}, rung="torch.export")


class Larger(Env):
    """As if the graph computed something else: what ops compute is a hundredth larger."""

    def __setitem__(self, node: Any, value: Any) -> None:
        larger = isinstance(value, Tensor) and value.is_floating_point()
        super().__setitem__(node, value * 1.01 if larger else value)


def test_a_fold_that_changes_the_function_is_noticed(
    tmp_path: Path, token_ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "source"
    llama().save_pretrained(folder)
    solve = Site.solve
    monkeypatch.setattr(Site, "solve", lambda self, value, divisor: solve(self, value, divisor * 1.001))
    with pytest.raises(VerifyError, match="a scale rule is wrong"):
        compile_to(folder, tmp_path / "out", token_ids, max_memory="40KB")
