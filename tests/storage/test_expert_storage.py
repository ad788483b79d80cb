"""Stacks as linears and back."""

from __future__ import annotations

import pytest
import torch

from awqc.quantized import QuantizedWeight, Scheme, quantize, stack
from awqc.storage.disk_names import Piece
from awqc.storage.expert_storage import StoredLinear, cut, join, stored_linears

E, N, K = 2, 8, 32
ALL = torch.arange(K)


def weights() -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    return stack([quantize(torch.randn(N, K, generator=generator), Scheme(4, 16)) for _ in range(E)])


def halves(transposed: bool) -> list[Piece]:
    """A gate of even rows and what it gates, of odd ones, as a float checkpoint has them."""
    found = []
    for part, first in (("gate", 0), ("up", 1)):
        rows = torch.arange(first, N, 2)
        for e in range(E):
            axes = (ALL, rows) if transposed else (rows, ALL)
            found.append(Piece(f"moe.{e}.{part}.weight", e, *axes, transposed=transposed))
    return found


def apart(linears: list[StoredLinear], whole: QuantizedWeight) -> dict[str, QuantizedWeight]:
    """Each of ``linears`` by its name."""
    return {
        name: QuantizedWeight(several.codes[e], several.scales[e], several.zeros[e], several.scheme)
        for names, several in cut(linears, whole)
        for e, name in enumerate(names)
    }


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_is_cut_as_the_float_checkpoint_cuts_it(transposed: bool) -> None:
    whole = weights()
    linears = stored_linears(halves(transposed), E, transposed)
    assert [linear.name for linear in linears] == ["moe.0.gate", "moe.1.gate", "moe.0.up", "moe.1.up"]
    assert [names for names, _ in cut(linears, whole)] == [
        ["moe.0.gate", "moe.1.gate"],
        ["moe.0.up", "moe.1.up"],
    ]
    stored = apart(linears, whole)
    assert torch.equal(stored["moe.1.up"].codes, whole.codes[1, 1::2])
    assert torch.equal(stored["moe.1.up"].scales, whole.scales[1, 1::2])
    assert torch.equal(stored["moe.0.gate"].zeros, whole.zeros[0, 0::2])
    again = join(linears, stored.__getitem__)
    assert all(torch.equal(getattr(again, p), getattr(whole, p)) for p in ("codes", "scales", "zeros"))
    assert again.scheme == whole.scheme


@pytest.mark.parametrize(
    ("name", "expected"),
    [("moe.stacked", "moe.1.stacked"), ("moe.stacked.weight", "moe.stacked.1"), ("stacked", "1.stacked")],
)
def test_names_where_the_float_checkpoint_has_the_stack(name: str, expected: str) -> None:
    whole = weights()
    linears = stored_linears([Piece(name)], E, False)
    assert linears[1] == StoredLinear(expected, 1)
    stored = apart(linears, whole)
    assert torch.equal(join(linears, stored.__getitem__).codes, whole.codes)


def test_groups_of_input_channels_are_not_torn() -> None:
    """A float checkpoint that cuts or permutes inputs has no linears that quantized groups would fit."""
    shuffled = [Piece(f"moe.{e}.weight", e, torch.arange(N), ALL.flip(0)) for e in range(E)]
    assert [linear.name for linear in stored_linears(shuffled, E, False)] == ["moe.0.0", "moe.0.1"]
