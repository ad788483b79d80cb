"""What Triton kernels are compiled for, and a call of one as a value: to be launched, or to be described and
compiled without a GPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from awqc.kernels.hardware import Hardware, hardware
from awqc.kernels.launch import Launch, nbytes
from awqc.kernels.machine_code import TritonCode

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.uint8: "u8",
}
#: Tensors of torch begin at multiples of this, and Triton compiles for what it finds to be one.
_ALIGNED = 16
#: Warps of a program that asks for no number.
_WARPS = 4
#: Arguments that say how the work is cut.
_CUTS = ("block_m", "block_n", "block", "stages", "planes", "whole", "shares", "num_warps")


def interpreted() -> bool:
    """Whether Triton is told to interpret kernels on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for.

    Args:
        processors: multiprocessors.
        ptx: NVIDIA, 8.0 and later: see ``jit/words_triton.py``.
        dependent: NVIDIA, 9.0 and later: kernels start while their predecessor finishes.
    """

    processors: int
    ptx: bool
    dependent: bool

    @staticmethod
    def of(at: Hardware) -> Target:
        """The target that ``at`` is."""
        if at.type != "cuda" or interpreted():
            return Target(processors=4, ptx=False, dependent=False)
        major = 0 if at.capability is None else at.capability[0]
        return Target(at.processors, ptx=major >= 8, dependent=major >= 9)

    def launch(self) -> dict[str, bool]:
        """Arguments of every launch."""
        # launch_pdl is known to Triton for NVIDIA alone.
        return {"dependent": True, "launch_pdl": True} if self.dependent else {"dependent": False}


@dataclass(frozen=True)
class Tiles:
    """A matrix that a kernel copies in tiles, through a tensor map (Hopper and later).

    Args:
        matrix: contiguous; rows begin at multiples of 16 bytes.
        block: rows and columns of a tile.
    """

    matrix: Tensor
    block: tuple[int, int]

    def _layout(self) -> Any:
        return _tile_layout(self.block, self.matrix.dtype)

    def tensor_map(self) -> Any:
        """What a launch takes."""
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        return TensorDescriptor.from_tensor(self.matrix, list(self.block), self._layout())

    def type(self) -> str:
        """Triton's name of what a launch takes."""
        return f"tensordesc<{_TYPES[self.matrix.dtype]}{list(self.block)},{self._layout()!r}>"


@functools.cache
def _tile_layout(block: tuple[int, int], dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, str(dtype).removeprefix("torch.")))


@functools.cache
def target(device: torch.device) -> Target:
    """The target that ``device`` is."""
    return Target.of(hardware(device))


@dataclass(frozen=True)
class Call:
    """One launch of a function of :mod:`awqc.kernels.jit`.

    Args:
        function: what ``triton.jit`` made of it.
        grid: programs.
        arguments: by name, those of the function and those of the launch, such as ``num_warps``.
        results: names of the arguments that are written.
    """

    function: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    results: tuple[str, ...] = ("y_ptr",)

    def launch(self) -> None:
        """Launch it, compiled at its first time, on the device of its tensors, current or not."""
        first = next(value for value in self.arguments.values() if isinstance(value, torch.Tensor))
        taken = {n: v.tensor_map() if isinstance(v, Tiles) else v for n, v in self.arguments.items()}
        with torch.cuda.device_of(first):
            self.function[self.grid](**taken)

    def describe(self) -> Launch:
        """What it launches."""
        held = {n: v.matrix if isinstance(v, Tiles) else v for n, v in self.arguments.items()}
        read = [value for name, value in held.items() if name not in self.results]
        config = {name: value for name, value in self.arguments.items() if name in _CUTS}
        module = self.function.fn.__module__.rpartition(".")[2]
        return Launch(
            f"{module}.py:{self.function.fn.__name__}",
            nbytes(*read),
            nbytes(*(held[name] for name in self.results)),
            grid=self.grid,
            block=(32 * self.arguments.get("num_warps", _WARPS),),
            config=config,
            code=None if interpreted() else self.code(),
        )

    def code(self) -> TritonCode:
        """Types and constants as a launch would find them."""
        signature, constants, aligned = {}, {}, []
        for position, parameter in enumerate(self.function.params):
            name, value = parameter.name, self.arguments[parameter.name]
            if isinstance(value, Tiles):
                signature[name] = value.type()
            elif isinstance(value, Tensor):
                signature[name] = f"*{_TYPES[value.dtype]}"
                aligned.append(position)
            elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = "i32"
                if value % _ALIGNED == 0 and not parameter.do_not_specialize:
                    aligned.append(position)
        options = {n: v for n, v in self.arguments.items() if n not in signature or n == "num_warps"}
        return TritonCode(self.function, signature, constants, tuple(aligned), options)
