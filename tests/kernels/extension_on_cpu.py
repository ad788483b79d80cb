"""The compiled host side, built for the CPU's dispatch key, with functions in the place of the driver's.

    python extension_on_cpu.py FOLDER

Prints what it launched as JSON. A process of its own: a library's registrations last as long as the process.
"""

from __future__ import annotations

import ctypes
import json
import sys
import timeit
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awqc.kernels import extension, marlin_fused, marlin_stream  # noqa: F401  the first two define the ops
from awqc.kernels.qlinear import LIBRARY

BUILT = Path(sys.argv[1])
NOTHING = """
extern "C" int launch(const void*, void*, void**, void**) { return 0; }
extern "C" int encode(...) { return 0; }
extern "C" int device(int* d) { return *d = -1, 0; }
extern "C" int stream(int, void** s) { return *s = nullptr, 0; }
"""
launched: list[dict[str, Any]] = []
encoded: list[list[int]] = []
fallbacks: list[str] = []


@ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
)
def launch(config: int, function: int, parameters: Any, extra: int | None) -> int:
    sizes = (ctypes.c_uint * 7).from_address(config)
    weights = []
    count = 2 if function == 2 else 1
    for i in range(count):
        record = ctypes.string_at(parameters[1] + i * marlin_stream._WEIGHT.size, marlin_stream._WEIGHT.size)
        weights.append(marlin_stream._WEIGHT.unpack(record))
    attributes = ctypes.c_void_p.from_address(config + 40).value
    number = ctypes.c_uint.from_address(config + 48).value
    launched.append(
        {
            "function": function,
            "sizes": list(sizes),
            "stream": ctypes.c_void_p.from_address(config + 32).value,
            "attributes": [
                list((ctypes.c_uint * 5).from_address(attributes + 72 * i)) for i in range(number)
            ],
            "weights": weights,
            "map_aligned": parameters[0] % 64 == 0,
            "numbers": [ctypes.c_int.from_address(parameters[i]).value for i in range(2, 6)],
        }
    )
    return 0


@ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_void_p,
    *[ctypes.POINTER(ctypes.c_uint64)] * 2,
    *[ctypes.POINTER(ctypes.c_uint32)] * 2,
    *[ctypes.c_int] * 4,
)
def encode(
    to: int, kind: int, rank: int, address: int, sizes: Any, strides: Any, box: Any, steps: Any, *modes: int
) -> int:
    encoded.append(
        [kind, rank, address, sizes[0], sizes[1], strides[0], box[0], box[1], steps[0], steps[1], *modes]
    )
    return 0


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int))
def device(found: Any) -> int:
    found[0] = -1  # what a tensor of the CPU says of itself
    return 0


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))
def stream(index: int, found: Any) -> int:
    found[0] = 77
    return 0


def in_python(name: str) -> Any:
    def run(x: Tensor, packed: Tensor, *rest: Any) -> Tensor:
        fallbacks.append(name)
        return x.new_full((*x.shape[:-1], next(v for v in rest if isinstance(v, int))), 5)

    return run


def main() -> None:
    library = ctypes.CDLL(str(extension.build(BUILT / "launch.so", "CPU")))
    for name, schema in (
        ("qlinear_marlin", "(Tensor x, Tensor packed, Tensor? bias, int n, int g, bool b) -> Tensor"),
        ("qlinear_marlin_gated", "(Tensor x, Tensor gate, Tensor up, int n, int g, bool b) -> Tensor"),
        (
            "qlinear_marlin_add",
            "(Tensor x, Tensor w, Tensor? bias, Tensor r, int n, int g, bool b) -> Tensor",
        ),
    ):
        LIBRARY.define(f"{name}_python{schema}")
        LIBRARY.impl(f"{name}_python", in_python(name), "CPU")
    plain, gated, add = (
        getattr(torch.ops.awqc, name).default
        for name in ("qlinear_marlin", "qlinear_marlin_gated", "qlinear_marlin_add")
    )
    x = torch.randn(1, 3, 128).half()
    packed, up = (torch.zeros(2, 1, 4, 1072, dtype=torch.uint8) for _ in range(2))
    bias, residual = torch.randn(100).half(), torch.randn(1, 3, 100).half()
    results: dict[str, Any] = {"unplanned": plain(x, packed, bias, 100, 128, False).unique().tolist()}

    functions = [ctypes.cast(f, ctypes.c_void_p) for f in (launch, encode, device, stream)]
    library.awqc_connect(*functions)

    def plan(function: int, gated: int, tokens: int) -> None:
        key = (ctypes.c_int64 * 8)(-1, 0, 0, 128, gated, 2, 1, tokens)
        library.awqc_plan(key, ctypes.c_void_p(function), 7, 256, 5000)

    plan(1, 0, 4)
    plan(2, 1, 4)
    y = plain(x, packed, bias, 100, 128, False)
    results["shape"], results["dtype"] = list(y.shape), str(y.dtype)
    z = gated(x, packed, up, 100, 128, False)
    w = add(x, packed, None, residual, 100, 128, False)
    results["addresses"] = {
        "x": x.data_ptr(),
        "packed": packed.data_ptr(),
        "up": up.data_ptr(),
        "bias": bias.data_ptr(),
        "residual": residual.data_ptr(),
        "y": y.data_ptr(),
        "z": z.data_ptr(),
        "w": w.data_ptr(),
    }
    results["launched"], results["encoded"] = list(launched), list(encoded)
    before = len(launched)
    fallbacks.clear()
    plain(torch.randn(5, 128).half(), packed, bias, 100, 128, False)  # no plan for 8 tokens
    plain(x, packed, bias, 100, 64, False)  # nor for this group
    plain(x.float(), packed, None, 100, 128, False)
    plain(x.transpose(1, 2).contiguous().transpose(1, 2), packed, None, 100, 128, False)
    plain(torch.randn(3 * 128 + 1).half()[1:].view(3, 128), packed, None, 100, 128, False)
    plain(x[:, :0], packed, None, 100, 128, False)
    plain(torch.randn(17, 128).half(), packed, None, 100, 128, False)
    plain(x, packed, bias.float(), 100, 128, False)
    add(x, packed, None, residual.transpose(1, 2).contiguous().transpose(1, 2), 100, 128, False)
    gated(x.bfloat16(), packed, up, 100, 128, False)
    results["fallbacks"], results["launches_meanwhile"] = list(fallbacks), len(launched) - before

    source = BUILT / "nothing.cpp"
    source.write_text(NOTHING)
    import shutil
    import subprocess

    compiler = str(shutil.which("g++") or shutil.which("clang++"))
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O2", "-o", str(BUILT / "nothing.so"), str(source)], check=True
    )
    nothing = ctypes.CDLL(str(BUILT / "nothing.so"))
    library.awqc_connect(
        *(
            ctypes.cast(f, ctypes.c_void_p)
            for f in (nothing.launch, nothing.encode, nothing.device, nothing.stream)
        )
    )
    with torch.no_grad():
        seconds = (
            min(timeit.repeat(lambda: plain(x, packed, bias, 100, 128, False), number=200, repeat=50)) / 200
        )
        empty = min(timeit.repeat(lambda: x.new_empty(1, 3, 100), number=200, repeat=50)) / 200
    results["microseconds"], results["of_an_empty_tensor"] = seconds * 1e6, empty * 1e6
    print(json.dumps(results))


main()
