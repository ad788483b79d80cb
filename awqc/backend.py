"""What a backend is: a statement of its limits, a packing both ways, and an op on the packed tensors.

A backend lives in one file of ``backends/`` and registers itself:

    @register_backend("my")
    class MyBackend(Backend): ...

Third parties use the entry point group ``awqc.backends`` (a module that registers when imported).
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from awqc.errors import BackendError
from awqc.quantized import QuantizedWeight, Scheme


@dataclass(frozen=True)
class LinearShape:
    """Everything a backend may base its answer on.

    Args:
        out_features: ``N``.
        in_features: ``K``.
        scheme: bits, group size, symmetry.
        dtype: dtype of the activations ``x``.
        device: where the linear runs.
        expert_count: ``E``, the number of experts of a stack ``(E, N, K)``; None for one linear.
    """

    out_features: int
    in_features: int
    scheme: Scheme
    dtype: torch.dtype
    device: torch.device
    expert_count: int | None = None


@dataclass(frozen=True)
class PackedLinear:
    """A linear lowered for one backend: ``op(x, *tensors.values(), *constants)`` computes it. The linears
    of a mixture's experts are one: ``op(x, offsets, *tensors.values(), *constants)``, as in
    ``awqc.qexperts``.

    Args:
        op: a ``torch.library`` op (an OpOverload), so that graphs can hold it.
        tensors: packed tensors by name, in the op's argument order; None for an absent bias.
        constants: ints, floats or bools that follow the tensors.
        kept: further tensors by name, which the op does not read but :meth:`Backend.unpack` does.
        notes: what a reader of the report must know (an approximation, a fallback), one line each.
    """

    op: Callable[..., Tensor]
    tensors: Mapping[str, Tensor | None]
    constants: tuple[Any, ...] = ()
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=())

    def tensor(self, name: str) -> Tensor:
        """The packed tensor ``name`` of those that are never absent.

        Raises:
            KeyError: if it is not there after all.
        """
        tensor = self.tensors[name]
        if tensor is None:
            raise KeyError(name)
        return tensor


class Backend(ABC):
    """One lowering of ``awqc.qlinear``, and of ``awqc.qexperts`` if it says so. Stateless: options are
    constructor arguments."""

    name: ClassVar[str] = ""
    #: Whether weights ``(E, N, K)`` of a mixture's experts are packed too.
    runs_experts: ClassVar[bool] = False
    #: ``backend="auto"`` takes the highest of those that do not refuse; ``reference`` has 0.
    priority: ClassVar[int] = 0

    @abstractmethod
    def refuses(self, shape: LinearShape) -> str | None:
        """Why this backend cannot run ``shape``, in one line naming the limit; None if it can."""

    @abstractmethod
    def pack(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        """Pack ``weight`` ``(N, K)`` and ``bias`` ``(N,)`` for activations of ``dtype``, on the device
        where the codes are; or the ``(E, N, K)`` of experts, which have no bias here. Only called for
        shapes that :meth:`refuses` accepted."""

    @abstractmethod
    def unpack(self, packed: PackedLinear, shape: LinearShape) -> tuple[QuantizedWeight, Tensor | None]:
        """The weight and bias that :meth:`pack` was given, bit for bit: a lowered model can be saved, or
        lowered again, without a copy of its canonical weights."""


_REGISTRY: dict[str, type[Backend]] = {}
B = TypeVar("B", bound=type[Backend])


def register_backend(name: str) -> Callable[[B], B]:
    """Class decorator that makes a backend available under ``name``.

    Raises:
        BackendError: if another class already has the name.
    """

    def add(cls: B) -> B:
        if name in _REGISTRY and _REGISTRY[name].__qualname__ != cls.__qualname__:
            raise BackendError(f"backend {name!r} is already registered by {_REGISTRY[name].__module__}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def backends() -> dict[str, type[Backend]]:
    """All registered backends by name: those of ``awqc.backends`` and of installed entry points."""
    _import_backends()
    return dict(sorted(_REGISTRY.items()))


@functools.cache
def _import_backends() -> None:
    package = importlib.import_module("awqc.backends")
    for module in pkgutil.iter_modules(package.__path__, "awqc.backends."):
        importlib.import_module(module.name)
    for entry in entry_points(group="awqc.backends"):
        entry.load()


def get_backend(name: str) -> Backend:
    """The backend registered as ``name``.

    Raises:
        BackendError: if there is none; the message lists what there is.
    """
    known = backends()
    if name not in known:
        raise BackendError(f"unknown backend {name!r}: choose one of {', '.join(['auto', *known])}")
    return known[name]()
