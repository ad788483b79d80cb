"""Whether an exported model is what it was made from: ONNX's checker, and a run in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from awqc.errors import VerifyError
from awqc.export.decoder import Interface

#: Tokens of the input that both are run on, and how many of them come in a first part.
_TOKENS, _FIRST = 24, 17


def check_file(path: Path) -> None:
    """Run ONNX's own checker, with shape inference.

    Raises:
        VerifyError: if it objects.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        raise VerifyError(f"{path} is not valid ONNX: {reason}; do not use it, and report this") from error


def session(path: Path, accuracy_level: int = 1) -> onnxruntime.InferenceSession:
    """The model in ONNX Runtime, on the CPU.

    Args:
        path: an ONNX file.
        accuracy_level: of the products that ONNX Runtime makes of DequantizeLinear and MatMul; without it,
            activations would be rounded to int8.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def largest_error(runtime: onnxruntime.InferenceSession, model: nn.Module, interface: Interface) -> float:
    """Relative error of the logits, ``|onnx - torch| / |torch|``, of two sequences of tokens.

    With past keys and values, the tokens go in in two parts, the second after the first.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.randint(vocabulary, (2, _TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits.double()
    if interface.layers is None:
        found = run(runtime, interface.feed(ids))[0]
    else:
        first, *past = run(runtime, interface.feed(ids[:, :_FIRST]))
        found = torch.cat([first, run(runtime, interface.feed(ids[:, _FIRST:], past))[0]], dim=1)
    return float((found.double() - expected).norm() / expected.norm())


def run(runtime: onnxruntime.InferenceSession, feed: dict[str, Tensor]) -> list[Tensor]:
    """The outputs for inputs by name, as tensors."""
    arrays = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in feed.items()}
    return [torch.from_numpy(array) for array in runtime.run(None, arrays)]
