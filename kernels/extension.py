"""The optional compiled host side of marlin's ops: 1-2 microseconds a call in the place of Python's tens.

    python -m awqc.kernels.extension            # builds it into this folder, with any C++ compiler

``launch_marlin.cpp`` launches what Python has compiled and planned; device code is the same. It links to
PyTorch's stable ABI alone, so one build serves torch 2.11 and later, and needs no CUDA toolkit. Where the
library lies beside this file it is taken; ``AWQC_EXTENSION`` names another, or is 0 for none. Without one the
ops run in Python.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from awqc.kernels.qlinear import LIBRARY

_FOLDER = Path(__file__).parent
#: What is built: the name says which ABI it is made for.
LIBRARY_FILE = _FOLDER / "launch_marlin.torch2.11.so"
_SOURCE = _FOLDER / "launch_marlin.cpp"
#: ``TORCH_TARGET_VERSION``: 2.11.
_ABI = "0x020b000000000000"


class BuildError(RuntimeError):
    """No compiler, or one that rejects the source."""


def build(out: Path = LIBRARY_FILE, device: str = "CUDA") -> Path:
    """Compile the extension with ``CXX``, or the C++ compiler on the path.

    Args:
        out: the library to write.
        device: dispatch key of its ops; tests build it for the CPU.

    Raises:
        BuildError: with the compiler's messages.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        raise BuildError("no C++ compiler: install g++ or clang++, or set CXX")
    torch_folder = Path(torch.__file__).parent
    command = [
        *(compiler, "-std=c++17", "-O2", "-shared", "-fPIC", f"-DTORCH_TARGET_VERSION={_ABI}"),
        *(f"-DDEVICE={device}", f"-I{torch_folder / 'include'}", "-o", str(out), str(_SOURCE)),
        *(f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}:\n{done.stderr}")
    return out


@functools.cache
def loaded() -> ctypes.CDLL | None:
    """The extension, its ops registered, if it is there and wanted."""
    file = Path(os.environ.get("AWQC_EXTENSION") or LIBRARY_FILE)
    return ctypes.CDLL(str(file)) if file.is_file() else None


def implement_in_python(op: str, schema: str, function: Callable[..., Tensor]) -> None:
    """Register ``function`` for ``awqc::op`` on CUDA; with the extension, for ``awqc::op_python``, which that
    calls where it has no plan."""
    name = op
    if loaded() is not None:
        name = f"{op}_python"
        LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, function, "CUDA")


@functools.cache
def _connected() -> ctypes.CDLL | None:
    """The extension with the addresses of what it calls."""
    library = loaded()
    if library is None:
        return None
    from awqc.kernels.cuda_launch import driver

    own = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"))
    functions = (
        driver().cuLaunchKernelEx,
        driver().cuTensorMapEncodeTiled,
        driver().cuCtxGetDevice,
        own.aoti_torch_get_current_cuda_stream,
    )
    library.awqc_connect(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))
    return library


def plan(key: Sequence[int], function: int, blocks: int, threads: int, shared: int) -> None:
    """Let calls of this kind be launched by the extension, if there is one.

    Args:
        key: device, activations in bfloat16, scales in bfloat16, group, gated, blocks of rows, blocks of
            channels, tokens.
        function: the driver's handle of the kernel.
        blocks, threads, shared: of a launch.
    """
    library = _connected()
    if library is not None:
        library.awqc_plan((ctypes.c_int64 * 8)(*key), ctypes.c_void_p(function), blocks, threads, shared)


def main() -> int:
    """Build, and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=LIBRARY_FILE, help="the library to write")
    options = parser.parse_args()
    try:
        print(build(options.out))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
