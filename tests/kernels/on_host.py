"""Kernels on the CPU: compiled as C++ behind ``host_cuda.h``, with operands that end at a forbidden page."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

from torch import Tensor, empty_like

from awqc.kernels.cuda_launch import read_source

COMPILER = shutil.which("g++") or shutil.which("clang++")
_HERE = Path(__file__).parent


@functools.cache
def compiled(file: str, entry: str, shared: str, **defines: int) -> ctypes.CDLL:
    """The kernels of ``file`` with these macros and C functions ``entry`` that launch them, as a library.

    Args:
        shared: type of the shared memory that the file declares.
    """
    source = read_source(file)
    for kind in (
        "ptx",
        "bulk",
        "wgmma",
    ):  # files of a GPU's instructions as functions, with twins for the host
        source = source.replace(read_source(f"marlin_{kind}.cuh"), (_HERE / f"host_{kind}.h").read_text())
    folder = Path(tempfile.mkdtemp())
    shim = (_HERE / "host_cuda.h").read_text()
    (folder / "kernels.cpp").write_text("\n".join((shim, source, entry)))
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-fno-strict-aliasing", "-ffp-contract=off"]
    flags += [f"-DSHARED={shared}", *(f"-D{name}={value}" for name, value in defines.items())]
    command = [str(COMPILER), *flags, "-o", str(folder / "kernels.so"), str(folder / "kernels.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "kernels.so"))
    library.guarded.restype = ctypes.c_void_p
    shutil.rmtree(folder)
    return library


class Memory:
    """A copy of a tensor (NaN for what is to be written) in memory that ends where no access is allowed."""

    def __init__(self, library: ctypes.CDLL, tensor: Tensor | None) -> None:
        self.tensor = tensor
        self.pointer = ctypes.c_void_p(0)
        if tensor is not None:
            self.size = tensor.numel() * tensor.itemsize
            self.pointer = ctypes.c_void_p(library.guarded(ctypes.c_size_t(self.size)))
            ctypes.memmove(self.pointer, tensor.contiguous().data_ptr(), self.size)

    def read(self) -> Tensor:
        assert self.tensor is not None
        out = empty_like(self.tensor).contiguous()
        ctypes.memmove(out.data_ptr(), self.pointer, self.size)
        return out
