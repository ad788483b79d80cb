"""Which tensors of a checkpoint a parameter is stored as, where its module has fused or renamed them.

transformers stacks the weights of experts when it loads a checkpoint, and takes them apart when it saves one.
What it does is found out by doing it: tensors of numbers, each element its own place, are sent the way of
saving, and say where everything came to lie.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

#: The size to which a dimension whose places are not asked for is cut, so that halves can be taken of it, of
#: which some releases of transformers would drop a dimension of size one.
_CUT = 4


@dataclass(frozen=True)
class Piece:
    """A tensor on disk that holds some of a parameter.

    Args:
        name: on disk.
        index: of a stack ``(E, A, B)``: which matrix; None where the tensor on disk is the whole parameter.
        rows, columns: of that matrix, which elements of its two dimensions.
        transposed: whether the tensor on disk is ``(B, A)``.
    """

    name: str
    index: int | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    transposed: bool = False

    def take(self, parameter: Tensor) -> Tensor:
        """The tensor on disk for a value of the parameter."""
        if self.index is None or self.rows is None or self.columns is None:
            return parameter
        taken = parameter[self.index][places(self.rows)][:, places(self.columns)]
        return taken.T if self.transposed else taken

    def shape(self, parameter: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor on disk for a parameter of this shape."""
        if self.rows is None or self.columns is None:
            return parameter
        shape = len(self.rows), len(self.columns)
        return shape[::-1] if self.transposed else shape

    def put(self, parameter: Tensor, value: Tensor) -> None:
        """Write ``value``, read from disk, to its places of ``parameter``."""
        if self.index is None or self.rows is None or self.columns is None:
            parameter.copy_(value)
        else:
            matrix, rows, columns = parameter[self.index], places(self.rows), places(self.columns)
            value = (value.T if self.transposed else value).to(parameter.dtype)
            if isinstance(rows, Tensor) and isinstance(columns, Tensor):
                matrix[rows[:, None], columns] = value
            else:
                matrix[rows, columns] = value


def places(numbers: Tensor) -> slice | Tensor:
    """``numbers`` as an index; consecutive ones as a slice, which is copied many times faster."""
    first, count = int(numbers[0]), len(numbers)
    run = torch.equal(numbers, torch.arange(first, first + count))
    return slice(first, first + count) if run else numbers


