"""What the modules that hold packed weights have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from awqc.errors import BackendError
from awqc.quantized import QuantizedWeight
from awqc.runtime.lowering import Lowered

M = TypeVar("M", bound="PackedModule")


class PackedModule(nn.Module):
    """A packed weight as buffers, so that ``state_dict``, ``load_state_dict`` and device moves work.

    The dtypes of packed tensors belong to the packing: ``.half()`` and ``.to(dtype)`` leave them alone, and
    every backend's op takes activations of whatever dtype the model now computes in.

    Args:
        lowered: from :func:`awqc.runtime.lowering.lower_linear`.
    """

    def __init__(self, lowered: Lowered) -> None:
        super().__init__()
        packed = lowered.packed
        self.backend = lowered.backend
        #: Backends that were preferred, each with the reason why it refused.
        self.refused = dict(lowered.refused)
        self.scheme = lowered.shape.scheme
        self.in_features = lowered.shape.in_features
        self.out_features = lowered.shape.out_features
        #: Rows of the weight, of all experts.
        self.rows = self.out_features * (lowered.shape.expert_count or 1)
        for name, tensor in (*packed.tensors.items(), *packed.kept.items()):
            self.register_buffer(name, tensor)
        self._lowered_for = lowered.shape
        self._packed = replace(packed, tensors=dict.fromkeys(packed.tensors), kept={})
        self.notes = packed.notes
        self._kept = tuple(packed.kept)
        #: Dtype of the activations that the weight is multiplied with, which the packing does not depend on.
        self.dtype = lowered.shape.dtype
        self.op = packed.op
        self.constants = packed.constants
        self._names = tuple(packed.tensors)

    def operands(self) -> dict[str, Tensor | None]:
        """The packed tensors that ``op`` takes, in its order, by buffer name; None for an absent bias."""
        return {name: self._buffers[name] for name in self._names}

    @property
    def device(self) -> torch.device:
        """Where it runs; of offloaded weights, where they are brought to."""
        device = next(self.buffers()).device
        hook: Any = self.__dict__.get("_hf_hook")  # accelerate's, of weights that are offloaded
        return device if hook is None or device.type != "meta" else torch.device(hook.execution_device)

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Within the block, offloaded tensors are where they run."""
        if next(self.buffers()).device.type != "meta":
            yield
            return
        from accelerate.utils import align_module_device

        with align_module_device(self):
            yield

    def unpack(self) -> tuple[QuantizedWeight, Tensor | None]:
        """The canonical weight ``(N, K)`` or ``(E, N, K)`` and the bias that were lowered, bit for bit."""
        with self.resident():
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

        like = fn(torch.empty(0, dtype=self.dtype, device=next(self.buffers()).device))
        self._check_move(like.device)
        self.dtype = like.dtype
        return super()._apply(move, recurse)

    def _check_move(self, device: torch.device) -> None:
        """Host memory can keep any packed weight, but another device has to be one that it runs on."""
        if device.type in ("cpu", "meta", self._lowered_for.device.type):
            return
        reason = self.backend.refuses(replace(self._lowered_for, device=device))
        if reason is not None:
            raise BackendError(
                f"weights packed for {self._lowered_for.device} by backend {self.backend.name!r} cannot move "
                f"to {device}: it {reason}; load the checkpoint with device={str(device)!r}"
            )
