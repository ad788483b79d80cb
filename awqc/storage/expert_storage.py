"""The quantized weights of experts on disk: a linear for each of them, as checkpoints have had them always.

Where the float checkpoint has a matrix for every expert, its name is that linear's, and a stack whose rows
come from several matrices (a gate and what it gates) is cut into these. Where the float checkpoint has the
stack itself, expert ``e`` of ``a.b`` becomes the linear ``a.e.b``, and that of ``a.b.weight`` the linear
``a.b.e``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqc.quantized import QuantizedWeight
from awqc.storage.disk_names import Piece, places


@dataclass(frozen=True)
class StoredLinear:
    """Some output channels of one expert, stored as a linear.

    Args:
        name: module name of the linear on disk.
        index: the expert.
        outputs: ``(n,)`` the output channels that it has; None for all of them.
    """

    name: str
    index: int
    outputs: Tensor | None = None


def cut(
    linears: Sequence[StoredLinear], stack: QuantizedWeight
) -> Iterator[tuple[list[str], QuantizedWeight]]:
    """The weights of ``linears`` in ``stack`` ``(E, N, K)``, with their names: at once those that have the
    same output channels of their experts."""
    alike: dict[bytes, list[StoredLinear]] = {}
    for linear in linears:
        key = b"" if linear.outputs is None else linear.outputs.numpy().tobytes()
        alike.setdefault(key, []).append(linear)
    for those in alike.values():
        chosen, outputs = torch.tensor([linear.index for linear in those]), those[0].outputs
        experts, rows = places(chosen), slice(None) if outputs is None else places(outputs)
        codes, scales, zeros = (p[experts][:, rows] for p in (stack.codes, stack.scales, stack.zeros))
        yield [linear.name for linear in those], QuantizedWeight(codes, scales, zeros, stack.scheme)


def stored_linears(pieces: Sequence[Piece], count: int, transposed: bool) -> list[StoredLinear]:
    """The linears that a stack of ``count`` experts is stored as.

    Args:
        pieces: what the float parameter is stored as.
        transposed: whether the parameter is ``(E, K, N)``.
    """
    found = []
    for piece in pieces:
        if piece.index is None or piece.rows is None or piece.columns is None:
            return [StoredLinear(_own_name(piece.name, index), index) for index in range(count)]
        outputs, inputs = (piece.columns, piece.rows) if transposed else (piece.rows, piece.columns)
        if not torch.equal(inputs, torch.arange(len(inputs))):
            # Groups of input channels that share a scale would be torn.
            return [StoredLinear(_own_name(pieces[0].name, index), index) for index in range(count)]
        found.append(StoredLinear(piece.name.removesuffix(".weight"), piece.index, outputs))
    return found


def join(linears: Sequence[StoredLinear], read: Callable[[str], QuantizedWeight]) -> QuantizedWeight:
    """The stack ``(E, N, K)`` that is stored as ``linears``; ``read`` gives a linear's weight by its name."""
    count = 1 + max(linear.index for linear in linears)
    parts: list[list[tuple[StoredLinear, QuantizedWeight]]] = [[] for _ in range(count)]
    for linear in linears:
        parts[linear.index].append((linear, read(linear.name)))
    first = parts[0][0][1]
    rows = sum(weight.out_features for _, weight in parts[0])

    def stacked(part: str) -> Tensor:
        one: Tensor = getattr(first, part)
        whole = one.new_empty(count, rows, one.shape[1])
        for linear, weight in (pair for expert in parts for pair in expert):
            outputs = slice(None) if linear.outputs is None else linear.outputs
            whole[linear.index, outputs] = getattr(weight, part)
        return whole

    return QuantizedWeight(stacked("codes"), stacked("scales"), stacked("zeros"), first.scheme)


def _own_name(name: str, index: int) -> str:
    module, _, part = name.rpartition(".")
    if part == "weight":
        return f"{module}.{index}"
    return f"{module}.{index}.{part}" if module else f"{index}.{part}"
