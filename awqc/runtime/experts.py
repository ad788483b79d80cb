"""What takes the place of the stacked weights of experts in a lowered model.

The module that owns such a parameter keeps its class and its forward: dispatch, activation, gating, biases
and the weighted sum stay its own code, in whichever of several implementations it is asked for. Only the
parameter is replaced, by a module that answers the torch functions which read it: products of rows with
their experts' weights run on the packed weights, anything else on the dequantized ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from awqc.errors import ConfigError
from awqc.runtime.lowering import Lowered
from awqc.runtime.packed import PackedModule


class QuantExperts(PackedModule):
    """The weights of E experts, packed, in the place of a parameter ``(E, N, K)`` or ``(E, K, N)``.

    Called with rows it multiplies them: ``x`` ``(S, K)`` sorted by expert with ``offsets`` ``(E,)``, or
    ``x`` ``(E, T, K)``, as :func:`awqc.kernels.qexperts.qexperts`. A forward that was written for the
    parameter indexes it, transposes it and passes it to torch functions.

    Args:
        lowered: from :func:`awqc.runtime.lowering.lower_linear`, of weights ``(E, N, K)``.
        transposed: whether the parameter was ``(E, K, N)``.
    """

    def __init__(self, lowered: Lowered, transposed: bool) -> None:
        super().__init__(lowered)
        count = lowered.shape.expert_count
        assert count is not None
        self.count, self.transposed = count, transposed

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        buffers = self._buffers
        return self.op(x, offsets, *[buffers[name] for name in self._names], *self.constants)

    def dequantize(self) -> Tensor:
        """The weights ``(E, N, K)`` or ``(E, K, N)``, as the parameter was."""
        weight = self.unpack()[0].dequantize(self.dtype)
        return weight.mT if self.transposed else weight

    def as_parameter(self) -> Weights:
        """What a forward sees."""
        return Weights(self, self.transposed)

    def __getitem__(self, index: Any) -> Weights | Tensor:
        return self.as_parameter()[index]

    def __len__(self) -> int:
        return self.count

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
        return getattr(self.as_parameter(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _call(func, args, kwargs or {})

    def extra_repr(self) -> str:
        return (
            f"{self.count} experts, in_features={self.in_features}, out_features={self.out_features}, "
            f"{self.scheme}, backend={self.backend.name}"
        )


class Weights:
    """Stacked weights as a forward handles them: transposed, or some of the experts picked.

    Args:
        module: the packed weights.
        transposed: whether the last dimensions are seen as ``(K, N)``.
        chosen: ``()`` or ``(S,)`` numbers of experts; None for all of them in their order.
    """

    def __init__(self, module: QuantExperts, transposed: bool, chosen: Tensor | None = None) -> None:
        self.module, self.transposed, self.chosen = module, transposed, chosen

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that this stands for."""
        leading = (self.module.count,) if self.chosen is None else self.chosen.shape
        matrix = (self.module.out_features, self.module.in_features)
        return torch.Size((*leading, *(matrix[::-1] if self.transposed else matrix)))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations that the weights are multiplied with."""
        return self.module.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.module.device

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def mT(self) -> Weights:
        """The last two dimensions swapped."""
        return Weights(self.module, not self.transposed, self.chosen)

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As :meth:`torch.Tensor.size`."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Number of dimensions."""
        return self.ndim

    def transpose(self, first: int, second: int) -> Weights | Tensor:
        """As :meth:`torch.Tensor.transpose`."""
        last = {self.ndim - 2, self.ndim - 1}
        if {first % self.ndim, second % self.ndim} == last:
            return self.mT
        return self.dequantize().transpose(first, second)

    def t(self) -> Weights | Tensor:
        """As :meth:`torch.Tensor.t`."""
        return self.mT if self.ndim == 2 else self.dequantize().t()

    def dequantize(self) -> Tensor:
        """The tensor that this stands for."""
        weight = self.module.dequantize()
        weight = weight.mT if self.transposed != self.module.transposed else weight
        return weight if self.chosen is None else weight[self.chosen]

    def times(self, x: Tensor) -> Tensor:
        """``x`` ``(..., K)`` multiplied with the experts' weights: by blocks ``(E, T, K)`` or ``(S, T, K)``
        where there are several, all rows by the same where there is one; ``(..., N)``."""
        module, chosen = self.module, self.chosen
        if chosen is None:
            return module(x)
        rows = x.reshape(-1, x.shape[-1])
        numbers = torch.arange(module.count, device=x.device)
        if chosen.ndim == 0:
            y = module(rows, (numbers >= chosen) * len(rows))
        else:
            experts = chosen.repeat_interleave(x.shape[1]) if x.shape[1] != 1 else chosen
            order = experts.argsort(stable=True)
            offsets = torch.searchsorted(experts[order], numbers, right=True)
            y = module(rows[order], offsets)[order.argsort()]
        return y.view(*x.shape[:-1], -1)

    def __getitem__(self, index: Any) -> Weights | Tensor:
        if isinstance(index, int) and -len(self) <= index < len(self):
            index = torch.tensor(index % len(self), device=self.device)
        whole = isinstance(index, Tensor) and index.ndim < 2 and index.dtype in (torch.int64, torch.int32)
        if whole and self.chosen is None:
            return Weights(self.module, self.transposed, index)
        item: Tensor = self.dequantize()[index]
        return item

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.dequantize(), name)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self)  # type: ignore[arg-type]

    def __matmul__(self, x: Tensor) -> Tensor:
        return torch.matmul(self, x)  # type: ignore[arg-type]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _call(func, args, kwargs or {})


