"""Partial sums of the marlin kernels joined in their order: ``marlin_join.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from awqc.kernels.cuda_launch import kernel

_THREADS = 256


def join(out: Tensor, partials: Tensor, bias: Tensor | None, dependent: bool) -> None:
    """``out = partials.sum(0) + bias``, added first to last and rounded once.

    Args:
        out: ``(M, N)`` float16 or bfloat16, written.
        partials: ``(S, M, N)`` float32.
        bias: ``(N,)`` of the dtype of ``out``, or None.
        dependent: let the launch begin before the kernel ahead has ended (compute capability 9.0 on).
    """
    split, tokens, n = partials.shape
    width = 1 if n % 4 else 4
    run = kernel(
        "marlin_join.cu",
        "join",
        "PPPii",
        out.device,
        dependent=dependent,
        BF16=int(out.dtype == torch.bfloat16),
        SPLIT=split,
        WIDTH=width,
        HOPPER=int(dependent),
    )
    elements = tokens * n
    run.launch(
        (-(-elements // (_THREADS * width)),),
        (_THREADS,),
        (out.data_ptr(), partials.data_ptr(), 0 if bias is None else bias.data_ptr(), elements, n),
    )
