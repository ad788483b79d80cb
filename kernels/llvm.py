"""LLVM code to machine code of this CPU at run time, with the LLVM that comes in the ``llvmlite`` wheel.

No compiler and no headers are needed. What was compiled is kept on disk, beside the GPU kernels, under a
name made of everything that decides it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from awqc.kernels.nvrtc import cache_folder, keep


@dataclass(frozen=True)
class Isa:
    """An instruction set: LLVM's name of a CPU, features on top, and all features that the host must have."""

    name: str
    cpu: str
    features: str
    needs: tuple[str, ...]


#: Best first.
ISAS = (
    Isa(
        "avx512vnni",
        "x86-64-v4",
        "+avx512vnni",
        ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512vnni"),
    ),
    Isa("avxvnni", "x86-64-v3", "+avxvnni", ("avx2", "fma", "f16c", "avxvnni")),
    Isa("avx2", "x86-64-v3", "", ("avx2", "fma", "f16c")),
)


@functools.cache
def _binding() -> ModuleType | None:
    try:
        import llvmlite.binding as binding
    except ImportError:
        return None
    try:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
    except RuntimeError:  # older ones want this first, newer ones refuse it
        binding.initialize()
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
    return binding


def missing() -> str | None:
    """Why nothing can be compiled for this machine, in one line; None if it can."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"is written for x86-64 CPUs, not for {platform.machine()}"
    if _binding() is None:
        return "needs llvmlite, which is not installed: pip install 'awqc[cpu]'"
    if openmp() is None:
        return f"needs OpenMP's threads, which torch {torch.__version__} here does not have"
    if host_isa() is None:
        return "needs a CPU with AVX2, FMA and F16C"
    return None


@functools.cache
def host_isas() -> tuple[Isa, ...]:
    """The instruction sets that this CPU has, best first."""
    binding = _binding()
    found = binding.get_host_cpu_features() if binding else {}
    return tuple(isa for isa in ISAS if all(found.get(need) for need in isa.needs))


def host_isa() -> Isa | None:
    """The best of them."""
    return next(iter(host_isas()), None)


@dataclass(frozen=True)
class OpenMP:
    """Addresses of the entry points of the OpenMP library whose threads torch uses."""

    parallel: int
    thread: int
    threads: int


@functools.cache
def openmp() -> OpenMP | None:
    """Those of torch's own threads: a second pool would compete with them for the cores."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Looks the names up in what torch was linked with, whatever else the process has loaded.
        torch_cpu = ctypes.CDLL(str(library))
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        addresses = [ctypes.cast(getattr(torch_cpu, name), ctypes.c_void_p).value for name in names]
    except (OSError, AttributeError):
        return None
    return OpenMP(*(address or 0 for address in addresses))


_LOADED: list[object] = []


def load(source: str, entry: str, isa: Isa) -> int:
    """The address of function ``entry`` of ``source``, compiled for ``isa`` unless the disk has it. It stays
    loaded for the life of the process.

    Raises:
        RuntimeError: with LLVM's message, if it rejects ``source``; with the name, if it needs a function
            from outside.
    """
    binding = _binding()
    assert binding is not None, "load() is for machines where nothing is missing"
    machine = _target(binding, isa)
    version = ".".join(map(str, binding.llvm_version_info))
    key = hashlib.sha256("\0".join((source, repr(isa), version)).encode()).hexdigest()
    kept = cache_folder() / f"{entry}-{isa.name}-{key[:32]}.o"
    try:
        code = kept.read_bytes()
    except OSError:
        code = _compile(binding, machine, source)
        keep(kept, code)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _LOADED.append(engine)
    return engine.get_function_address(entry)


def assembly(source: str, isa: Isa) -> str:
    """The instructions that ``source`` becomes on ``isa``, as text: for who wants to read them."""
    binding = _binding()
    assert binding is not None
    machine = _target(binding, isa)
    return machine.emit_assembly(_optimized(binding, machine, source))


def _target(binding: ModuleType, isa: Isa):  # type: ignore[no-untyped-def]
    triple = binding.Target.from_default_triple()
    return triple.create_target_machine(isa.cpu, isa.features, 3, codemodel="jitdefault")


def _optimized(binding: ModuleType, machine, source: str):  # type: ignore[no-untyped-def]
    module = binding.parse_assembly(source)
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=2)
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


def _compile(binding: ModuleType, machine, source: str) -> bytes:  # type: ignore[no-untyped-def]
    code = machine.emit_object(_optimized(binding, machine, source))
    # Names of functions of a C library or of a compiler's own, which nothing here would resolve.
    called = re.findall(rb"\0(__\w{3,}|mem\w{3,})(?=\0)", code)
    if called:
        names = ", ".join(sorted({name.decode() for name in called}))
        raise RuntimeError(f"LLVM {binding.llvm_version_info} makes calls of {names}: use another llvmlite")
    return code
