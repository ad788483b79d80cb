"""Parameters by name: read on demand, changed in place of the source, never the source itself.

A graph refers to parameters by name only. What a name stands for is decided here: the tensor that the
source holds, the tensor that a pass has put there, or the quantized weight it was rounded to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from awqc.checkpoints.tensors import page_locked
from awqc.errors import NonFiniteError
from awqc.quantized import QuantizedWeight, Scheme

#: Reads the source tensor of a name.
Read = Callable[[str], Tensor]
#: Gives a made-up tensor for a name, in a dtype; the caller's own.
StandIns = Callable[[str, "torch.dtype | None"], Tensor]
#: A tensor of a quantized weight.
Field = Literal["codes", "scales", "zeros"]

#: Threads that read ahead.
_READERS = ThreadPoolExecutor(2, thread_name_prefix="read")


@dataclass(frozen=True)
class Rounded:
    """A quantized weight ``(N, K)`` behind a parameter that the model may store as ``(K, N)``; of experts
    ``(E, N, K)``, stored as that or as ``(E, K, N)``."""

    weight: QuantizedWeight
    transposed: bool = False

    def dense(self) -> Tensor:
        """The float32 value in the layout of the parameter."""
        value = self.weight.dequantize()
        return value.mT if self.transposed else value

    def to(self, device: torch.device | str) -> Rounded:
        """The same on another device."""
        return Rounded(self.weight.to(device), self.transposed)


class Store(Protocol):
    """Where what passes have changed is kept: in memory, or in a journal on disk."""

    def __getitem__(self, name: str) -> Tensor | Rounded: ...

    def __setitem__(self, name: str, value: Tensor | Rounded) -> None: ...

    def __contains__(self, name: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def scheme(self, name: str) -> Scheme | None:
        """The scheme of a quantized weight, without reading it; None for anything else."""
        ...

    def copy(self) -> Store:
        """The same values; changes to either do not reach the other."""
        ...


class Memory(dict[str, "Tensor | Rounded"]):
    """The store that holds all values."""

    def scheme(self, name: str) -> Scheme | None:
        """See :class:`Store`."""
        value = self.get(name)
        return value.weight.scheme if isinstance(value, Rounded) else None

    def copy(self) -> Memory:
        """See :class:`Store`."""
        return Memory(self)


class Weights:
    """The current value of every parameter and buffer of a graph.

    Args:
        names: all names, in the order of the model.
        read: gives the source tensor of a name; called when the value is first needed.
        dtype: floating-point tensors are handed out in this dtype; None keeps the source's.
        device: where values are handed out.
        aliases: other names of a tied tensor -> the name used in the graph.
        buffers: names of tensors that are no parameters: masks, bounds and the like.

    Reading a parameter that holds NaN or Inf raises :class:`NonFiniteError`; a buffer may hold them.

    Attributes:
        stand_ins: gives values for checks of whole graphs where the true ones do not fit; see
            :mod:`awqc.made_up`.
        streamed: whether values are dropped after the last op that reads them.
    """

    def __init__(
        self,
        names: Iterable[str],
        read: Read,
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str = "cpu",
        aliases: Mapping[str, str] | None = None,
        buffers: Iterable[str] = (),
    ) -> None:
        self.names = list(names)
        self.dtype, self.device = dtype, torch.device(device)
        self.aliases = dict(aliases or {})
        self.version = 0
        self.stand_ins: StandIns | None = None
        self.streamed = False
        self._read = read
        self._changed: Store = Memory()
        self._parts: dict[str, tuple[str, Field]] = {}
        self._resident: dict[str, Tensor] = {}
        self._coming: dict[str, Future[Tensor]] = {}
        self._finite: set[str] = set(buffers)
        self._folds: dict[str, list[Callable[[Tensor], Tensor]]] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._resident:
            held = self._held(name)
            if held is None:
                found = self._checked(name, self._place(self._source(name, self._fetch)))
            else:
                found = self._place(held.dense() if isinstance(held, Rounded) else held)
            for fold in self._folds.get(name, ()):
                found = fold(found)
            self._resident[name] = found
        return self._resident[name]

    def value(self, name: str) -> Tensor | Rounded:
        """What ``name`` stands for, as it is kept: in the dtype and on the device of the source or of the
        pass that put it there, and not held on to."""
        held = self._held(name)
        return self._checked(name, self._source(name, self._read)) if held is None else held

    def _held(self, name: str) -> Tensor | Rounded | None:
        """What a pass has put there, None where the source's value stands."""
        if name in self._changed:
            return self._changed[name]
        if name not in self._parts:
            return None
        parameter, field = self._parts[name]
        rounded = self.rounded(parameter)
        assert rounded is not None
        part: Tensor = getattr(rounded.weight, field)
        return part

    def _source(self, name: str, read: Read) -> Tensor:
        coming = self._coming.pop(name, None)
        return read(name) if coming is None else coming.result()

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to read source tensors that are needed soon, in the background."""
        for name in names:
            if name not in self._changed and name not in self._resident and name not in self._coming:
                self._coming[name] = _READERS.submit(self._fetch, name)

    def _fetch(self, name: str) -> Tensor:
        with page_locked(self.device):
            return self._read(name)

    def __setitem__(self, name: str, value: Tensor | Rounded) -> None:
        self._changed[name] = value
        self._resident.pop(name, None)
        self.version += 1

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def rounded(self, name: str) -> Rounded | None:
        """The quantized weight behind ``name``, if it has been rounded."""
        if self._changed.scheme(name) is None:
            return None
        value = self._changed[name]
        assert isinstance(value, Rounded)
        return value

    def scheme(self, name: str) -> Scheme | None:
        """The scheme of the quantized weight behind ``name``, None if it has not been rounded; the weight is
        not read."""
        return self._changed.scheme(name)

    def add_part(self, name: str, parameter: str, field: Field) -> None:
        """Let ``name`` stand for one tensor of the quantized weight behind ``parameter``."""
        if name not in self._parts:
            self._parts[name] = parameter, field
            self.names.append(name)
            self.version += 1

    def keep_in(self, store: Store) -> None:
        """From now on keep changes in ``store``, which holds those made so far."""
        self._changed = store

    def changed(self) -> dict[str, Tensor | Rounded]:
        """Everything that differs from the source, by name, read whole."""
        return {name: self._changed[name] for name in self._changed}

    def release(self, keep: Iterable[str] = ()) -> None:
        """Forget handed-out values except ``keep``; they are read or dequantized again when needed."""
        kept = set(keep)
        self._resident = {name: value for name, value in self._resident.items() if name in kept}

    def change(self, name: str, fold: Callable[[Tensor], Tensor]) -> None:
        """Replace the value of ``name`` by ``fold`` of a copy, which it may overwrite: now, or of streamed
        weights when it is read, which are the reader's own."""
        if self.streamed:
            self._folds.setdefault(name, []).append(fold)
            self._resident.pop(name, None)
        else:
            self[name] = fold(self[name].clone())

    def drop(self, name: str) -> None:
        """Forget the value handed out for ``name``, if weights are streamed."""
        if self.streamed:
            self._resident.pop(name, None)

    def forget(self, names: Iterable[str]) -> None:
        """What was handed out for ``names`` is not what they stand for any more."""
        for name in names:
            self._resident.pop(name, None)
        self.version += 1

    def like(self, dtype: torch.dtype | None) -> Weights:
        """A scratch copy of the current values in ``dtype`` (None keeps each one's own): changes to it do
        not reach this one."""
        copy = Weights(self.names, self._read, dtype, self.device, self.aliases)
        copy._changed = self._changed.copy()
        copy._parts = dict(self._parts)
        copy._finite = self._finite
        copy._folds = {name: list(folds) for name, folds in self._folds.items()}
        copy.stand_ins, copy.streamed = self.stand_ins, self.streamed
        if dtype == self.dtype:
            copy._resident = dict(self._resident)
        return copy

    def for_checks(self) -> Weights:
        """What whole graphs are run on to compare them: these, or where they do not fit, made-up ones."""
        if self.stand_ins is None or self.streamed:
            return self
        copy = self.like(self.dtype)
        made_up, dtype = self.stand_ins, self.dtype
        copy._read, copy.streamed, copy._finite = lambda n: made_up(n, dtype), True, set(self.names)
        copy._resident = {}
        return copy

    def _place(self, value: Tensor) -> Tensor:
        # Two steps: what is sent to a device is as narrow as it is stored, and is widened there.
        value = value.to(self.device, non_blocking=True)
        return value.to(self.dtype) if value.is_floating_point() and self.dtype is not None else value

    def _checked(self, name: str, value: Tensor) -> Tensor:
        if name in self._finite or value.is_meta:
            return value
        bad = torch.empty(0) if _is_finite(value) else (~torch.isfinite(value)).nonzero()
        if len(bad):
            raise NonFiniteError(
                f"parameter {name!r} holds {len(bad)} NaN or Inf value(s), the first at index "
                f"{tuple(bad[0].tolist())}: the checkpoint is damaged or was trained into overflow; "
                "repair the weight or use another checkpoint"
            )
        self._finite.add(name)
        return value


def _is_finite(value: Tensor) -> bool:
    """Whether ``value`` holds neither NaN nor Inf: extremes take one pass and no copy."""
    if not value.is_floating_point() or value.numel() == 0:
        return True
    if value.element_size() < 2:  # there are no extremes of 8-bit numbers
        return bool(torch.isfinite(value.float()).all())
    least, most = torch.aminmax(value)
    return bool(torch.isfinite(least) & torch.isfinite(most))
