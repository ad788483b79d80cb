"""Time and peak memory of a whole compile.

    python benchmarks/compile.py --model DIR --calib FILE --samples 48 --seq-len 512 --threads 2
    python benchmarks/compile.py --layers 4 --threads 1      # a random 4-layer, hidden-512 Llama

Reported: seconds of ``awqc.compile`` (capture, proof, calibration, search, fold, clip, round, lower; the
model's weights are read within it), seconds by pass, and the peak resident memory of the process, imports
included; imports themselves are timed apart. Runs once in a fresh process; nothing is warmed up, because a
user's compile is not either.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path


def random_llama(directory: Path, layers: int) -> Path:
    """A Llama of hidden 512, intermediate 1408, vocabulary 2048, with random weights, on disk."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).half().save_pretrained(directory)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="model directory; a random Llama if left out")
    parser.add_argument("--calib", help="text file; random tokens if left out")
    parser.add_argument("--layers", type=int, default=4, help="layers of the random Llama")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--at-most", type=float, help="fail if the compile takes more seconds")
    options = parser.parse_args()

    began = time.perf_counter()
    import torch
    import transformers

    import awqc

    compile = awqc.compile  # loads what it needs now; reported apart
    imported = time.perf_counter() - began

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or random_llama(Path(scratch), options.layers)
        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        calib = options.calib or torch.randint(
            0, vocabulary, (options.samples, options.seq_len), generator=torch.Generator().manual_seed(0)
        )
        start = time.perf_counter()
        compiled = compile(
            model,
            calib,
            config=awqc.QuantConfig(bits=options.bits),
            max_calib_samples=options.samples,
            max_calib_seq_len=options.seq_len,
            device=options.device,
        )
        seconds = time.perf_counter() - start
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{options.threads} thread(s), {options.device}"
    )
    print(f"{options.model or f'random Llama, {options.layers} layers, hidden 512'}: ", end="")
    print(f"{options.samples} x {options.seq_len} tokens, {options.bits} bits")
    for name, spent in compiled.report.seconds.items():
        print(f"  {name:24}{spent:8.2f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"imports {imported:.1f} s, whole compile {seconds:.1f} s, peak memory {peak:,.0f} MB")
    if options.at_most is not None and seconds > options.at_most:
        sys.exit(f"over the bound of {options.at_most} s")


if __name__ == "__main__":
    main()
