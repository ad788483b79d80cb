"""Parameters by name: read on demand, changed in place of the source, never the source itself.

A graph refers to parameters by name only. What a name stands for is decided here: the tensor that the
source holds, the tensor that a pass has put there, or the quantized weight it was rounded to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from awqc.errors import NonFiniteError
from awqc.quantized import QuantizedWeight

#: Reads the source tensor of a name.
Read = Callable[[str], Tensor]


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


class Weights:
    """The current value of every parameter and buffer of a graph.

    Args:
        names: all names, in the order of the model.
        read: gives the source tensor of a name; called when the value is first needed.
        dtype: floating-point tensors are handed out in this dtype; None keeps the source's.
        device: where values are handed out.
        aliases: other names of a tied tensor -> the name used in the graph.

    Reading a parameter that holds NaN or Inf raises :class:`NonFiniteError`.
    """

    def __init__(
        self,
        names: Iterable[str],
        read: Read,
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str = "cpu",
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self.names = list(names)
        self.dtype, self.device = dtype, torch.device(device)
        self.aliases = dict(aliases or {})
        self.version = 0
        self._read = read
        self._changed: dict[str, Tensor | Rounded] = {}
        self._resident: dict[str, Tensor] = {}
        self._finite: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._resident:
            value = self._changed.get(name)
            if isinstance(value, Rounded):
                value = value.dense()
            elif value is None:
                value = self._checked(name, self._read(name))
            self._resident[name] = self._place(value)
        return self._resident[name]

    def __setitem__(self, name: str, value: Tensor | Rounded) -> None:
        self._changed[name] = value
        self._resident.pop(name, None)
        self.version += 1

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def rounded(self, name: str) -> Rounded | None:
        """The quantized weight behind ``name``, if it has been rounded."""
        value = self._changed.get(name)
        return value if isinstance(value, Rounded) else None

    def changed(self) -> dict[str, Tensor | Rounded]:
        """Everything that differs from the source, by name."""
        return dict(self._changed)

    def release(self, keep: Iterable[str] = ()) -> None:
        """Forget handed-out values except ``keep``; they are read or dequantized again when needed."""
        kept = set(keep)
        self._resident = {name: value for name, value in self._resident.items() if name in kept}

    def like(self, dtype: torch.dtype | None) -> Weights:
        """A scratch copy of the current values in ``dtype`` (None keeps each one's own): changes to it do
        not reach this one."""
        copy = Weights(self.names, self._read, dtype, self.device, self.aliases)
        copy._changed = dict(self._changed)
        copy._finite = self._finite
        if dtype == self.dtype:
            copy._resident = dict(self._resident)
        return copy

    def _place(self, value: Tensor) -> Tensor:
        if value.is_floating_point() and self.dtype is not None:
            return value.to(self.device, self.dtype)
        return value.to(self.device)

    def _checked(self, name: str, value: Tensor) -> Tensor:
        if name in self._finite:
            return value
        # A NaN or Inf anywhere makes the sum non-finite: one pass, and a mask only when in doubt, since
        # sums of finite values can overflow too.
        suspect = value.is_floating_point() and not bool(torch.isfinite(value.sum(dtype=torch.float32)))
        bad = (~torch.isfinite(value)).nonzero() if suspect else torch.empty(0)
        if len(bad):
            raise NonFiniteError(
                f"parameter {name!r} holds {len(bad)} NaN or Inf value(s), the first at index "
                f"{tuple(bad[0].tolist())}: the checkpoint is damaged or was trained into overflow; "
                "repair the weight or use another checkpoint"
            )
        self._finite.add(name)
        return value
