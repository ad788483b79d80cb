"""AutoAWQ's Triton kernels, for ``kernels.py`` to measure beside our own.

    pip download --no-deps autoawq==0.2.9 && tar xf autoawq-0.2.9.tar.gz
    python benchmarks/kernels.py --autoawq autoawq-0.2.9/awq/modules/triton/gemm.py

The package itself does not import beside a current transformers; the file of its kernels needs Triton alone.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from awqc.checkpoints.awq_layouts import pack_gemm


class AutoAwq:
    """What AutoAWQ's linear does without its CUDA extension, from its file of kernels."""

    name = "autoawq-triton"

    def __init__(self, file: Path) -> None:
        spec = importlib.util.spec_from_file_location("autoawq_triton_gemm", file)
        if spec is None or spec.loader is None:
            raise SystemExit(f"{file} is not a Python file")
        self.kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.kernels)

    @staticmethod
    def pack(codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        """The tensors of its ``gemm`` layout, from codes ``(N, K)`` and scales and zero points ``(N, G)``."""
        return {
            "qweight": pack_gemm(codes),
            "scales": scales.t().contiguous(),
            "qzeros": pack_gemm(zeros),
        }

    def __call__(self, x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor) -> Tensor:
        """``x @ W.T`` for ``x`` ``(M, K)`` float16: dense from 1024 tokens on, as its linear decides."""
        if x.shape[0] >= 1024:
            return torch.matmul(x, self.kernels.awq_dequantize_triton(qweight, scales, qzeros))
        return self.kernels.awq_gemm_triton(x, qweight, scales, qzeros, split_k_iters=8)
