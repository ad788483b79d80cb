"""What tracing leaves out, and that all is as before after it."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from awqc.capture.tracing import quick_tracing


def test_a_graph_is_code_when_it_is_called() -> None:
    """Graphs made and changed within the block compute what they should, there and after it."""
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    with quick_tracing():
        program = torch.export.export(model, (x,), strict=False)
        plain = fx.symbolic_trace(nn.Sequential(model, nn.ReLU()))
        (relu,) = (node for node in plain.graph.nodes if node.target == "1")
        relu.replace_all_uses_with(relu.args[0])
        plain.graph.erase_node(relu)
        plain.recompile()
        assert torch.equal(plain(x), model(x))
    assert torch.equal(program.module()(x), model(x))
    assert torch.equal(plain(x), model(x))
    assert "linear" in program.graph_module.print_readable(print_output=False)


def test_all_is_as_before_after_a_failure() -> None:
    before, traceback = fx.GraphModule.recompile, vars(fx.proxy)["CapturedTraceback"]
    assert gc.isenabled()

    def failing(x: torch.Tensor) -> torch.Tensor:
        assert not gc.isenabled()
        raise ValueError("within")

    with pytest.raises(ValueError, match="within"), quick_tracing():
        make_fx(failing)(torch.ones(2))
    assert gc.isenabled()
    assert fx.GraphModule.recompile is before
    assert vars(fx.proxy)["CapturedTraceback"] is traceback
    made = make_fx(torch.sin)(torch.ones(2))
    assert "sin" in made.code
