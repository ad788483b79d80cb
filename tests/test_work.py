"""Amounts of work, against counts by hand."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awqc.capture import capture
from awqc.storage.source import from_module
from awqc.views import linears
from awqc.work import Work, matrices_of, rows, run, weights_read

B, T, K, N, HEADS = 2, 6, 8, 12, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(K, K, bias=False), nn.Linear(K, N)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(B, T, HEADS, K // HEADS).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(B, T, K)
        return self.o(y).relu()


def test_products_are_counted_by_their_shapes() -> None:
    graph = capture(from_module(Attention()), {"x": torch.zeros(B, T, K)})
    work = run(graph.nodes, rounded=True)
    assert work["rounded"] == 2 * B * T * K * (K + N)
    assert work["flops"] == 2 * 2 * B * HEADS * T * T * (K // HEADS)
    # Scores six times, and what relu reads and writes; views move nothing.
    assert work["moved"] == 6 * 4 * B * HEADS * T * T + 2 * 4 * B * T * N
    assert run(graph.nodes, rounded=False)["flops"] == work["flops"] + work["rounded"]
    assert weights_read(graph.nodes) == Work(streamed=30 * K * (K + N))
    views = list(linears(graph))
    assert [(rows(view), matrices_of(view)) for view in views] == [(B * T, 1)] * 2


def test_experts_count_every_row_once() -> None:
    from awqc.config import QuantConfig
    from awqc.context import Context
    from awqc.driver import analysis_pipeline
    from awqc.views import expert_linears
    from tests import mixtures

    model = mixtures.build("mixtral")
    graph = capture(from_module(model), {"input_ids": mixtures.token_ids(1, 1, 16)}, torch.float32)
    analysis_pipeline().run(graph, Context(QuantConfig()))
    stacks = list(expert_linears(graph))
    chosen = model.config.num_experts_per_tok
    assert {rows(view) for view in stacks} == {16 * chosen}
    assert {matrices_of(view) for view in stacks} == {model.config.num_local_experts}