def disk_names(module: nn.Module) -> dict[str, list[Piece]]:
    """Parameter or buffer name -> what it is stored as, for all that is stored whole or cut up.

    What is stored in another way (reshaped, merged with others) is left out. Modules that are no models of
    transformers are stored under their own names.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict(keep_vars=True).items()}
    if not hasattr(module, "config") or not hasattr(module, "save_pretrained"):
        return {name: [Piece(name)] for name in shapes}
    bases, sizes, total = [], [], 0
    for shape in shapes.values():
        bases.append(total)
        sizes.append(max(shape[0] * shape[1], shape[2]) if len(shape) == 3 else 1)
        total += sizes[-1]
    names = list(shapes)

    def numbered(along: Callable[[tuple[int, ...], int], Tensor]) -> dict[str, Tensor]:
        # Expanded from little: a model's worth of numbers would not fit.
        return {
            name: along(shape, base) if len(shape) == 3 else torch.tensor(base).expand(shape)
            for (name, shape), base in zip(shapes.items(), bases, strict=True)
        }

    stored_rows = _on_the_way_to_disk(module, numbered(_rows))
    stored_columns = _on_the_way_to_disk(module, numbered(_columns))
    found: dict[str, list[Piece]] = {}
    for disk, rows in stored_rows.items():
        if not rows.numel():
            continue
        at = bisect_right(bases, int(rows[(0,) * rows.ndim])) - 1
        name, base = names[at], bases[at]
        if len(shapes[name]) != 3:
            piece = Piece(disk) if tuple(rows.shape) == shapes[name] else None
        else:
            piece = _piece(disk, rows - base, stored_columns[disk] - base, shapes[name], sizes[at])
        if piece is not None:
            found.setdefault(name, []).append(piece)
    return {name: pieces for name, pieces in found.items() if _complete(pieces, shapes[name])}


def read_pieces(pieces: list[Piece], shape: tuple[int, ...], get: Callable[[str], Tensor]) -> Tensor:
    """The parameter of ``shape`` that is stored as ``pieces``; ``get`` reads a tensor by its name on disk."""
    if len(pieces) == 1 and pieces[0].index is None:
        return get(pieces[0].name)
    value = torch.empty(0)
    for number, piece in enumerate(pieces):
        stored = get(piece.name)
        if number == 0:
            value = stored.new_empty(shape)
        piece.put(value, stored)
    return value


def match_stored(
    wanted: list[str],
    module: nn.Module,
    on_disk: list[str],
    tied: Mapping[str, str],
    saved_as: Callable[[nn.Module], dict[str, list[Piece]]] = disk_names,
) -> dict[str, list[Piece]]:
    """Name of a parameter of ``module`` -> what it is stored as among ``on_disk``, for all of ``wanted`` that
    can be found under their own names or those that transformers would save them as (``saved_as``)."""
    prefix = getattr(module, "base_model_prefix", "")
    found = {name: [Piece(disk)] for name, disk in match_names(wanted, on_disk, prefix, tied).items()}
    if len(found) < len(wanted):
        saved = saved_as(module)
        pieces = [piece.name for name in wanted if name not in found for piece in saved.get(name, ())]
        matched = match_names(pieces, on_disk, prefix, {})
        for name in wanted:
            if name not in found and name in saved and all(p.name in matched for p in saved[name]):
                found[name] = [replace(piece, name=matched[piece.name]) for piece in saved[name]]
    return found


def match_names(
    wanted: list[str], on_disk: list[str], prefix: str, tied: Mapping[str, str]
) -> dict[str, str]:
    """Parameter name -> stored name: equal, or with the base model's prefix left out or put in front, or
    stored under another name of a tied tensor."""
    there = set(on_disk)
    names: dict[str, list[str]] = {name: [name] for name in wanted}
    for other, first in tied.items():
        if first in names:
            names[first].append(other)
    found = {}
    for name, spellings in names.items():
        for spelling in spellings:
            variants = [spelling, f"{prefix}.{spelling}", spelling.removeprefix(f"{prefix}.")]
            match = next((v for v in variants if v in there), None)
            if match is not None:
                found[name] = match
                break
    return found


def _on_the_way_to_disk(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(module, state))


def _rows(shape: tuple[int, ...], base: int = 0) -> Tensor:
    """The number of each row of a stack ``(E, A, B)`` above ``base``, ``B`` cut."""
    count, rows, columns = shape
    numbers = torch.arange(base, base + count * rows, dtype=torch.int32).view(count, rows, 1)
    return numbers.expand(count, rows, min(columns, _CUT))


def _columns(shape: tuple[int, ...], base: int = 0) -> Tensor:
    """The number of each column of a stack ``(E, A, B)`` above ``base``, ``A`` cut."""
    count, rows, columns = shape
    return torch.arange(base, base + columns, dtype=torch.int32).expand(count, min(rows, _CUT), columns)


def _piece(name: str, rows: Tensor, columns: Tensor, shape: tuple[int, ...], size: int) -> Piece | None:
    """What the numbers that came out under ``name`` say of a stack of ``shape``; None if nothing, as where
    other numbers than its own, which are below ``size``, are among them."""
    if int(rows.max()) >= size:
        return None
    if rows.ndim == 3:
        same = torch.equal(rows, _rows(shape)) and torch.equal(columns, _columns(shape))
        return Piece(name) if same else None
    if rows.ndim != 2 or columns.ndim != 2:
        return None
    # Along one of its dimensions the tensor moves through rows, along the other through columns.
    transposed = bool((rows[:1] != rows[:1, :1]).any()) or bool((columns[:, :1] != columns[:1, :1]).any())
    rows, columns = (rows[0], columns[:, 0]) if transposed else (rows[:, 0], columns[0])
    rows, columns = rows.long(), columns.long()
    indices = rows // shape[1]
    if bool((indices != indices[0]).any()):
        return None
    return Piece(name, int(indices[0]), rows % shape[1], columns, transposed)


def _complete(pieces: list[Piece], shape: tuple[int, ...]) -> bool:
    """Whether every element of a parameter is in one of ``pieces``, once."""
    if len(pieces) == 1 and pieces[0].index is None:
        return True
    counts = torch.zeros(shape[0], dtype=torch.int64)
    places = set()
    for piece in pieces:
        if piece.index is None or piece.rows is None or piece.columns is None:
            return False
        counts[piece.index] += len(piece.rows) * len(piece.columns)
        places.add((piece.index, int(piece.rows[0]), int(piece.columns[0])))
    return len(places) == len(pieces) and bool((counts == shape[1] * shape[2]).all())
