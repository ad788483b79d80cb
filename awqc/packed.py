"""What the modules that hold packed weights have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from awqc.lowering import Lowered
from awqc.quantized import QuantizedWeight

M = TypeVar("M", bound="PackedModule")


class PackedModule(nn.Module):
    """A packed weight as buffers, so that ``state_dict``, ``load_state_dict`` and device moves work.

    The dtypes of packed tensors belong to the packing: ``.half()`` and ``.to(dtype)`` leave them alone, and
    every backend's op takes activations of whatever dtype the model now computes in.

    Args:
        lowered: from :func:`awqc.lowering.lower_linear`.
    """

    def __init__(self, lowered: Lowered) -> None:
        super().__init__()
        packed = lowered.packed
        self.backend = lowered.backend
        self.scheme = lowered.shape.scheme
        self.in_features = lowered.shape.in_features
        self.out_features = lowered.shape.out_features
        #: Rows of the weight, of all experts.
        self.rows = self.out_features * (lowered.shape.expert_count or 1)
        for name, tensor in (*packed.tensors.items(), *packed.kept.items()):
            self.register_buffer(name, tensor)
        self._lowered_for = lowered.shape
        self._packed = replace(packed, tensors=dict.fromkeys(packed.tensors), kept={})
        self._kept = tuple(packed.kept)
        #: Dtype of the activations that the weight is multiplied with, which the packing does not depend on.
        self.dtype = lowered.shape.dtype
        self.op = packed.op
        self.constants = packed.constants
        self._names = tuple(packed.tensors)

    def operands(self) -> dict[str, Tensor | None]:
        """The packed tensors that ``op`` takes, in its order, by buffer name; None for an absent bias."""
        return {name: self._buffers[name] for name in self._names}

    def unpack(self) -> tuple[QuantizedWeight, Tensor | None]:
        """The canonical weight ``(N, K)`` or ``(E, N, K)`` and the bias that were lowered, bit for bit."""
        packed = replace(
            self._packed,
            tensors={name: self._buffers[name] for name in self._names},
            kept={name: self.get_buffer(name) for name in self._kept},
        )
        return self.backend.unpack(packed, self._lowered_for)

    def _apply(self: M, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> M:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=next(self.buffers()).device)).dtype
        return super()._apply(move, recurse)
