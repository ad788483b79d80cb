"""The module that takes a linear's place in a lowered model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from awqc.errors import ConfigError
from awqc.runtime.input_scales import PART
from awqc.runtime.lowering import Lowered
from awqc.runtime.packed import PackedModule


class QuantLinear(PackedModule):
    """``y = x @ W.T + bias`` on a packed weight: ``x`` ``(..., K)`` to ``y`` ``(..., N)`` of its dtype.

    Args:
        lowered: from :func:`awqc.runtime.lowering.lower_linear`.
        input_scale: ``(K,)`` that ``x`` is multiplied by first, where a scale could not be folded.
    """

    input_scale: Tensor | None

    def __init__(self, lowered: Lowered, input_scale: Tensor | None = None) -> None:
        super().__init__(lowered)
        self.register_buffer(PART, input_scale)

    def forward(self, x: Tensor) -> Tensor:
        # Straight from the dictionary: attribute look-up of a buffer costs more than the op's dispatch.
        buffers = self._buffers
        scale = buffers[PART]
        if scale is not None:
            x = (x * scale).to(x.dtype)
        return self.op(x, *[buffers[name] for name in self._names], *self.constants)

    @property
    def weight(self) -> LinearWeight:
        """What a forward finds that looks at the weight of a linear, or multiplies with it by itself."""
        return LinearWeight(self)

    def dequantize(self) -> Tensor:
        """The weight ``(N, K)`` that takes inputs as they come."""
        weight = self.unpack()[0].dequantize(self.dtype)
        with self.resident():
            return weight if self.input_scale is None else (weight * self.input_scale).to(self.dtype)

    def extra_repr(self) -> str:
        bias = self._buffers.get("bias") is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, "
            f"{self.scheme}, backend={self.backend.name}"
        )


class LinearWeight:
    """The weight of a quantized linear as a tensor: its looks cost nothing, anything else dequantizes it.

    Args:
        linear: whose weight this is.
    """

    def __init__(self, linear: QuantLinear) -> None:
        self._linear = linear

    @property
    def shape(self) -> torch.Size:
        """``(N, K)``."""
        return torch.Size((self._linear.out_features, self._linear.in_features))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations that the weight is multiplied with."""
        return self._linear.dtype

    @property
    def device(self) -> torch.device:
        """Where the packed weight runs."""
        return self._linear.device

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As :meth:`torch.Tensor.size`."""
        return self.shape if dim is None else self.shape[dim]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._linear.dequantize(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        def tensor(value: Any) -> Any:
            return value._linear.dequantize() if isinstance(value, LinearWeight) else value

        return func(*tree_map(tensor, tuple(args)), **tree_map(tensor, dict(kwargs or {})))


#: What users hang on a module; it stays with what takes the module's place.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def replace_linears(model: nn.Module, lowered: Mapping[str, QuantLinear]) -> None:
    """Put quantized linears where ``model`` has ``nn.Linear``, or modules like it, in place. Hooks stay.

    Args:
        model: what holds the linears; a linear that it holds under several names is replaced under all.
        lowered: qualified module name -> replacement. A module to be replaced needs a 2-D ``weight``,
            ``(N, K)`` or, as in transformers' ``Conv1D``, ``(K, N)``.

    Raises:
        ConfigError: if a name has no module or one without such a weight, or if two names of one module
            have different replacements. The model is then unchanged.
    """
    replacements: dict[nn.Module, QuantLinear] = {}
    for name, linear in lowered.items():
        old = _linear_like(model, name, linear)
        if replacements.setdefault(old, linear) is not linear:
            raise ConfigError(f"{name} is another name of a module that is replaced by a different linear")
        linear.train(old.training)
        for hooks in _HOOKS:
            getattr(linear, hooks).update(getattr(old, hooks))
    for parent in list(model.modules()):
        for attribute, child in parent._modules.items():
            if child in replacements:
                parent._modules[attribute] = replacements[child]


def _linear_like(model: nn.Module, name: str, linear: QuantLinear) -> nn.Module:
    """The module called ``name``, if ``linear`` fits in its place."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if not name or name not in modules:
        raise ConfigError(f"{type(model).__name__} holds no module named {name!r}")
    weight = getattr(modules[name], "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
    n, k = linear.out_features, linear.in_features
    if shape not in ((n, k), (k, n)):
        found = "no weight tensor" if shape is None else f"a weight of shape {shape}"
        raise ConfigError(
            f"{name} has {found}: a quantized linear of {k} inputs and {n} outputs does not fit there"
        )
    return modules[name]
