"""A store of weights on disk: what finished stages have left, the newest of every name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from awqc.checkpoints.packing import pack_bits, unpack_bits
from awqc.checkpoints.tensors import TensorInfo, read_tensor
from awqc.journal.entry import Entry
from awqc.quantized import QuantizedWeight, Scheme
from awqc.weights import Memory, Rounded

#: What tensors of an entry are, in front of their names: tensors of quantized weights, dense tensors, and
#: dense tensors as they were when the tokens moved on.
CODES, SCALES, ZEROS, DENSE, MOVED = "codes:", "scales:", "zeros:", "dense:", "moved:"


@dataclass(frozen=True)
class _Place:
    """Where the newest value of a name is; a dense tensor has neither scheme nor shape.

    Args:
        tensors: by what they are, :data:`CODES` and so on.
        scheme, shape: of a quantized weight, the shape that of its codes.
        transposed: see :class:`awqc.weights.Rounded`.
    """

    tensors: Mapping[str, TensorInfo]
    scheme: Scheme | None = None
    shape: tuple[int, ...] = ()
    transposed: bool = False


class JournalStore:
    """Changed weights: those of finished stages on disk, those of the current stage in memory.

    Args:
        base: what was changed before the first stage; it stays in memory.
        device: where quantized weights are handed out.
    """

    def __init__(self, base: Memory, device: torch.device) -> None:
        self._base, self._device = base, device
        self.pending = Memory()
        #: What is being written, and by then in an entry.
        self._written = Memory()
        self._places: dict[str, _Place] = {}
        #: Codes that were handed out and are still in use: a fold into a rounded weight keeps them.
        self._codes: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    def __getitem__(self, name: str) -> Tensor | Rounded:
        if name in self.pending:
            return self.pending[name]
        if name in self._written:
            value = self._written[name]
        elif name in self._places:
            value = self._load(name)
        else:
            return self._base[name]
        if isinstance(value, Rounded):
            self._codes[name] = value.weight.codes
        return value

    def __setitem__(self, name: str, value: Tensor | Rounded) -> None:
        self.pending[name] = value

    def __contains__(self, name: object) -> bool:
        return any(name in part for part in (self.pending, self._written, self._places, self._base))

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._base, *self._places, *self._written, *self.pending)))

    def scheme(self, name: str) -> Scheme | None:
        """See :class:`awqc.weights.Store`."""
        for memory in (self.pending, self._written):
            if name in memory:
                return memory.scheme(name)
        return self._places[name].scheme if name in self._places else self._base.scheme(name)

    def copy(self) -> JournalStore:
        """See :class:`awqc.weights.Store`."""
        copy = JournalStore(self._base.copy(), self._device)
        copy.pending, copy._written = self.pending.copy(), self._written.copy()
        copy._places = dict(self._places)
        return copy

    # -- between stages ----------------------------------------------------------------------------------

    def take(self, moved: Mapping[str, Tensor | Rounded]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything pending as a record and tensors on the CPU; from here on it counts as written.

        Args:
            moved: what was pending when the tokens moved on. If that is not all, the record says of what the
                final value was there then (``early``), and earlier values are among the tensors.
        """
        rounded: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for name, value in self.pending.items():
            if isinstance(value, Tensor):
                tensors[DENSE + name] = _own(value)
                continue
            weight = value.weight
            rounded[name] = {
                "scheme": asdict(weight.scheme),
                "shape": list(weight.codes.shape),
                "transposed": value.transposed,
            }
            tensors[SCALES + name] = _own(weight.scales)
            if self._codes.get(name) is not weight.codes:
                codes = weight.codes.flatten(0, -2)
                tensors[CODES + name] = _own(pack_bits(codes, weight.scheme.bits))
                tensors[ZEROS + name] = _own(weight.zeros)
        for name, value in moved.items():
            if value is not self.pending.get(name):
                dense = value if isinstance(value, Tensor) else value.dense()
                tensors[MOVED + name] = _own(dense)
        final = [name for name, value in self.pending.items() if moved.get(name) is value]
        early = None if len(final) == len(self.pending) else final
        self._written, self.pending = self.pending, Memory()
        self._codes.clear()
        return {"rounded": rounded, "early": early}, tensors

    def add(self, entry: Entry, only: Collection[str] | None = None) -> None:
        """Let the tensors of ``entry``, or those of some names, be the newest."""
        rounded = entry.record["rounded"]
        for name, said in rounded.items():
            if only is not None and name not in only:
                continue
            old = self._places[name].tensors if name in self._places else {}
            new = {k: entry.tensors[k + name] for k in (CODES, SCALES, ZEROS) if k + name in entry.tensors}
            self._places[name] = _Place(
                {**old, **new}, Scheme(**said["scheme"]), tuple(said["shape"]), said["transposed"]
            )
        for key, info in entry.tensors.items():
            name = key.removeprefix(DENSE)
            if key.startswith(DENSE) and (only is None or name in only):
                self._places[name] = _Place({DENSE: info})
        self._written = Memory()

    def _load(self, name: str) -> Tensor | Rounded:
        place = self._places[name]
        if place.scheme is None:
            return read_tensor(place.tensors[DENSE]).to(self._device)
        packed, scales, zeros = (
            read_tensor(place.tensors[part]).to(self._device) for part in (CODES, SCALES, ZEROS)
        )
        codes = unpack_bits(packed, place.scheme.bits, place.shape[-1]).view(place.shape)
        return Rounded(QuantizedWeight(codes, scales, zeros, place.scheme), place.transposed)


def moved(entry: Entry) -> Iterable[tuple[str, Tensor]]:
    """The weights with which the tokens have moved on in a stage, where others took their places later."""
    for key, info in entry.tensors.items():
        if key.startswith(MOVED):
            yield key.removeprefix(MOVED), read_tensor(info)


def _own(tensor: Tensor) -> Tensor:
    """On the CPU, in memory of its own."""
    found = tensor.detach().to("cpu").contiguous()
    return found.clone() if found.data_ptr() == tensor.data_ptr() else found
