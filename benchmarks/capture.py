"""Capture and scale flow of very large models, without their weights: time, memory, and what is found.

    python benchmarks/capture.py llama-70b
    python benchmarks/capture.py mixtral-8x22b
    python benchmarks/capture.py deepseek-v3

The configs are those of the published models, written out, so nothing is downloaded. The time is that of
``awqc.analyze`` from a module on ``meta``; the memory is the peak of the whole process.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time
from typing import Any

import torch
import transformers

import awqc

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-70b": (
        "LlamaConfig",
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    "mixtral-8x22b": (
        "MixtralConfig",
        {
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "num_hidden_layers": 56,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "vocab_size": 32768,
        },
    ),
    "deepseek-v3": ("DeepseekV3Config", {}),  # the defaults are its sizes
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    kind, arguments = MODELS[parser.parse_args().model]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**arguments))
    count = sum(p.numel() for p in model.parameters())
    started = time.perf_counter()
    found = awqc.analyze(model)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    refused = sum(isinstance(v, str) for v in found.linears.values())
    print(
        f"{count / 1e9:.1f} B parameters, {found.capture.rung}, {len(found.graph.nodes)} nodes, "
        f"{len(found.groups)} groups, {len(found.linears) - refused} of {len(found.linears)} linears in one: "
        f"{seconds:.1f} s, {peak:.2f} GiB peak"
    )
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
