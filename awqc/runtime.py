"""The module that takes a linear's place in a lowered model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from awqc.errors import ConfigError
from awqc.input_scales import PART
from awqc.lowering import Lowered
from awqc.packed import PackedModule


class QuantLinear(PackedModule):
    """``y = x @ W.T + bias`` on a packed weight: ``x`` ``(..., K)`` to ``y`` ``(..., N)`` of its dtype.

    Args:
        lowered: from :func:`awqc.lowering.lower_linear`.
        input_scale: ``(K,)`` that ``x`` is multiplied by first, where a scale could not be folded.
    """

    input_scale: Tensor | None

    def __init__(self, lowered: Lowered, input_scale: Tensor | None = None) -> None:
        super().__init__(lowered)
        self.dtype = lowered.shape.dtype
        self.register_buffer(PART, input_scale)

    def forward(self, x: Tensor) -> Tensor:
        # Straight from the dictionary: attribute look-up of a buffer costs more than the op's dispatch.
        buffers = self._buffers
        scale = buffers[PART]
        if scale is not None:
            x = (x * scale).to(x.dtype)
        return self.op(x, *[buffers[name] for name in self._names], *self.constants)

    def extra_repr(self) -> str:
        bias = self._buffers.get("bias") is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, "
            f"{self.scheme}, backend={self.backend.name}"
        )


def replace_linears(model: nn.Module, lowered: Mapping[str, QuantLinear]) -> None:
    """Put quantized linears where ``model`` has ``nn.Linear``, or modules like it, in place.

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
