"""What parameters are stored as: held to what transformers writes itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from awqc.storage.disk_names import Piece, disk_names, match_names, match_stored, read_pieces
from tests.mixtures import EXPERTS, MIXTURES, build


@pytest.fixture(scope="module", params=MIXTURES)
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


def written(model: Any) -> dict[str, Tensor]:
    """What ``save_pretrained`` writes."""
    return dict(revert_weight_conversion(model, dict(model.state_dict())))


def test_pieces_are_the_tensors_that_transformers_writes(model: Any) -> None:
    disk, names = written(model), disk_names(model)
    assert sorted(piece.name for pieces in names.values() for piece in pieces) == sorted(disk)
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        assert torch.equal(read_pieces(names[name], shape, disk.__getitem__), tensor)
        for piece in names[name]:
            assert torch.equal(piece.take(tensor), disk[piece.name])
            assert piece.shape(shape) == tuple(disk[piece.name].shape)


def test_pieces_of_a_model_without_values(model: Any) -> None:
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    expected, found = disk_names(model), disk_names(skeleton)
    assert {name: [p.name for p in pieces] for name, pieces in found.items()} == {
        name: [p.name for p in pieces] for name, pieces in expected.items()
    }


def test_a_module_of_no_library_is_stored_as_it_is() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert disk_names(module) == {name: [Piece(name)] for name in module.state_dict()}


def test_matching_prefers_the_own_name_and_knows_the_prefix_of_a_base_model() -> None:
    model = build("mixtral")
    stack, gate = "model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.gate.weight"
    disk = [name.removeprefix("model.") for name in written(model)]
    found = match_stored([stack, gate, "model.norm.weight", "no.such.weight"], model, disk, {})
    assert [piece.name for piece in found[stack]] == [
        f"layers.0.block_sparse_moe.experts.{e}.w2.weight" for e in range(EXPERTS)
    ]
    assert found[gate] == [Piece("layers.0.block_sparse_moe.gate.weight")]
    assert found["model.norm.weight"] == [Piece("norm.weight")]
    assert "no.such.weight" not in found
    assert match_stored([stack], model, [stack], {}) == {stack: [Piece(stack)]}
    assert match_stored([stack], model, disk[:-1] if "w2" in disk[-1] else [], {}) == {}


def test_names_of_tied_tensors_and_prefixes() -> None:
    found = match_names(["a.weight", "m.b", "c"], ["x.weight", "b", "m.c"], "m", {"x.weight": "a.weight"})
    assert found == {"a.weight": "x.weight", "m.b": "b", "c": "m.c"}


@pytest.mark.parametrize("rows", [[2, 0], [1, 2]])
@pytest.mark.parametrize("columns", [[1, 3, 0], [1, 2, 3]])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_piece_of_a_stack(rows: list[int], columns: list[int], transposed: bool) -> None:
    piece = Piece("x", 1, torch.tensor(rows), torch.tensor(columns), transposed)
    stack = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    taken, expected = piece.take(stack), stack[1][rows][:, columns]
    assert torch.equal(taken, expected.T if transposed else expected)
    assert piece.shape((2, 3, 4)) == tuple(taken.shape)
    empty = torch.full_like(stack, -1)
    piece.put(empty, taken)
    assert torch.equal(piece.take(empty), taken)
    assert int((empty == -1).sum()) == 24 - 6
