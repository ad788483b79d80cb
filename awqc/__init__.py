"""awqc, the AWQ compiler: any PyTorch or Hugging Face model in, a verified 4-bit model out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from awqc.analysis import Analysis, analyze
    from awqc.api import compile
    from awqc.backend import Backend, register_backend
    from awqc.config import QuantConfig
    from awqc.context import Context
    from awqc.errors import AwqcError
    from awqc.flags import Flags
    from awqc.graph import Graph
    from awqc.pipeline import Pass, Pipeline
    from awqc.planning.plan import Plan, plan
    from awqc.quantized import QuantizedWeight, Scheme
    from awqc.report import Report
    from awqc.runtime.compiled import CompiledModel
    from awqc.storage.loading import load
    from awqc.streaming import CompiledCheckpoint, compile_to

__version__ = "0.1.0"

__all__ = [
    "Analysis",
    "AwqcError",
    "Backend",
    "CompiledCheckpoint",
    "CompiledModel",
    "Context",
    "Flags",
    "Graph",
    "Pass",
    "Pipeline",
    "Plan",
    "QuantConfig",
    "QuantizedWeight",
    "Report",
    "Scheme",
    "analyze",
    "compile",
    "compile_to",
    "load",
    "plan",
    "register_backend",
]

#: The module of every public name. Each is imported when first asked for: torch and transformers take
#: seconds to import, which ``awqc --help`` should not.
_MODULES = {
    "Analysis": "awqc.analysis",
    "AwqcError": "awqc.errors",
    "Backend": "awqc.backend",
    "CompiledCheckpoint": "awqc.streaming",
    "CompiledModel": "awqc.runtime.compiled",
    "Context": "awqc.context",
    "Flags": "awqc.flags",
    "Graph": "awqc.graph",
    "Pass": "awqc.pipeline",
    "Pipeline": "awqc.pipeline",
    "Plan": "awqc.planning",
    "QuantConfig": "awqc.config",
    "QuantizedWeight": "awqc.quantized",
    "Report": "awqc.report",
    "Scheme": "awqc.quantized",
    "analyze": "awqc.analysis",
    "compile": "awqc.api",
    "compile_to": "awqc.streaming",
    "load": "awqc.storage.loading",
    "plan": "awqc.planning",
    "register_backend": "awqc.backend",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
