"""Sums that blocks of one launch leave for each other in device memory, and the flags that say so."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

#: What a raised flag holds. Whatever lay in its place before is something else, but for one case in 2**63.
TAG = secrets.randbits(63)


@dataclass(frozen=True)
class Parts:
    """The memory of one launch for them.

    Args:
        sums: bytes of float32 sums, a multiple of 8.
        flags: of 8 bytes each, which lie behind the sums.
    """

    sums: int = 0
    flags: int = 0

    @property
    def nbytes(self) -> int:
        """Of both."""
        return self.sums + 8 * self.flags

    def allocate(self, device: torch.device) -> Tensor:
        """The memory, as it was: flags need no clearing."""
        return torch.empty(self.nbytes, dtype=torch.uint8, device=device)

    def arguments(self, memory: Tensor) -> tuple[int, int, int]:
        """What a kernel takes: addresses of the sums and of the flags in ``memory``, and :data:`TAG`."""
        address = memory.data_ptr()
        return address, address + self.sums, TAG
