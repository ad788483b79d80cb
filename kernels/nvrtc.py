"""CUDA C++ to machine code at run time, with the compiler that comes with torch's own wheels.

Nothing but NVRTC is needed: no nvcc, no headers, no GPU. Results are kept on disk under a name made of
everything that decides them, so that a machine compiles each kernel once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch


class CompileError(RuntimeError):
    """A CUDA source that NVRTC rejects, with its log; or no NVRTC to ask."""


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``AWQC_KERNEL_CACHE``, or ``awqc/kernels`` in the user's cache."""
    chosen = os.environ.get("AWQC_KERNEL_CACHE")
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "awqc" / "kernels"


def library_paths() -> list[Path]:
    """Every NVRTC in reach, best first: that of torch's CUDA version, then newer before older.

    The wheels put it in ``nvidia/cu13/lib`` or ``nvidia/cuda_nvrtc/lib`` of site-packages, and older torch
    builds in ``torch/lib``.
    """
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    found = [path for root in roots for path in root.glob("*/lib/libnvrtc.so.*")]
    found += (Path(torch.__file__).parent / "lib").glob("libnvrtc*.so*")
    found = [path for path in found if "builtins" not in path.name and ".alt." not in path.name]
    major = (torch.version.cuda or "").partition(".")[0]
    return sorted(found, key=lambda path: (path.name.endswith(f".{major}"), path.name), reverse=True)


@functools.cache
def _library() -> ctypes.CDLL:
    for path in library_paths():
        # NVRTC opens its builtins by name: what is loaded already is found.
        for builtins in path.parent.glob("libnvrtc-builtins*.so*"):
            if ".alt." not in builtins.name:
                ctypes.CDLL(str(builtins))
        return ctypes.CDLL(str(path))
    names = [f"libnvrtc.so.{major}" for major in (13, 12)]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CompileError(
        f"no NVRTC: looked for */lib/libnvrtc.so.* in the 'nvidia' packages beside torch "
        f"{torch.__version__}, in torch/lib, and for {' and '.join(names)} on the library path; install "
        "torch's CUDA build, or nvidia-cuda-nvrtc"
    )


def available() -> bool:
    """Whether there is an NVRTC to compile with."""
    try:
        _library()
    except CompileError:
        return False
    return True


@functools.cache
def version() -> tuple[int, int]:
    """Version of NVRTC.

    Raises:
        CompileError: if there is none.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return major.value, minor.value


def architecture(capability: tuple[int, int]) -> str:
    """NVRTC's name for a compute capability. Hopper's matrix instructions need its own ``a`` target."""
    return "sm_{}{}{}".format(*capability, "a" if capability == (9, 0) else "")


def compile_source(
    source: str,
    arch: str,
    defines: Mapping[str, int | str] | None = None,
    options: Sequence[str] = (),
    name: str = "kernel.cu",
) -> bytes:
    """The cubin of ``source`` for ``arch``, from the disk if it was compiled before.

    Args:
        source: CUDA C++ without includes; entry points are ``extern "C" __global__``.
        arch: ``"sm_80"``, ``"sm_90a"``...; see :func:`architecture`.
        defines: macros by name.
        options: further options of NVRTC.
        name: what the source is called in messages.

    Raises:
        CompileError: with NVRTC's log, if the source does not compile.
    """
    flags = _flags(arch, defines, options)
    key = hashlib.sha256("\0".join((source, *flags, repr(version()))).encode()).hexdigest()
    kept = cache_folder() / f"{Path(name).stem}-{arch}-{key[:32]}.cubin"
    try:
        return kept.read_bytes()
    except OSError:
        pass
    cubin, _ = compile_with_log(source, flags, name)
    keep(kept, cubin)
    return cubin


def compile_ptx(
    source: str, arch: str, defines: Mapping[str, int | str] | None = None, name: str = "kernel.cu"
) -> str:
    """The intermediate code from which :func:`compile_source` would make machine code.

    Raises:
        CompileError: with NVRTC's log, if the source does not compile.
    """
    ptx, _ = compile_with_log(source, _flags(arch, defines), name, "PTX")
    return ptx.rstrip(b"\0").decode()


def _flags(arch: str, defines: Mapping[str, int | str] | None, options: Sequence[str] = ()) -> list[str]:
    macros = (f"-D{key}={value}" for key, value in (defines or {}).items())
    return [f"--gpu-architecture={arch}", "--std=c++17", *macros, *options]


def compile_with_log(
    source: str, flags: Sequence[str], name: str = "kernel.cu", form: str = "CUBIN"
) -> tuple[bytes, str]:
    """The cubin of ``source``, or its ``form`` ``"PTX"``, and what NVRTC said, without the cache.

    ``--ptxas-options=-v`` among the flags makes the log state registers, stack frame and spills.

    Raises:
        CompileError: with NVRTC's log, if the source does not compile.
    """
    lib = _library()
    program = ctypes.c_void_p()
    encoded = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    created = lib.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), name.encode(), ctypes.c_int(0), None, None
    )
    _check(created, "nvrtcCreateProgram")
    try:
        status = lib.nvrtcCompileProgram(program, ctypes.c_int(len(flags)), encoded)
        log = _read("Log", "ProgramLog", program).rstrip(b"\0").decode()
        if status:
            raise CompileError(f"NVRTC {version()} rejects {name} with {' '.join(flags)}:\n{log}")
        return _read("Size", form, program), log
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _read(kind: str, what: str, program: ctypes.c_void_p) -> bytes:
    lib = _library()
    size = ctypes.c_size_t()
    _check(getattr(lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"nvrtcGet{what}{kind}")
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(lib, f"nvrtcGet{what}")(program, buffer), f"nvrtcGet{what}")
    return buffer.raw


def _check(status: int, call: str) -> None:
    if status:
        text = _library().nvrtcGetErrorString
        text.restype = ctypes.c_char_p
        raise CompileError(f"{call}: {text(status).decode()}")


def keep(path: Path, data: bytes) -> None:
    """Write ``data`` under its final name at once, so that no other process reads half of it. A folder that
    cannot be written costs a compilation each time, nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(draft, path)
    except OSError:
        return
