"""What a checkpoint format is: limits, the tensors and config of a quantized linear, and their reading.

A format lives in one file and registers itself:

    @register_format("my-format")
    class MyFormat(CheckpointFormat): ...

Its name is the ``quant_method`` that ``config.json`` of such a checkpoint states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from awqc.checkpoints.tensors import TensorFiles
from awqc.errors import CheckpointError
from awqc.quantized import QuantizedWeight, Scheme


class LinearReader(ABC):
    """The quantized linears of one checkpoint.

    Args:
        files: the checkpoint's tensors.
        marker: suffix of the tensor that every quantized linear has, ``".qweight"`` for example.
    """

    def __init__(self, files: TensorFiles, marker: str) -> None:
        self.files = files
        self.marker = marker

    def names(self) -> list[str]:
        """Module names of the quantized linears, in the order of the files."""
        return [name.removesuffix(self.marker) for name in self.files if name.endswith(self.marker)]

    @abstractmethod
    def tensors(self, name: str) -> list[str]:
        """Names of the tensors that hold the weight of linear ``name``."""

    @abstractmethod
    def check(self, name: str) -> tuple[int, int]:
        """The shape ``(N, K)`` of linear ``name``, its tensors checked against the config by header alone.

        Raises:
            CheckpointError: if a tensor is missing or its shape or dtype disagrees with the config.
        """

    @abstractmethod
    def weight(self, name: str) -> QuantizedWeight:
        """Read the weight of linear ``name``; raises as :meth:`check`."""

    def matrix(self, tensor: str) -> tuple[int, int]:
        """Rows and columns of ``tensor``.

        Raises:
            CheckpointError: if it is no matrix, or an empty one.
        """
        info = self.files.info(tensor)
        if len(info.shape) != 2 or 0 in info.shape:
            raise CheckpointError(
                f"{info.file}: tensor {tensor!r} has shape {info.shape}, but packed weights are matrices: "
                "the checkpoint does not follow its format; save it again"
            )
        return info.shape[0], info.shape[1]

    def expect(
        self, tensor: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], settings: str
    ) -> None:
        """Check the header of ``tensor`` against what ``settings`` of config.json, in words, ask for.

        Raises:
            CheckpointError: if it is missing, or has another shape or none of ``dtypes``.
        """
        if tensor not in self.files:
            raise CheckpointError(
                f"{self.files.directory} has no tensor {tensor!r}, which {settings} in config.json asks for: "
                "the checkpoint is incomplete; copy or save it again"
            )
        info = self.files.info(tensor)
        for what, found, allowed in (("shape", info.shape, (shape,)), ("dtype", info.dtype, dtypes)):
            if found not in allowed:
                raise CheckpointError(
                    f"{info.file}: tensor {tensor!r} has {what} {found}, but {settings} in config.json asks "
                    f"for {' or '.join(map(str, allowed))}: weights and config do not belong together; "
                    "restore the config.json that was saved with these weights"
                )


class CheckpointFormat(ABC):
    """How one family of checkpoints stores quantized linears. Stateless.

    ``served`` says that serving engines load this format. They compute in float16 or bfloat16 only, and
    take every safetensors file in the directory for weights. ``input_scales`` says that it stores vectors
    that inputs of linears are multiplied by.
    """

    name: ClassVar[str] = ""
    served: ClassVar[bool] = True
    input_scales: ClassVar[bool] = False

    @abstractmethod
    def refuses(self, out_features: int, in_features: int, scheme: Scheme) -> str | None:
        """Why a linear ``(N, K)`` cannot be stored, in one line naming the limit; None if it can."""

    @abstractmethod
    def encode(self, prefix: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors of linear ``prefix`` by their name on disk, on the device of ``weight``. Only
        called for linears that :meth:`refuses` accepted.

        Of the weights ``(E, N, K)`` of several linears that share a scheme, every tensor has one dimension
        more in front and is that of each.
        """

    @abstractmethod
    def quantization_config(
        self, schemes: Mapping[str, Scheme], kept: Sequence[str] = (), head: str | None = None
    ) -> dict[str, Any]:
        """The value of ``quantization_config`` in config.json.

        Args:
            schemes: scheme of every quantized linear by its full module name; at least one.
            kept: full module names of the linears that stay dense.
            head: name of the linear that computes the logits.

        Raises:
            CheckpointError: if the format cannot hold these schemes side by side.
        """

    @abstractmethod
    def reader(self, config: Mapping[str, Any], files: TensorFiles) -> LinearReader:
        """The quantized linears in ``files``, stored as ``config`` (a ``quantization_config``) says.

        Raises:
            CheckpointError: if ``config`` asks for something that awqc cannot read.
        """


_REGISTRY: dict[str, type[CheckpointFormat]] = {}
F = TypeVar("F", bound=type[CheckpointFormat])


def register_format(name: str) -> Callable[[F], F]:
    """Class decorator that makes a format available under ``name``.

    Raises:
        CheckpointError: if another class already has the name.
    """

    def add(cls: F) -> F:
        if name in _REGISTRY and _REGISTRY[name].__qualname__ != cls.__qualname__:
            raise CheckpointError(f"format {name!r} is already registered by {_REGISTRY[name].__module__}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def formats() -> dict[str, type[CheckpointFormat]]:
    """All registered formats by name."""
    return dict(sorted(_REGISTRY.items()))


def get_format(name: str) -> CheckpointFormat:
    """The format registered as ``name``.

    Raises:
        CheckpointError: if there is none; the message lists what there is.
    """
    if name not in _REGISTRY:
        raise CheckpointError(f"unknown checkpoint format {name!r}: choose one of {', '.join(formats())}")
    return _REGISTRY[name]()


def check_input_scales(name: str) -> None:
    """Whether a format can carry scales that are applied at run time.

    Raises:
        CheckpointError: if it cannot; the message names formats that can.
    """
    if not get_format(name).input_scales:
        able = [repr(other) for other, cls in formats().items() if cls.input_scales]
        raise CheckpointError(
            f"format {name!r} cannot store input scales, which are applied at run time: save as "
            f"{' or '.join(able)}, or compile without input_scales"
        )


def check_format(name: str, linears: Mapping[str, tuple[int, int, Scheme]], head: str | None = None) -> None:
    """Whether a format can carry these linears; worth asking before hours of work.

    Args:
        name: name of the format.
        linears: ``(N, K, scheme)`` of every quantized linear by its full module name.
        head: name of the linear that computes the logits.

    Raises:
        CheckpointError: if it cannot; the message names the linear, the limit, and formats that can.
    """
    if not linears:
        raise CheckpointError(f"format {name!r} stores quantized linears and there are none: compile first")
    fmt = get_format(name)
    refused = {}
    for linear, (n, k, scheme) in linears.items():
        reason = fmt.refuses(n, k, scheme)
        if reason is not None:
            refused[linear] = reason
    if refused:
        linear, reason = next(iter(refused.items()))
        more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
        able = [
            other
            for other, cls in formats().items()
            if all(cls().refuses(*linears[linear]) is None for linear in refused)
        ]
        raise CheckpointError(
            f"format {name!r} cannot store {linear!r}{more}: {reason}: keep it in 16 bits, or save as "
            f"{' or '.join(repr(other) for other in able)}"
        )
    fmt.quantization_config({linear: scheme for linear, (_, _, scheme) in linears.items()}, (), head)