def _call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``func`` on packed weights where that can be, else on the tensors that they stand for."""
    args, kwargs = tree_map(_seen, tuple(args)), tree_map(_seen, dict(kwargs))
    product = _PRODUCTS.get(getattr(func, "__name__", ""))
    result = product(*args, **kwargs) if product is not None else None
    if result is None:
        return func(*tree_map(_tensor, args), **tree_map(_tensor, kwargs))
    return result


def _seen(value: Any) -> Any:
    return value.as_parameter() if isinstance(value, QuantExperts) else value


def _tensor(value: Any) -> Any:
    return value.dequantize() if isinstance(value, Weights) else value


def _grouped(
    x: Any, weight: Any, offs: Tensor | None = None, bias: Any = None, out_dtype: torch.dtype | None = None
) -> Tensor | None:
    """``x`` ``(S, K)`` sorted by expert with weights ``(E, K, N)``."""
    if not isinstance(weight, Weights) or weight.chosen is not None or not weight.transposed:
        return None
    if not isinstance(x, Tensor) or x.ndim != 2 or offs is None or bias is not None:
        return None
    return weight.module(x, offs).to(out_dtype or x.dtype)


def _matmul(a: Any, b: Any) -> Tensor | None:
    """Blocks of rows with their experts' weights, or any rows with those of one expert."""
    if isinstance(b, Weights) and isinstance(a, Tensor) and b.transposed and _fit(a, b):
        return b.times(a)
    if (
        isinstance(a, Weights)
        and isinstance(b, Tensor)
        and not a.transposed
        and b.ndim >= 2
        and _fit(b.mT, a)
    ):
        return a.times(b.mT).mT
    return None


def _fit(x: Tensor, weight: Weights) -> bool:
    """Whether the leading dimensions need no broadcasting."""
    return weight.ndim == 2 or (x.ndim == 3 and x.shape[0] == weight.shape[0])


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    if not isinstance(weight, Weights) or weight.ndim != 2 or weight.transposed:
        return None
    y = weight.times(x)
    return y if bias is None else y + bias


#: Torch functions that multiply with weights, by name: libraries have grouped products of their own.
_PRODUCTS: dict[str, Callable[..., Tensor | None]] = {
    "linear": _linear,
    "matmul": _matmul,
    "bmm": _matmul,
    "grouped_mm": _grouped,
    "_grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped,
}


def replace_expert_weights(model: nn.Module, lowered: Mapping[str, QuantExperts]) -> None:
    """Put packed weights where modules of ``model`` have stacked ones as parameters, in place.

    Args:
        model: what holds the parameters; one that it holds under several names is replaced under all.
        lowered: qualified name of the parameter -> replacement.

    Raises:
        ConfigError: if a name has no parameter or one of another shape. The model is then unchanged.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    replacements: dict[int, QuantExperts] = {}
    for name, weights in lowered.items():
        found, expected = parameters.get(name), tuple(weights.as_parameter().shape)
        if found is None or tuple(found.shape) != expected:
            there = "no such parameter" if found is None else f"{name} of shape {tuple(found.shape)}"
            raise ConfigError(
                f"{type(model).__name__} has {there}: the weights of {weights.count} experts do not fit "
                f"there, which make a parameter of shape {expected} ({name})"
            )
        replacements[id(found)] = weights
    for module in list(model.modules()):
        for attribute, parameter in list(module._parameters.items()):
            if id(parameter) in replacements:
                del module._parameters[attribute]
                module._modules[attribute] = replacements[id(parameter)]
