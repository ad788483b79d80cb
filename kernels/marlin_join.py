"""Partial sums of ``marlin_wide.cu`` joined in their order: ``marlin_join.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from awqc.kernels.cuda_launch import kernel
from awqc.kernels.launch import Launch, nbytes
from awqc.kernels.machine_code import CudaCode

_THREADS = 256


def join(out: Tensor, partials: Tensor, bias: Tensor | None) -> None:
    """``out = partials.sum(0) + bias``, added first to last and rounded once.

    Args:
        out: ``(M, N)`` float16 or bfloat16, written.
        partials: ``(S, M, N)`` float32.
        bias: ``(N,)`` of the dtype of ``out``, or None.
    """
    split, tokens, n = partials.shape
    defines = _macros(split, n, out.dtype)
    run = kernel("marlin_join.cu", "join", "PPPii", out.device, dependent=True, **defines)
    elements = tokens * n
    run.launch(
        _grid(elements, n),
        (_THREADS,),
        (out.data_ptr(), partials.data_ptr(), 0 if bias is None else bias.data_ptr(), elements, n),
    )


def join_launch(split: int, tokens: int, n: int, dtype: torch.dtype, bias: Tensor | None) -> Launch:
    """The launch of :func:`join` for partial sums ``(split, tokens, n)``."""
    elements = tokens * n
    return Launch(
        "marlin_join.cu:join",
        4 * split * elements + nbytes(bias),
        dtype.itemsize * elements,
        grid=_grid(elements, n),
        block=(_THREADS,),
        config={"split": split},
        code=CudaCode("marlin_join.cu", "join", _macros(split, n, dtype)),
    )


def _macros(split: int, n: int, dtype: torch.dtype) -> dict[str, int]:
    return {
        "BF16": int(dtype == torch.bfloat16),
        "SPLIT": split,
        "WIDTH": _width(n),
    }


def _width(n: int) -> int:
    """Elements of a thread."""
    return 1 if n % 4 else 4


def _grid(elements: int, n: int) -> tuple[int]:
    return (-(-elements // (_THREADS * _width(n))),)
