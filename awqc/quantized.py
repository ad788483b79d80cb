"""The canonical quantized weight: what searches produce, formats store and backends pack.

A weight ``W`` of shape ``(N, K)`` is held as unsigned integer codes with one scale and one zero point
for every group of ``group_size`` consecutive input channels of a row:

    W[n, k] ~ (codes[n, k] - zeros[n, g]) * scales[n, g],   g = k // group_size

The last group is shorter when ``group_size`` does not divide ``K`` (ragged). Symmetric quantization is
the same form with every zero point at ``2 ** (bits - 1)``, so nothing downstream needs a second case.
The weights of the experts of a mixture are one stack ``(E, N, K)``, in every tensor one dimension more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awqc.errors import ConfigError

#: A scale is stored in half precision; anything smaller would make ``W / scale`` overflow.
SMALLEST_SCALE = 2.0**-24 * 16


@dataclass(frozen=True)
class Scheme:
    """How the weight of one linear is quantized.

    Args:
        bits: width of a code, 2 to 8.
        group_size: input channels that share a scale; -1 means the whole row.
        zero_point: True for asymmetric groups, False for groups symmetric about zero.

    Raises:
        ConfigError: if a field is out of range.
    """

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"bits={self.bits}: awqc quantizes to 2, 3, 4, 5, 6, 7 or 8 bits")
        if self.group_size != -1 and self.group_size < 1:
            raise ConfigError(
                f"group_size={self.group_size}: give a positive number of input channels, "
                "or -1 for whole rows"
            )

    @property
    def levels(self) -> int:
        """Number of codes, ``2 ** bits``."""
        return 1 << self.bits

    def group(self, in_features: int) -> int:
        """The group size in channels for a weight with ``in_features`` columns (-1 resolved)."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of ``in_features`` columns."""
        return math.ceil(in_features / self.group(in_features))

    def __str__(self) -> str:
        size = "row" if self.group_size == -1 else f"g{self.group_size}"
        return f"W{self.bits} {size} {'asym' if self.zero_point else 'sym'}"


