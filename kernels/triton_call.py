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
_CUTS = ("block_m", "block_n", "block", "stages", "num_warps")


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
    """

    function: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]

    def launch(self) -> None:
        """Launch it, compiled at its first time, on the device of its tensors, current or not."""
        first = next(value for value in self.arguments.values() if isinstance(value, torch.Tensor))
        with torch.cuda.device_of(first):
            self.function[self.grid](**self.arguments)

    def describe(self, result: str) -> Launch:
        """What it launches; ``result`` is the name of the argument that is written."""
        read = [value for name, value in self.arguments.items() if name != result]
        config = {name: value for name, value in self.arguments.items() if name in _CUTS}
        module = self.function.fn.__module__.rpartition(".")[2]
        return Launch(
            f"{module}.py:{self.function.fn.__name__}",
            nbytes(*read),
            nbytes(self.arguments[result]),
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
            if isinstance(value, Tensor):
                signature[name] = f"*{_TYPES[value.dtype]}"
                aligned.append(position)
            elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = "i32"
                if value % _ALIGNED == 0 and not parameter.do_not_specialize:
                    aligned.append(position)
        options = {name: value for name, value in self.arguments.items() if name not in signature}
        return TritonCode(self.function, signature, constants, tuple(aligned), options)
