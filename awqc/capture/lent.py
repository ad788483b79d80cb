"""Eager execution of a model whose weights are not in memory: each is there for the op that reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from awqc.storage.source import swapped_tensors
from awqc.weights import Weights

#: What is asked of a tensor without looking at its values.
_LOOKS = {"__get__", "__len__", "size", "dim", "ndimension", "numel", "nelement", "stride", "element_size"}
_LOOKS |= {"is_floating_point", "is_complex"}


@contextmanager
def lent_weights(module: nn.Module, weights: Weights, names: Mapping[int, str]) -> Iterator[None]:
    """Within the block the parameters and buffers of ``module`` hold no values; torch functions that read one
    are given its value from ``weights``.

    Args:
        names: id of each tensor of ``module`` -> its name among ``weights``.
    """
    lent: dict[int, tuple[Tensor, str]] = {}

    def empty(tensor: Tensor) -> Tensor:
        cast = weights.dtype is not None and tensor.is_floating_point()
        new = torch.empty(tensor.shape, dtype=weights.dtype if cast else tensor.dtype, device="meta")
        new = nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new
        lent[id(new)] = new, names[id(tensor)]
        return new

    with swapped_tensors(module, empty), _Lending(weights, lent):
        yield


class _Lending(TorchFunctionMode):
    def __init__(self, weights: Weights, lent: Mapping[int, tuple[Tensor, str]]) -> None:
        super().__init__()
        self.weights, self.lent = weights, lent

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__ and id(args[0]) in self.lent:
            return self.weights.device
        if getattr(func, "__name__", "") in _LOOKS:
            result = func(*args, **kwargs)
            if not isinstance(result, Tensor):
                return result
        return func(*tree_map(self._value, args), **tree_map(self._value, kwargs))

    def _value(self, item: Any) -> Any:
        if not isinstance(item, Tensor) or id(item) not in self.lent:
            return item
        name = self.lent[id(item)][1]
        value = self.weights[name]
        self.weights.drop(name)
        return value