@dataclass(frozen=True)
class Grid:
    """The values a weight may take: per-group scales and zero points, before any rounding.

    Args:
        scales: ``(N, G)`` or ``(E, N, G)``, positive, representable in half precision.
        zeros: alike, integer zero points held as floats, in ``[0, levels - 1]``.
        scheme: bits and group size.
        in_features: ``K``.
    """

    scales: Tensor
    zeros: Tensor
    scheme: Scheme
    in_features: int

    def expand(self, per_group: Tensor) -> Tensor:
        """Spread a ``(..., G)`` tensor over the ``K`` columns of its groups: ``(..., K)``."""
        return expand_groups(per_group, self.scheme.group(self.in_features), self.in_features)

    def encode(self, weight: Tensor) -> Tensor:
        """Nearest codes of ``weight`` ``(..., N, K)``, as floats in ``[0, levels - 1]``."""
        codes = torch.round(weight / self.expand(self.scales)) + self.expand(self.zeros)
        return codes.clamp_(0, self.scheme.levels - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """The weight ``(..., N, K)`` that ``codes`` stand for."""
        return (codes - self.expand(self.zeros)) * self.expand(self.scales)

    def rows(self, part: range) -> Grid:
        """The grid of the rows numbered ``part`` of a weight ``(N, K)``."""
        some = slice(part.start, part.stop)
        return Grid(self.scales[some], self.zeros[some], self.scheme, self.in_features)

    def some(self, matrices: slice | int | None) -> Grid:
        """The grid of some of the E matrices ``(E, N, K)``, or of one; None makes one a stack of itself."""
        return Grid(self.scales[matrices], self.zeros[matrices], self.scheme, self.in_features)

    def each(self) -> list[Grid]:
        """The grid of each of the E matrices ``(E, N, K)``."""
        return [self.some(number) for number in range(len(self.scales))]

    def sample(self, most: int) -> Grid:
        """The grid of the rows that :func:`sample_rows` takes of a weight."""
        scales, zeros = sample_rows(self.scales, most), sample_rows(self.zeros, most)
        return Grid(scales, zeros, self.scheme, self.in_features)

    def nearest(self, weight: Tensor) -> Tensor:
        """``weight`` ``(..., N, K)`` rounded to this grid."""
        grouped = split_groups(weight, self.scheme.group(self.in_features))
        return self.nearest_in_groups(grouped).flatten(-2)[..., : self.in_features]

    def nearest_in_groups(self, grouped: Tensor) -> Tensor:
        """The same of a weight in groups, ``(..., N, G, g)``: scales are not spread over columns first."""
        scales, zeros = self.scales[..., None], self.zeros[..., None]
        codes = (grouped / scales).round_().add_(zeros).clamp_(0, self.scheme.levels - 1)
        return codes.sub_(zeros).mul_(scales)


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes on a grid: one linear's weight, or those of E experts, ready to be stored or packed.

    Args:
        codes: ``(N, K)`` or ``(E, N, K)`` uint8, each in ``[0, 2**bits - 1]``.
        scales: ``(N, G)`` or ``(E, N, G)`` float16 (or the dtype a checkpoint stored).
        zeros: alike, uint8.
        scheme: bits, group size and symmetry.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    scheme: Scheme

    def __post_init__(self) -> None:
        *rows, k = self.codes.shape
        expected = (*rows, self.scheme.groups(k))
        for name, tensor in (("scales", self.scales), ("zeros", self.zeros)):
            if tuple(tensor.shape) != expected:
                raise ConfigError(
                    f"{name} of shape {tuple(tensor.shape)} do not fit codes of shape {(*rows, k)} with "
                    f"group_size={self.scheme.group_size}: expected {expected}"
                )

    @property
    def expert_count(self) -> int | None:
        """``E``, or None for the weight of one linear."""
        return self.codes.shape[0] if self.codes.ndim == 3 else None

    @property
    def out_features(self) -> int:
        """``N``."""
        return self.codes.shape[-2]

    @property
    def in_features(self) -> int:
        """``K``."""
        return self.codes.shape[-1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, shaped like the codes; the product is taken in float32, then rounded to ``dtype``."""
        group, k = self.scheme.group(self.in_features), self.in_features
        value = self.codes.float()
        if k % group:
            value -= expand_groups(self.zeros.float(), group, k)
            value *= expand_groups(self.scales.float(), group, k)
        else:  # without zeros and scales of every column: experts of a layer are many
            in_groups = value.unflatten(-1, (-1, group))
            in_groups -= self.zeros.float()[..., None]
            in_groups *= self.scales.float()[..., None]
        return value.to(dtype)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device."""
        return replace(
            self, codes=self.codes.to(device), scales=self.scales.to(device), zeros=self.zeros.to(device)
        )


def without_values(rows: Sequence[int], in_features: int, scheme: Scheme) -> QuantizedWeight:
    """A weight ``(*rows, K)`` on ``meta``: what needs only shapes takes it as any other."""
    codes = torch.empty(*rows, in_features, dtype=torch.uint8, device="meta")
    scales = torch.empty(*rows, scheme.groups(in_features), dtype=torch.float16, device="meta")
    return QuantizedWeight(codes, scales, scales.to(torch.uint8), scheme)


def stack(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight ``(E, N, K)`` of E weights ``(N, K)`` that share a scheme."""
    codes, scales, zeros = (
        torch.stack([getattr(weight, part) for weight in weights]) for part in ("codes", "scales", "zeros")
    )
    return QuantizedWeight(codes, scales, zeros, weights[0].scheme)


def packed_bytes(out_features: int, in_features: int, scheme: Scheme) -> int:
    """Bytes of a packed weight ``(N, K)``: codes and zero points at ``bits`` each, scales at 16 bits."""
    groups = out_features * scheme.groups(in_features)
    return ((out_features * in_features + groups) * scheme.bits + 7) // 8 + 2 * groups


def sample_rows(weight: Tensor, most: int) -> Tensor:
    """At most ``most`` rows of ``weight`` ``(..., N, C)``, evenly spaced; all of them for 0. Output losses
    are sums over rows, so two candidates can be compared on some of them."""
    return weight[..., :: -(-weight.shape[-2] // most), :] if most else weight


def expand_groups(per_group: Tensor, group: int, in_features: int) -> Tensor:
    """Spread ``(..., G)`` over columns: element ``k`` is that of group ``k // group``; ``(..., K)``."""
    if per_group.shape[-1] == 1:
        return per_group.expand(*per_group.shape[:-1], in_features)
    spread = per_group.unsqueeze(-1).expand(*per_group.shape, group)
    return spread.flatten(-2)[..., :in_features]


def split_groups(weight: Tensor, group: int) -> Tensor:
    """View ``(..., K)`` as ``(..., G, group)``; a ragged last group is padded with its own last column,
    which changes neither its minimum nor its maximum."""
    ragged = -weight.shape[-1] % group
    if ragged:
        weight = torch.cat([weight, weight[..., -1:].expand(*weight.shape[:-1], ragged)], dim=-1)
    return weight.unflatten(-1, (-1, group))


def grid_from_range(low: Tensor, high: Tensor, scheme: Scheme, in_features: int) -> Grid:
    """The uniform grid that covers ``[low, high]`` in every group.

    Args:
        low, high: ``(..., N, G)`` smallest and largest value to be represented.
        scheme: bits, group size, symmetry.
        in_features: ``K``.

    Scales are rounded to half precision first and everything else is computed from the rounded scale,
    so what is searched is exactly what is stored.
    """
    if scheme.zero_point:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scales = _half((high - low) / (scheme.levels - 1))
        zeros = torch.round(-low / scales).clamp_(0, scheme.levels - 1)
    else:
        # Codes reach from -levels/2 to levels/2 - 1 steps: aim the largest magnitude half-way between,
        # so that either sign of it is at most half a step away.
        scales = _half(torch.maximum(-low, high).clamp(min=0) / (scheme.levels / 2 - 0.5))
        zeros = torch.full_like(scales, scheme.levels // 2)
    return Grid(scales, zeros, scheme, in_features)


def minmax_grid(weight: Tensor, scheme: Scheme) -> Grid:
    """Round-to-nearest's grid: each group's own minimum and maximum. ``weight`` is ``(..., N, K)``."""
    grouped = split_groups(weight, scheme.group(weight.shape[-1]))
    return grid_from_range(grouped.amin(-1), grouped.amax(-1), scheme, weight.shape[-1])


def quantize(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Round-to-nearest quantization of ``weight`` ``(N, K)`` on its min-max grid."""
    grid = minmax_grid(weight.float(), scheme)
    return from_codes(grid.encode(weight.float()), grid)


def from_codes(codes: Tensor, grid: Grid) -> QuantizedWeight:
    """Integer form of float ``codes`` ``(..., N, K)`` on ``grid``."""
    return QuantizedWeight(
        codes.to(torch.uint8), grid.scales.to(torch.float16), grid.zeros.to(torch.uint8), grid.scheme
    )


def _half(scales: Tensor) -> Tensor:
    return scales.clamp(SMALLEST_SCALE, 65504.0).to(torch.float16).to(scales.dtype)
