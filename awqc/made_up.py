"""Weights in the place of those that do not fit: what whole graphs are checked on, where a limit of memory
keeps the true ones out.

Whether two programs compute the same, or a fold leaves a function unchanged, is a question about the
programs: numbers without structure, of the size that trained weights have, answer it as well as these do.
They cost no reading. Whatever is read for calibration is the true weight.
"""

from __future__ import annotations

import zlib

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from awqc.memory import MemoryLimit
from awqc.storage.source import ModelSource, named_tensors
from awqc.weights import StandIns

#: Normal numbers that all weights are made of, each from a place of its own on. A prime, so that no row of a
#: weight is like another.
_NUMBERS = 4_194_301
#: Every weight begins at a multiple of so many numbers: kernels ask for 16 bytes.
_ALIGNED = 64
#: Bytes for each weight while whole graphs are checked on the true ones: in float32, and twice in float64, as
#: they are and folded.
HELD = 4 + 8 + 8


def stand_ins(source: ModelSource, limit: MemoryLimit, device: torch.device) -> StandIns | None:
    """What gives made-up values by name and dtype; None if the true weights fit.

    Args:
        source: only tensors that are still on disk have a stand-in.
    """
    tensors = dict(named_tensors(source.module))
    there = sum(t.numel() for t in tensors.values() if t.is_meta and t.is_floating_point())
    if not there or HELD * there <= _room(limit, device):
        return None
    drawn = torch.randn(_NUMBERS, generator=torch.Generator().manual_seed(0)).to(device)

    def read(name: str, dtype: torch.dtype | None) -> Tensor:
        like = tensors.get(name)
        if like is None or not like.is_meta or not like.is_floating_point():
            return source.read(name).clone()
        numbers = drawn.to(dtype or like.dtype)  # before there are many of them
        first, count = zlib.crc32(name.encode()) % (_NUMBERS // _ALIGNED) * _ALIGNED, like.numel()
        flat = numbers.repeat(-(-(first + count) // _NUMBERS))[first : first + count]
        value = flat.view(like.shape)
        # Products keep the size of what they multiply, and norms are about one.
        return value.mul_(like.shape[-1] ** -0.5) if like.ndim > 1 else value.div_(8).add_(1)

    return read


def _room(limit: MemoryLimit, device: torch.device) -> int:
    if limit.device is not None:
        return limit.device
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return int(psutil.virtual_memory().total)
