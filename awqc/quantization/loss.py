"""The exact loss of replacing a weight, from the Gram matrix of its inputs.

For ``y = W x`` over calibration tokens, ``sum ||(W' - W) x||^2 = tr(E H E^T)`` with ``E = W' - W`` and
``H = sum x x^T``: every token counts, and the cost does not depend on how many there were.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from awqc.observers.grams import Gram, SampledGram

#: Output channels on which two ways to quantize one linear are compared, and errors reported.
GATE_ROWS = 128


def output_loss(error: Tensor, gram: Gram) -> Tensor:
    """``tr(E H E^T)`` for ``E`` ``(..., N, K)`` and ``H`` ``(K, K)``, which may be on the host; or for B
    matrices at once, ``(B, ..., N, K)`` and ``(B, K, K)``. What is left are the first dimensions of ``E``."""
    if isinstance(gram, SampledGram):
        return gram.loss(error)
    gram = gram.to(error.device)
    moved = error @ gram if gram.ndim == 2 else (error.flatten(1, -2) @ gram).view_as(error)
    return moved.mul_(error).sum((-2, -1))


def group_losses(error: Tensor, gram_blocks: Tensor) -> Tensor:
    """Loss of every quantization group on its own: ``e_g^T H_gg e_g``.

    Args:
        error: ``(..., N, G, g)``.
        gram_blocks: ``(..., G, g, g)`` diagonal blocks of the Gram matrix.

    Returns:
        ``(..., N, G)``.
    """
    by_group = error.transpose(-3, -2)  # (..., G, N, g): one matrix product a group
    return (by_group @ gram_blocks).mul_(by_group).sum(-1).mT


def gram_blocks(gram: Gram, group: int) -> Tensor:
    """The diagonal blocks of ``gram`` ``(..., K, K)``, one a group: ``(..., G, g, g)``; a ragged last one is
    padded with zeros."""
    if isinstance(gram, SampledGram):
        return gram.diagonal_blocks(group)
    whole, ragged = gram.shape[-1] // group, gram.shape[-1] % group
    square = gram[..., : whole * group, : whole * group].unflatten(-1, (whole, group))
    blocks = square.unflatten(-3, (whole, group)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    if not ragged:
        return blocks.contiguous()
    last = gram[..., None, -ragged:, -ragged:]
    return torch.cat([blocks, F.pad(last, (0, group - ragged, 0, group - ragged))], -3)
