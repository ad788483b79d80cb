"""The kernels that implement an op, so that one test can hold every one of them to its reference.

A kernel lives in one file of ``kernels/`` and registers itself under the op whose result it computes:

    @register_kernel("qlinear")
    class MyKernel: ...
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor


class Kernel(Protocol):
    """An implementation with a packed form of its own: ``op(x, *pack(...).values(), *constants)``."""

    #: The ``torch.library`` op that runs on the packed tensors.
    op: Callable[..., Tensor]

    @staticmethod
    def legal(
        n: int, k: int, bits: int, group_size: int, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Why a weight ``(n, k)`` in groups of ``group_size`` cannot run, in one line; None if it can."""

    @staticmethod
    def pack(
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor,
        bias: Tensor | None,
        bits: int,
        group_size: int,
        **options: Any,
    ) -> tuple[Mapping[str, Tensor | None], tuple[Any, ...]]:
        """The op's tensors by argument name, and the constants that follow them."""


_KERNELS: dict[str, dict[str, type[Kernel]]] = {}
K = TypeVar("K", bound=type)


def register_kernel(op: str) -> Callable[[K], K]:
    """Class decorator that lists a kernel under ``op``, the name of the op whose result it computes."""

    def add(cls: K) -> K:
        _KERNELS.setdefault(op, {})[cls.__name__] = cls
        return cls

    return add


def kernels(op: str) -> dict[str, type[Kernel]]:
    """The kernels of ``op`` by class name."""
    package = importlib.import_module("awqc.kernels")
    for module in pkgutil.iter_modules(package.__path__, "awqc.kernels."):
        importlib.import_module(module.name)
    return dict(sorted(_KERNELS.get(op, {}).items()))
