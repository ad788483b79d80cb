"""CUDA kernels of this folder's ``.cu`` files, loaded through the driver and launched on torch's stream.

    scale = kernel("scale.cu", "scale", "PPfi", device, BLOCK=256)
    scale.launch((blocks,), (256,), (y.data_ptr(), x.data_ptr(), 2.0, n))

Everything slow (compiling, loading, raising the limit of shared memory) happens in :func:`kernel`, once for
each device; a launch is one driver call, made in torch's current stream, and can be captured.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from awqc.kernels.nvrtc import architecture, compile_source

_FOLDER = Path(__file__).parent

# Numbers of the driver API (cuda.h): attributes of functions and of launches.
_FUNCTION_SHARED_BYTES = 8
_CLUSTER = 4
_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class LaunchError(RuntimeError):
    """The driver refuses to load or to launch a kernel."""


#: ``CUtensorMapDataType`` and others of their kind.
_TENSOR_TYPES = {torch.float16: 6, torch.bfloat16: 9}
_SWIZZLE_128_BYTES, _PROMOTE_256_BYTES = 3, 3


class _Attribute(ctypes.Structure):
    """``CUlaunchAttribute``; its value is a union of 64 bytes, of which three numbers are used here."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


#: ``CUlaunchConfig``: grid, block, shared memory, stream, attributes and their number.
_CONFIG = struct.Struct("@7IPPI")


class _Buffers(threading.local):
    """Where one thread puts together the launches of a kernel: the driver copies from there.

    Args:
        size: bytes of all parameters.
        offsets: of each.
    """

    def __init__(self, size: int, offsets: Sequence[int]) -> None:
        self.values = ctypes.create_string_buffer(max(size, 1))
        start = ctypes.addressof(self.values)
        self.pointers = (ctypes.c_void_p * len(offsets))(*[start + offset for offset in offsets])
        self.config = ctypes.create_string_buffer(_CONFIG.size + 4)
        self.addresses = (ctypes.addressof(self.config), ctypes.addressof(self.pointers))


@functools.cache
def driver() -> ctypes.CDLL:
    """The CUDA driver.

    Raises:
        LaunchError: if the machine has none.
    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise LaunchError(f"no CUDA driver: {error}") from error


@functools.cache
def launcher() -> Callable[[int, int, int, None], int]:
    """``cuLaunchKernelEx`` on addresses."""
    launch = driver()["cuLaunchKernelEx"]
    launch.argtypes = [ctypes.c_void_p] * 4
    return launch


def current_stream(device: int) -> int:
    """The handle of torch's current stream on a device, without an object around it."""
    return int(torch._C._cuda_getCurrentRawStream(device))


def parameter_offsets(params: str) -> list[int]:
    """Where each parameter of the format ``params`` lies, in bytes from the first."""
    codes = re.findall(r"\d*[a-zA-Z]", params)
    # "0c" pads to the alignment of c and adds nothing.
    return [struct.calcsize(f"@{''.join(codes[:i])}0{code[-1]}") for i, code in enumerate(codes)]


class CudaKernel:
    """One entry point on one device.

    Args:
        cubin: machine code.
        entry: name of the ``extern "C" __global__`` function.
        params: its parameters as a format of :mod:`struct`: P pointer, i int, f float, q long long,
            ``128s`` a tensor map. The layout is C's, as that of kernel parameters is.
        device: index of the device.
        shared: dynamic shared memory in bytes that every launch gets.
        cluster: blocks of a cluster along x.
        dependent: let the kernel start before the one ahead of it in the stream has ended. It must then wait
            (``griddepcontrol.wait``) before it reads or writes what others write or read.
    """

    def __init__(
        self,
        cubin: bytes,
        entry: str,
        params: str,
        device: int,
        *,
        shared: int = 0,
        cluster: int = 1,
        dependent: bool = False,
    ) -> None:
        self._device = device
        self._format = struct.Struct(f"@{params}")
        self._buffers = _Buffers(self._format.size, parameter_offsets(params))
        #: Dynamic shared memory of a launch, in bytes.
        self.shared = shared
        self._launch = launcher()
        attributes = [_Attribute(_CLUSTER, 0, (cluster, 1, 1))] if cluster > 1 else []
        if dependent:
            attributes.append(_Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,)))
        self._attributes = (_Attribute * len(attributes))(*attributes)
        self._fixed = (ctypes.addressof(self._attributes), len(attributes))
        with torch.cuda.device(device):
            torch.empty(1, device="cuda")  # so that the device has a context, and it is current
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            _check(driver().cuModuleLoadData(ctypes.byref(module), cubin), "cuModuleLoadData")
            found = driver().cuModuleGetFunction(ctypes.byref(function), module, entry.encode())
            _check(found, f"cuModuleGetFunction({entry!r})")
            if shared > 48 * 1024:
                raised = driver().cuFuncSetAttribute(
                    function, ctypes.c_int(_FUNCTION_SHARED_BYTES), ctypes.c_int(shared)
                )
                _check(raised, f"{shared} bytes of shared memory for {entry!r}")
        #: The driver's handle of the function.
        self.handle: int = function.value or 0

    def launch(self, grid: Sequence[int], block: Sequence[int], args: Sequence[int | float | bytes]) -> None:
        """Launch on the current stream of the kernel's device.

        Args:
            grid, block: up to three sizes each.
            args: values of the parameters; pointers as ``tensor.data_ptr()``.

        Raises:
            LaunchError: if the driver refuses.
        """
        buffers, device = self._buffers, self._device
        self._format.pack_into(buffers.values, 0, *args)
        sizes = (*grid, 1, 1)[:3] + (*block, 1, 1)[:3]
        _CONFIG.pack_into(buffers.config, 0, *sizes, self.shared, current_stream(device), *self._fixed)
        config, pointers = buffers.addresses
        if torch.cuda.current_device() == device:
            status = self._launch(config, self.handle, pointers, None)
        else:
            with torch.cuda.device(device):
                status = self._launch(config, self.handle, pointers, None)
        if status:
            _check(status, f"cuLaunchKernelEx(grid={tuple(grid)}, block={tuple(block)})")


