"""awqc, the AWQ compiler: any PyTorch or Hugging Face model in, a verified 4-bit model out."""

from awqc.analysis import Analysis, analyze
from awqc.api import compile
from awqc.backend import Backend, register_backend
from awqc.compiled import CompiledModel
from awqc.config import QuantConfig
from awqc.context import Context
from awqc.errors import AwqcError
from awqc.flags import Flags
from awqc.graph import Graph
from awqc.loading import load
from awqc.pipeline import Pass, Pipeline
from awqc.quantized import QuantizedWeight, Scheme
from awqc.report import Report

__version__ = "0.1.0"

__all__ = [
    "Analysis",
    "AwqcError",
    "Backend",
    "CompiledModel",
    "Context",
    "Flags",
    "Graph",
    "Pass",
    "Pipeline",
    "QuantConfig",
    "QuantizedWeight",
    "Report",
    "Scheme",
    "analyze",
    "compile",
    "load",
    "register_backend",
]
