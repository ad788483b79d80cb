"""Everything here needs the packages of the extra ``onnx``."""

from __future__ import annotations

import pytest

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'awqc[onnx]'")
