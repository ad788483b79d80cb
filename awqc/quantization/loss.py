"""The exact loss of replacing a weight, from the Gram matrix of its inputs.

For ``y = W x`` over calibration tokens, ``sum ||(W' - W) x||^2 = tr(E H E^T)`` with ``E = W' - W`` and
``H = sum x x^T``: every token counts, and the cost does not depend on how many there were.
"""

from __future__ import annotations

from torch import Tensor

from awqc.observers.grams import Gram, SampledGram

#: Output channels on which two ways to quantize one linear are compared, and errors reported.
GATE_ROWS = 128


def output_loss(error: Tensor, gram: Gram) -> Tensor:
    """``tr(E H E^T)`` for ``E`` ``(..., N, K)`` and ``H`` ``(K, K)``, which may be on the host; shape
    ``(...)``."""
    if isinstance(gram, SampledGram):
        return gram.loss(error)
    gram = gram.to(error.device)
    return ((error @ gram) * error).sum((-2, -1))


def group_losses(error: Tensor, gram_blocks: Tensor) -> Tensor:
    """Loss of every quantization group on its own: ``e_g^T H_gg e_g``.

    Args:
        error: ``(N, G, g)``.
        gram_blocks: ``(G, g, g)`` diagonal blocks of the Gram matrix.

    Returns:
        ``(N, G)``.
    """
    by_group = error.transpose(0, 1)  # (G, N, g): one matrix product a group
    return ((by_group @ gram_blocks) * by_group).sum(-1).T


def gram_blocks(gram: Gram, group: int) -> Tensor:
    """The diagonal blocks of ``gram`` ``(K, K)``, one a group: ``(G, g, g)``; a ragged last one is padded
    with zeros."""
    if isinstance(gram, SampledGram):
        return gram.diagonal_blocks(group)
    width = gram.shape[0]
    count = -(-width // group)
    blocks = gram.new_zeros(count, group, group)
    for g in range(count):
        block = gram[g * group : (g + 1) * group, g * group : (g + 1) * group]
        blocks[g, : block.shape[0], : block.shape[1]] = block
    return blocks
