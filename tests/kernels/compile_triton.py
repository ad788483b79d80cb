"""Compiles the Triton kernels for one target, without a device, and prints what came out as JSON.

    python compile_triton.py cuda:90

Run apart from the tests, which interpret kernels: Triton reads that from the environment once.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from awqc.kernels.jit.dequantize_triton import dequantize
from awqc.kernels.jit.experts_triton import experts_gemm
from awqc.kernels.jit.gemm_triton import add_shares, gemm
from awqc.quantization.columns_triton import round_columns

#: Numbers that are multiples of 16 for weights of usual sizes, which decides how wide loads are.
MULTIPLES = ("n", "k", "rows", "size", "factor_expert", "factor_column")


def compiled(
    kernel: Any, target: GPUTarget, types: dict[str, str], constants: dict[str, Any], **options: Any
) -> dict[str, int]:
    """What ``kernel`` becomes, as a launch with these arguments and options would compile it."""
    names = kernel.arg_names
    types = {**types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if types[name].startswith("*") or name in MULTIPLES
        },
    )
    asm = triton.compile(source, target=target, options={"num_warps": 2, **options}).asm
    nvidia = target.backend == "cuda"
    text = asm["ptx" if nvidia else "amdgcn"]
    return {
        "code": len(asm["cubin" if nvidia else "hsaco"]),
        "copies": text.count("cp.async.cg.shared") + text.count("cp.async.ca.shared"),
        "products": text.count("mma.sync" if nvidia else "mfma"),
        "quotients": text.count("div.rn.f32" if nvidia else "v_div_fixup_f32"),
    }


def main() -> None:
    """One line of JSON: for each kernel, its copies in flight, matrix instructions and exact divisions."""
    backend, _, arch = sys.argv[1].partition(":")
    nvidia = backend == "cuda"
    target = GPUTarget("cuda", int(arch), 32) if nvidia else GPUTarget("hip", arch, 64)
    dependent = nvidia and int(arch) >= 90
    weight = {"words_ptr": "*i16", "scales_ptr": "*fp16", "zeros_ptr": "*u8"}
    sizes = {"m": "i32", "n": "i32", "k": "i32", "rows": "i32", "groups": "i32"}
    found = {}
    for dtype in ("fp16", "bf16"):
        cut = {
            "group": 128,
            "run": 2,
            "width": 64,
            "block_m": 8 if nvidia else 16,
            "block_n": 32,
            "stages": 3,
        }
        common = {
            **cut,
            "whole_k": True,
            "whole_n": True,
            "ptx": nvidia,
            "widen": False,
            "dependent": dependent,
        }
        pointers = {"x_ptr": f"*{dtype}", "y_ptr": "*fp32", **weight}
        launches = {
            "gemm": (
                gemm,
                {**pointers, **sizes, "bias_ptr": f"*{dtype}"},
                {**common, "partial": True, "has_bias": False},
            ),
            "experts": (
                experts_gemm,
                {**pointers, **sizes, "ends_ptr": "*i32", "each": "i32"},
                {**common, "partial": True, "experts": 8, "padded": 16, "has_ends": True},
            ),
            "add_shares": (
                add_shares,
                {
                    "partial_ptr": "*fp32",
                    "bias_ptr": f"*{dtype}",
                    "y_ptr": f"*{dtype}",
                    "size": "i32",
                    "n": "i32",
                    "shares": "i32",
                },
                {"block": 256, "has_bias": True, "dependent": dependent},
            ),
            "dequantize": (
                dequantize,
                {**weight, "weight_ptr": f"*{dtype}", "n": "i32", "k": "i32", "rows": "i32", "groups": "i32"},
                {"group": 128, "run": 2, "width": 64, "block_n": 16, "whole_k": True, "ptx": nvidia},
            ),
        }
        for name, (kernel, types, constants) in launches.items():
            found[f"{name}-{dtype}"] = compiled(kernel, target, types, constants)
    floats = {f"{name}_ptr": "*fp32" for name in ("target", "wanted", "scales", "zeros", "factor")}
    pointers = {**floats, "rows_ptr": "*i64", "codes_ptr": "*u8"}
    sizes = ("start", "count", "n", "k", "factor_expert", "factor_column")
    # The feedback lies column by column.
    constants = {"factor_row": 1, "top": 15.0}
    cut = {"at_once": 32, "unrolled": 8, "block_n": 32}
    found["round_columns"] = compiled(
        round_columns,
        target,
        {**pointers, **dict.fromkeys(sizes, "i32")},
        {**constants, **cut},
        num_warps=1,
        enable_fp_fusion=False,
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
