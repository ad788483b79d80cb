"""What a call of an op launches, described without a device: for who inspects a lowered graph.

A description is made from the shapes of the op's arguments alone, by the code that makes the launch itself:

    @describes(torch.ops.awqc.qlinear_mine.default)
    def launches(hardware, x, packed, ...) -> list[Launch]: ...

The function takes the op's own arguments; tensors may be on ``meta``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from awqc.kernels.hardware import Hardware


class Code(Protocol):
    """The source of a kernel with everything that decides its machine code."""

    @property
    def entry(self) -> str:
        """Name of the function that is launched."""

    def ptx(self, capability: tuple[int, int]) -> str:
        """NVIDIA's intermediate code for a compute capability."""

    def cubin(self, capability: tuple[int, int]) -> bytes:
        """Machine code for a compute capability."""


@dataclass(frozen=True)
class Launch:
    """One kernel that a call launches, or one routine of a library that it calls.

    Args:
        kernel: file and entry point, ``marlin_small.cu:small``, or the routine.
        reads, writes: bytes of memory, every tensor counted once.
        grid, block: sizes; empty for a routine.
        shared: bytes of dynamic shared memory of a block.
        cluster: blocks of a cluster.
        config: how the work is cut, by the names that the kernel has for it.
        code: what compiles it; None for a routine.
    """

    kernel: str
    reads: int
    writes: int
    grid: tuple[int, ...] = ()
    block: tuple[int, ...] = ()
    shared: int = 0
    cluster: int = 1
    config: Mapping[str, int | str] = field(default_factory=dict)
    code: Code | None = None

    @property
    def bytes(self) -> int:
        """Bytes that are moved."""
        return self.reads + self.writes

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; without the code."""
        return {key: value for key, value in vars(self).items() if key != "code"} | {"bytes": self.bytes}


Describe = Callable[..., list[Launch]]
_DESCRIPTIONS: dict[Callable[..., Any], Describe] = {}
D = TypeVar("D", bound=Describe)


def describes(op: Callable[..., Any]) -> Callable[[D], D]:
    """Decorator for the function that describes the launches of ``op``."""

    def add(function: D) -> D:
        _DESCRIPTIONS[op] = function
        return function

    return add


def launches(op: Callable[..., Any], hardware: Hardware, args: Sequence[Any], result: Any) -> list[Launch]:
    """What ``op(*args)`` launches on ``hardware``. An op that nothing is known of is one routine that reads
    its arguments and writes ``result``.

    Args:
        args: tensors, on ``meta`` if need be, lists of them, and numbers.
        result: what the op returns.
    """
    describe = _descriptions().get(op)
    if describe is not None:
        return describe(hardware, *args)
    name = str(op).removesuffix(".default") if isinstance(op, torch._ops.OpOverload) else _name(op)
    return [Launch(name, nbytes(*args), nbytes(result))]


def nbytes(*values: Any) -> int:
    """Bytes of all tensors among ``values``, each counted once."""
    found: dict[int, Tensor] = {}

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            found[id(value)] = value
        elif isinstance(value, (list, tuple)):
            for item in value:
                collect(item)

    collect(values)
    return sum(tensor.numel() * tensor.itemsize for tensor in found.values())


def _name(op: Callable[..., Any]) -> str:
    return getattr(op, "__name__", str(op))


def _descriptions() -> dict[Callable[..., Any], Describe]:
    package = importlib.import_module("awqc.kernels")
    for module in pkgutil.iter_modules(package.__path__, "awqc.kernels."):
        importlib.import_module(module.name)
    return _DESCRIPTIONS