def tensor_map(matrix: Tensor, rows: int, columns: int) -> bytes:
    """The tensor map (``CUtensorMap``) by which bulk copies take boxes of ``matrix``, 128 bytes of a row
    swizzled in shared memory, with zeros for what lies outside.

    Args:
        matrix: contiguous ``(R, C)``, float16 or bfloat16, with rows that begin at multiples of 16 bytes.
        rows, columns: of a box; at most 256, and 64 columns.

    Raises:
        LaunchError: if the driver refuses.
    """
    return _tensor_map(matrix.data_ptr(), matrix.shape[0], matrix.shape[1], matrix.dtype, rows, columns)


# A map holds an address and sizes, nothing of the tensor that happens to be there.
@functools.lru_cache(maxsize=4096)
def _tensor_map(address: int, height: int, width: int, dtype: torch.dtype, rows: int, columns: int) -> bytes:
    storage = ctypes.create_string_buffer(128 + 64)
    start = -(-ctypes.addressof(storage) // 64) * 64
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(start),
        ctypes.c_int(_TENSOR_TYPES[dtype]),
        ctypes.c_uint(2),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(width, height),
        (ctypes.c_uint64 * 1)(width * dtype.itemsize),
        (ctypes.c_uint32 * 2)(columns, rows),
        (ctypes.c_uint32 * 2)(1, 1),
        ctypes.c_int(0),
        ctypes.c_int(_SWIZZLE_128_BYTES),
        ctypes.c_int(_PROMOTE_256_BYTES),
        ctypes.c_int(0),
    )
    if status:
        _check(status, f"cuTensorMapEncodeTiled of {(height, width)} in boxes of {(rows, columns)}")
    return ctypes.string_at(start, 128)


@functools.cache
def kernel(
    file: str,
    entry: str,
    params: str,
    device: torch.device,
    *,
    shared: int = 0,
    cluster: int = 1,
    dependent: bool = False,
    **defines: int | str,
) -> CudaKernel:
    """The kernel ``entry`` of ``file``, compiled with the macros ``defines`` for ``device`` and loaded there.

    Args:
        file: name of a ``.cu`` file of this folder.
        device: with an index; the others are those of :class:`CudaKernel`.

    Raises:
        CompileError: if the source does not compile.
        LaunchError: if the driver refuses the result.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    arch = architecture(torch.cuda.get_device_capability(index))
    cubin = compile_source(read_source(file), arch, defines, name=file)
    return CudaKernel(cubin, entry, params, index, shared=shared, cluster=cluster, dependent=dependent)


@functools.cache
def read_source(file: str) -> str:
    """Text of a ``.cu`` file of this folder, with its own ``#include "..."`` lines replaced by the files."""
    lines = []
    for line in (_FOLDER / file).read_text(encoding="utf-8").splitlines():
        included = line.strip().removeprefix('#include "')
        lines.append(read_source(included.rstrip('"')) if included != line.strip() else line)
    return "\n".join(lines)


def _check(status: int, call: str) -> None:
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(ctypes.c_int(status), ctypes.byref(text))
        raise LaunchError(f"{call}: {(text.value or b'unknown error').decode()} ({status})")
