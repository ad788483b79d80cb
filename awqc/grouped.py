"""``awqc::grouped_linear``: the linears of several experts on rows that are sorted by expert.

    y[offsets[e - 1]:offsets[e]] = x[offsets[e - 1]:offsets[e]] @ weight[e].T

The one form in which graphs hold a grouped matrix product, whatever library it came from: unlike those it
runs in every dtype, float64 for proofs included.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

LIBRARY = torch.library.Library("awqc", "FRAGMENT")
LIBRARY.define(
    "grouped_linear(Tensor x, Tensor weight, Tensor offsets) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The linears above; rows at and after ``offsets[-1]`` belong to no expert and come out as zeros.

    Args:
        x: ``(S, K)``, sorted by expert.
        weight: ``(E, N, K)``, any strides.
        offsets: ``(E,)`` integer, not decreasing: the first row after those of each expert.

    Returns:
        ``(S, N)`` in the dtype of ``x``.
    """
    if _in_one_launch(x, weight):
        offsets = offsets.to(x.device, torch.int32)
        y = F.grouped_mm(x, weight.mT, offs=offsets)
        beyond = torch.arange(len(x), device=x.device) >= offsets[-1]
        return y.masked_fill_(beyond[:, None], 0.0)
    y = x.new_zeros(len(x), weight.shape[1])
    for rows, out, matrix in zip(split_rows(x, offsets), split_rows(y, offsets), weight, strict=True):
        torch.mm(rows, matrix.t(), out=out)
    return y


def _in_one_launch(x: Tensor, weight: Tensor) -> bool:
    """Whether torch has a kernel for all experts: on Hopper and later for bfloat16, with rows of 16 bytes."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or weight.dtype != x.dtype or not len(x):
        return False
    whole = all(size % 8 == 0 for size in weight.shape[1:]) and 1 in weight.stride()[1:]
    aligned = x.is_contiguous() and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    return whole and aligned and torch.cuda.get_device_capability(x.device) >= (9, 0)


def split_rows(x: Tensor, offsets: Tensor) -> list[Tensor]:
    """The rows of ``x`` ``(S, ...)`` that belong to each of the E experts: E views ``(n_e, ...)``.

    Args:
        offsets: ``(E,)``, see :func:`grouped_linear`.
    """
    bounds = [0, *offsets.tolist()]
    return [x[start:end] for start, end in pairwise(bounds)]


LIBRARY.impl("grouped_linear", grouped_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("awqc::grouped_linear", lib=LIBRARY)
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))
