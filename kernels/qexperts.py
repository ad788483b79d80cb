"""``awqc::qexperts``: the linears of several experts on quantized weights, and its reference.

    y[rows of e] = x[rows of e] @ W[e].T,   W[e, n, k] = (codes[e, n, k] - zeros[e, n, g]) * scales[e, n, g]

Rows are sorted by expert, with the end of each expert's share in ``offsets``; or there are equally many for
each, and no offsets. The reference dequantizes one expert at a time, and only those that have rows, in the
arithmetic of ``awqc::qlinear``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from awqc.kernels.hardware import Hardware
from awqc.kernels.launch import Launch, describes
from awqc.kernels.qlinear import LIBRARY, qlinear
from awqc.kernels.qlinear import describe as describe_linear

LIBRARY.define(
    "qexperts(Tensor x, Tensor? offsets, Tensor codes, Tensor scales, Tensor zeros, int group_size)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def qexperts(
    x: Tensor, offsets: Tensor | None, codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int
) -> Tensor:
    """The linears above.

    Args:
        x: ``(S, K)`` sorted by expert, or ``(E, T, K)``; any floating dtype and strides.
        offsets: ``(E,)`` integer, not decreasing: the first row after those of each expert. Rows from the
            last on belong to no expert and come out as zeros. None for ``x`` ``(E, T, K)``.
        codes: ``(E, N, K)`` uint8, one code to a byte whatever its width.
        scales: ``(E, N, G)`` floating.
        zeros: ``(E, N, G)`` integer or floating.
        group_size: input channels that share a scale; -1 for the whole row.

    Returns:
        ``(S, N)`` or ``(E, T, N)`` in the dtype of ``x``.
    """
    y = x.new_zeros(*x.shape[:-1], codes.shape[1])
    for expert, rows, out in shares(x, y, offsets):
        out.copy_(qlinear(rows, codes[expert], scales[expert], zeros[expert], None, group_size))
    return y


def shares(x: Tensor, y: Tensor, offsets: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Every expert that has rows, its rows of ``x`` and its rows of the result ``y``."""
    if offsets is None:
        yield from ((e, x[e], y[e]) for e in range(len(x)) if x.shape[1])
        return
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        end = int(end)  # counts may come as floats
        if end > start:
            yield expert, x[start:end], y[start:end]
        start = end


def pack_each(
    pack: Callable[..., tuple[Mapping[str, Tensor | None], tuple[Any, ...]]],
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    **options: Any,
) -> tuple[dict[str, Tensor | None], tuple[Any, ...]]:
    """What ``pack`` makes of every expert, stacked; without a bias, which experts have outside.

    Args:
        pack: of a kernel of ``awqc::qlinear``.
        codes, scales, zeros, bits, group_size, options: as it takes them, one dimension more.
    """
    packed: list[Mapping[str, Tensor | None]] = []
    for parts in zip(codes, scales, zeros, strict=True):
        tensors, constants = pack(*parts, None, bits, group_size, **options)
        packed.append(tensors)
    together: dict[str, Tensor | None] = {}
    for name in packed[0]:
        found = [tensor for one in packed if (tensor := one[name]) is not None]
        together[name] = torch.stack(found) if found else None
    del together["bias"]
    return together, constants


def busiest(x: Tensor, offsets: Tensor | None, count: int) -> tuple[int, Tensor]:
    """How many of ``count`` experts have rows of ``x`` if the rows are spread over as many as can be, and the
    rows of one of them; the values of ``offsets`` are not looked at."""
    if offsets is None:
        return (len(x) if x.shape[1] else 0), x[0]
    experts = min(count, len(x))
    return experts, x[: -(-len(x) // max(experts, 1))]


LIBRARY.impl("qexperts", qexperts, "CompositeExplicitAutograd")


@describes(torch.ops.awqc.qexperts.default)
def describe(
    at: Hardware,
    x: Tensor,
    offsets: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
) -> list[Launch]:
    """What :func:`qexperts` does for each expert that has rows: as many as can have some."""
    experts, rows = busiest(x, offsets, codes.shape[0])
    return experts * describe_linear(at, rows, codes[0], scales[0], zeros[0], None, group_size)


@torch.library.register_fake("awqc::qexperts", lib=LIBRARY)
def _(
    x: Tensor, offsets: Tensor | None, codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[1]))
