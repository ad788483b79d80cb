"""nn.Module -> Graph: a ladder of ways, each compared with eager execution (see ``ladder``)."""

from __future__ import annotations

from awqc.capture.inputs import flat_inputs, keyword_arguments, other_inputs
from awqc.capture.ladder import capture
from awqc.capture.numerics import check_against_eager, eager_outputs, relative_error
from awqc.capture.report import CaptureReport

__all__ = [
    "CaptureReport",
    "capture",
    "check_against_eager",
    "eager_outputs",
    "flat_inputs",
    "keyword_arguments",
    "other_inputs",
    "relative_error",
]
