"""The machine code of kernels, for whoever wants to read it: no GPU is needed.

CUDA sources are compiled by NVRTC, Triton's functions by Triton with the ``ptxas`` of its own wheel, which
also brings the disassembler.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from awqc.kernels import nvrtc
from awqc.kernels.cuda_launch import read_source
from awqc.kernels.launch import Code
from awqc.kernels.nvrtc import CompileError, architecture


@dataclass(frozen=True)
class CudaCode:
    """An entry point of a ``.cu`` file of this folder.

    Args:
        file: its name.
        entry: the ``extern "C" __global__`` function.
        defines: macros.
    """

    file: str
    entry: str
    defines: Mapping[str, int | str]

    def ptx(self, capability: tuple[int, int]) -> str:
        """See :class:`awqc.kernels.launch.Code`."""
        arch = architecture(capability)
        return nvrtc.compile_ptx(read_source(self.file), arch, self.defines, name=self.file)

    def cubin(self, capability: tuple[int, int]) -> bytes:
        """See :class:`awqc.kernels.launch.Code`."""
        arch = architecture(capability)
        return nvrtc.compile_source(read_source(self.file), arch, self.defines, name=self.file)


@dataclass(frozen=True)
class TritonCode:
    """A function of :mod:`awqc.kernels.jit` with types and constants of its arguments.

    Args:
        function: what ``triton.jit`` made.
        signature: Triton's type of every argument by name, ``constexpr`` for constants.
        constants: values of constants.
        aligned: positions of the arguments that are multiples of 16.
        options: of the compilation, such as ``num_warps``.
    """

    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def entry(self) -> str:
        """Name of the function."""
        return str(self.function.fn.__name__)

    def ptx(self, capability: tuple[int, int]) -> str:
        """See :class:`awqc.kernels.launch.Code`."""
        return str(self._compiled(capability).asm["ptx"])

    def cubin(self, capability: tuple[int, int]) -> bytes:
        """See :class:`awqc.kernels.launch.Code`."""
        return bytes(self._compiled(capability).asm["cubin"])

    def shared_bytes(self, capability: tuple[int, int]) -> int:
        """Shared memory that a program takes, as Triton allots it."""
        return int(self._compiled(capability).metadata.shared)

    def _compiled(self, capability: tuple[int, int]) -> Any:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        if not isinstance(self.function, triton.JITFunction):
            raise CompileError("Triton interprets its kernels here: unset TRITON_INTERPRET to compile them")
        source = (_gluon_source() if self.function.is_gluon() else ASTSource)(
            self.function,
            dict(self.signature),
            {(self.function.arg_names.index(name),): value for name, value in self.constants.items()},
            {(index,): [["tt.divisibility", 16]] for index in self.aligned},
        )
        major, minor = capability
        target = GPUTarget("cuda", 10 * major + minor, 32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of defaults that will change
            return triton.compile(source, target=target, options=dict(self.options))


def _gluon_source() -> Any:
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def disassembler() -> Path:
    """NVIDIA's ``cuobjdump``: of a CUDA toolkit on the path, or of Triton's wheel.

    Raises:
        CompileError: if there is none.
    """
    found = shutil.which("cuobjdump")
    if found is not None:
        return Path(found)
    spec = importlib.util.find_spec("triton")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        bundled = Path(root) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if bundled.is_file():
            return bundled
    raise CompileError("no cuobjdump: install a CUDA toolkit, or triton, whose wheel brings it along")


def sass(code: Code, capability: tuple[int, int]) -> str:
    """The instructions of ``code`` as text.

    Raises:
        CompileError: if there is no disassembler, or it does not read what the compiler wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(code.cubin(capability))
        command = [str(disassembler()), "--dump-sass", "--function", code.entry, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"cuobjdump does not read the machine code: {done.stderr.strip()}")
    return done.stdout.strip() + "\n"
