"""Decoding speed, size and agreement of exported models in ONNX Runtime on the CPU.

    python benchmarks/onnx_decode.py --model FLOAT_DIR --checkpoint AWQC_DIR --threads 1

Each model is exported and run one token at a time on the keys and values of those before, greedily, after a
prompt of random tokens. Reported: bytes of the ONNX file; tokens a second, the median of the repetitions,
which go round-robin over the models after one run that is not counted; relative error of the logits against
the torch model that was exported, and how many of the first 32 greedy tokens are its own; seconds of the
export.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers

from awqc.cli.models import open_model
from awqc.export.check import largest_error, run, session
from awqc.export.decoder import Interface, interface
from awqc.export.onnx import MODEL_FILE, OnnxConfig, export_onnx

#: Greedy tokens that are compared.
COMPARED = 32


@dataclass
class Entry:
    """One exported model.

    Args:
        name: printed.
        bytes: of the ONNX file.
        seconds: of the export.
        error: of the logits.
        equal: tokens that agree, of the first 32.
        runtime: ready to run.
        interface: its inputs and outputs.
    """

    name: str
    bytes: int
    seconds: float
    error: float
    equal: int
    runtime: onnxruntime.InferenceSession
    interface: Interface


def decode(entry: Entry, ids: torch.Tensor, count: int) -> tuple[list[int], float]:
    """``count`` greedy tokens after ``ids``, and tokens a second from the second on."""
    logits, *past = run(entry.runtime, entry.interface.feed(ids))
    tokens = [int(logits[0, -1].argmax())]
    began = time.perf_counter()
    while len(tokens) < count:
        logits, *past = run(entry.runtime, entry.interface.feed(torch.tensor([tokens[-1:]]), past))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens, (count - 1) / (time.perf_counter() - began)


def exported(
    name: str, model: Any, out: Path, config: OnnxConfig, accuracy_level: int, ids: torch.Tensor
) -> Entry:
    """Export ``model`` and compare it with itself in torch."""
    began = time.perf_counter()
    result = export_onnx(model, out, config, check=False)
    seconds = time.perf_counter() - began
    shape, runtime = interface(model, past=True), session(out / MODEL_FILE, accuracy_level)
    entry = Entry(name, result.bytes, seconds, largest_error(runtime, model, shape), 0, runtime, shape)
    with torch.no_grad():
        own = model.generate(ids, max_new_tokens=COMPARED, do_sample=False, eos_token_id=None, pad_token_id=0)
    entry.equal = sum(
        a == b for a, b in zip(own[0, ids.shape[1] :].tolist(), decode(entry, ids, COMPARED)[0], strict=True)
    )
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="float model")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the same, compiled")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    dense, quantized = open_model(options.model), open_model(options.checkpoint, "reference")
    vocabulary = dense.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, options.prompt), generator=torch.Generator().manual_seed(0))
    standard = OnnxConfig("dequantize")
    cases = [
        ("float32", dense, OnnxConfig(), 1),
        ("MatMulNBits, float32", quantized, OnnxConfig(), 1),
        ("MatMulNBits, int8 activations", quantized, OnnxConfig(accuracy_level=4), 4),
        ("DequantizeLinear, float32", quantized, standard, 1),
        ("DequantizeLinear, int8 activations", quantized, standard, 4),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        entries = [
            exported(name, model, Path(scratch, str(i)), config, level, ids)
            for i, (name, model, config, level) in enumerate(cases)
        ]
        rates: dict[str, list[float]] = {entry.name: [] for entry in entries}
        for _ in range(options.repeat + 1):
            for entry in entries:
                rates[entry.name].append(decode(entry, ids, options.tokens)[1])

    config = dense.config
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, onnxruntime "
        f"{onnxruntime.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{options.threads} thread(s)"
    )
    print(
        f"{options.model.name}: {config.num_hidden_layers} layers, hidden {config.hidden_size}, vocabulary "
        f"{config.vocab_size}; prompt of {options.prompt} tokens, {options.tokens} generated, "
        f"median of {options.repeat}"
    )
    header = ("MB", "tokens/s", "x float32", "logit error", f"equal of {COMPARED}", "export s")
    print(f"{'':36}" + "".join(f"{name:>14}" for name in header))
    base = statistics.median(rates["float32"][1:])
    for entry in entries:
        rate = statistics.median(rates[entry.name][1:])
        print(
            f"{entry.name:36}{entry.bytes / 1e6:14.1f}{rate:14.1f}{rate / base:14.2f}{entry.error:14.1e}"
            f"{entry.equal:14}{entry.seconds:14.1f}"
        )


if __name__ == "__main__":
    main()
