"""Options of a compile."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from awqc.errors import ConfigError
from awqc.quantized import Scheme

Propagate = Literal["quantized", "float"]
PropagateDtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class QuantConfig:
    """How a model is quantized.

    Args:
        bits: width of a code, 2 to 8.
        group_size: input channels that share a scale; -1 for whole rows.
        zero_point: asymmetric groups (True) or symmetric ones.
        propagate: what later stages see while they are calibrated: the outputs of the quantized stages
            before them, or those of the float model.
        propagate_dtype: precision of the matrix products that compute what later stages see; ``auto`` is
            bfloat16 where the device multiplies it faster. Statistics are float32 always.
        min_expert_tokens: calibration tokens below which an expert is quantized by the statistics of all
            experts of its layer.
        calibrate_all_experts: send every token to every expert while statistics are taken; what moves on
            to later layers is routed as ever.
        keep: linears to leave in float, by name or shell-style pattern (``"*.down_proj"``).
        quantize_head: also quantize the linear that computes the model's output.
        input_scales: where no parameter can absorb the scale of a linear's input, search one that is applied
            at run time. It costs a multiplication, and only awqc's own checkpoints hold it.
        require_coverage: share of the parameters to be quantized, 0 to 1, that must be in a scale group; the
            compile stops before calibration if less are.
        seed: of everything random.

    Raises:
        ConfigError: if a field is out of range.
    """

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    propagate: Propagate = "quantized"
    propagate_dtype: PropagateDtype = "auto"
    min_expert_tokens: int = 128
    calibrate_all_experts: bool = False
    keep: tuple[str, ...] = ()
    quantize_head: bool = False
    input_scales: bool = False
    require_coverage: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        Scheme(self.bits, self.group_size, self.zero_point)
        if self.propagate not in get_args(Propagate):
            raise ConfigError(f"propagate={self.propagate!r}: choose 'quantized' or 'float'")
        if self.propagate_dtype not in get_args(PropagateDtype):
            raise ConfigError(
                f"propagate_dtype={self.propagate_dtype!r}: choose 'auto', 'float32' or 'bfloat16'"
            )
        if self.min_expert_tokens < 0:
            raise ConfigError(f"min_expert_tokens={self.min_expert_tokens}: give a number of tokens, or 0")
        if not 0 <= self.require_coverage <= 1:
            raise ConfigError(f"require_coverage={self.require_coverage}: give a share between 0 and 1")

    @property
    def scheme(self) -> Scheme:
        """The scheme of linears that no pass singles out."""
        return Scheme(self.bits, self.group_size, self.zero_point)

    def keeps(self, name: str) -> str | None:
        """The pattern of ``keep`` that matches the linear ``name``, if any."""
        return next((p for p in self.keep if fnmatchcase(name, p)), None)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)
