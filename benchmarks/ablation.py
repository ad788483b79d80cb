"""What each pass is worth: perplexity with every pass on and off, both objectives, both propagations.

    python benchmarks/ablation.py MODEL --calib FILE --text NAME=FILE [--text NAME=FILE] --bits 4 3

Perplexity in windows of 512 tokens, in float32 arithmetic on dequantized weights. Prints a Markdown table.
Nothing is chosen from these figures by the script; defaults were chosen on texts that are not the test text
(docs/quality.md says which).
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from awqc import Context, Pipeline, QuantConfig
from awqc.calibration import all_tokens, load_tokens
from awqc.capture import capture
from awqc.evaluate import perplexity
from awqc.storage.source import from_module
from awqc.weights import Rounded


def variants() -> dict[str, tuple[Pipeline, dict[str, str]]]:
    """Pipelines by name, each with options of the config."""
    full = Pipeline.default().remove("quantize-linears").remove("lower")
    nearest = full.with_options("round-weights", method="nearest")

    def unscaled(pipeline: Pipeline) -> Pipeline:
        return pipeline.remove("search-scales").remove("fold-scales")

    def unclipped(pipeline: Pipeline) -> Pipeline:
        return pipeline.remove("clip-weights")

    searched_flat = unclipped(nearest).with_options("search-scales", shrinks=(1.0,))
    return {
        "round to nearest": (unclipped(unscaled(nearest)), {}),
        "clip": (unscaled(nearest), {}),
        "scale": (searched_flat, {}),
        "scale, then clip": (nearest.with_options("search-scales", shrinks=(1.0,)), {}),
        "scale searched with the clip, clip": (nearest, {}),
        "compensated rounding": (unclipped(unscaled(full)), {}),
        "clip, compensated rounding": (unscaled(full), {}),
        "**all (default)**": (full, {}),
        "all, float propagation": (full, {"propagate": "float"}),
        "all, block objective": (full.with_options("search-scales", objective="block"), {}),
        "all, activation scales only": (full.with_options("search-scales", families=("activation",)), {}),
        "all, search with compensated rounding": (
            full.with_options("search-scales", rounding="compensated"),
            {},
        ),
        "all, 3 sweeps of coordinate descent": (full.with_options("round-weights", sweeps=3), {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--most-tokens", type=int, default=None, help="tokens of each text at most")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--only", nargs="*", help="names of variants")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    torch.backends.cuda.matmul.allow_tf32 = False
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval().to(options.device)
    original = {name: value.clone() for name, value in model.state_dict().items()}
    texts = {}
    for item in options.text:
        name, _, file = item.partition("=")
        texts[name] = all_tokens(file, tokenizer=tokenizer, max_tokens=options.most_tokens)
    tokens = load_tokens(options.calib, tokenizer=tokenizer, max_calib_samples=options.samples)
    batches = [{"input_ids": row[None].to(options.device)} for row in tokens.ids]

    def measure() -> list[float]:
        return [perplexity(model, ids, batch_size=16).value for ids in texts.values()]

    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    print(
        f"{where}, torch {torch.__version__}, transformers {transformers.__version__}; "
        f"calibration: {tokens}\n"
    )
    print(f"| bits | passes | {' | '.join(texts)} | groups scaled | mean error, % | seconds |")
    print("|---|---" * 2 + "|---" * (len(texts) + 1) + "|")
    print(f"| 16 | original | {' | '.join(f'{v:.3f}' for v in measure())} | | | |", flush=True)
    for bits in options.bits:
        for name, (pipeline, settings) in variants().items():
            if options.only and name not in options.only:
                continue
            model.load_state_dict(original)
            graph = capture(from_module(model), batches[0], torch.float32, options.device)
            context = Context(QuantConfig(bits=bits, **settings), batches)
            start = time.perf_counter()
            pipeline.run(graph, context)
            seconds = time.perf_counter() - start
            with torch.no_grad():
                for parameter, value in graph.weights.changed().items():
                    model.get_parameter(parameter).copy_(
                        value.dense() if isinstance(value, Rounded) else value
                    )
            report = context.report
            scaled = sum(row.applied for row in report.groups.values())
            errors = [row.error for row in report.quantized() if row.error is not None]
            print(
                f"| {bits} | {name} | {' | '.join(f'{v:.3f}' for v in measure())} | {scaled} of "
                f"{len(report.groups)} | {100 * sum(errors) / len(errors):.3f} | {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
