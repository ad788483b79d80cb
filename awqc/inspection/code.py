"""The code of the kernels that a node runs."""

from __future__ import annotations

from typing import Literal

from awqc.errors import BackendError, ConfigError
from awqc.inspection.cost import arguments, find, like, result
from awqc.inspection.subject import Subject
from awqc.kernels.launch import launches
from awqc.kernels.machine_code import sass
from awqc.kernels.nvrtc import CompileError

Form = Literal["ptx", "sass"]


def code(subject: Subject, name: str, form: Form) -> str:
    """What is compiled for the node or linear called ``name``, one kernel after the other.

    Raises:
        ConfigError: if there is no such node, it is run by a library, or the hardware is not NVIDIA's.
        BackendError: if the compiler is missing or fails.
    """
    node = find(subject, name)
    if node is None:
        raise unknown(subject, name)
    target, capability = node.target, subject.hardware.capability
    assert callable(target)
    found = launches(target, subject.hardware, arguments(node), result(node))
    ours = [launch for launch in found if launch.code is not None]
    if not ours or capability is None:
        routines = ", ".join(dict.fromkeys(launch.kernel for launch in found))
        raise ConfigError(
            f"{name!r} runs {routines} on {subject.hardware.name}, which is no GPU code of awqc's own: "
            "--on GPU chooses another device"
        )
    parts = []
    for launch in ours:
        assert launch.code is not None
        try:
            text = launch.code.ptx(capability) if form == "ptx" else sass(launch.code, capability)
        except CompileError as error:
            raise BackendError(f"{launch.kernel}: {error}") from error
        parts.append(f"// {launch.kernel} of {name}, grid {launch.grid}, block {launch.block}\n{text}")
    return "\n".join(parts)


def unknown(subject: Subject, name: str) -> ConfigError:
    """The error for a name that is no node and no linear."""
    names = [*subject.linears, *(n.name for n in subject.graph.nodes if n.op == "call_function")]
    near = like(names, name)
    hint = f": did you mean {' or '.join(near)}?" if near else ""
    return ConfigError(f"no node and no quantized linear is called {name!r}{hint}")
