"""Checkpoints of the size of well-known models, with random weights, for measurements without a download.

    python benchmarks/make_checkpoint.py llama-3-8b OUT --device cuda      # 16 GB of bf16
    python benchmarks/make_checkpoint.py qwen3-30b-a3b OUT --layers 12 --device cuda
    python benchmarks/make_checkpoint.py llama-1.1b OUT --dtype float32    # 4.4 GB
    python benchmarks/make_checkpoint.py deepseek-v3 OUT --config-only     # for awqc plan

Weights spread as trained ones do: a matrix has standard deviation ``0.7 / sqrt(K)``, its rows and columns
differ by log-normal factors, and norms have a few outlier channels, so that scales, clipping and rounding
have something to find. Shards are written one by one. A tensor depends on the seed and its name alone; CPU
and GPU draw different numbers. Beside the weights lie a byte-level tokenizer and ``calibration.jsonl``: 128
rows of 512 token ids with the frequencies of words, for ``--calib OUT/calibration.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awqc.checkpoints.shards import write_json, write_sharded
from awqc.storage.source import aliases, from_module, skeleton

#: Shape -> the fields of its ``config.json`` that sizes follow from; those left out are the class's own.
SHAPES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("shapes.json").read_text())

#: Spread of the factors of rows and columns, and of a norm's channels.
_SPREAD, _NORM_SPREAD = 0.25, 0.3
#: One channel of a norm in so many is an outlier, and how many times larger it is at most.
_OUTLIER_EVERY, _OUTLIER = 512, 16.0


def weights(directory: Path, dtype: torch.dtype, device: str, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model that ``config.json`` in ``directory`` describes, under its name on disk."""
    module = skeleton(directory)
    source, tied = from_module(module), aliases(module)
    for name, tensor in module.state_dict().items():
        if name in tied:
            continue
        for piece in source.stored(name):
            generator = torch.Generator(device).manual_seed(seed ^ zlib.crc32(piece.name.encode()))
            shape = piece.shape(tuple(tensor.shape))
            yield piece.name, _values(shape, piece.name.endswith("bias"), generator).to(dtype)


def _values(shape: tuple[int, ...], bias: bool, generator: torch.Generator) -> Tensor:
    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=generator.device)

    if len(shape) == 1 and bias:
        return normal(*shape) * 0.02
    if len(shape) == 1:
        values = (normal(*shape) * _NORM_SPREAD).exp_()
        count = max(1, shape[0] // _OUTLIER_EVERY)
        chosen = torch.randperm(shape[0], generator=generator, device=generator.device)[:count]
        values[chosen] *= _OUTLIER ** torch.rand(count, generator=generator, device=generator.device)
        return values
    *_, n, k = shape
    values = normal(*shape).mul_(0.7 / k**0.5)
    values.mul_((normal(n, 1) * _SPREAD).exp_())
    return values.mul_((normal(k) * _SPREAD).exp_())


def calibration(file: Path, vocabulary: int, samples: int, tokens: int, seed: int) -> None:
    """Rows of token ids, the i-th most frequent id with a probability in proportion to 1/i."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = 1 / torch.arange(1, vocabulary + 1)
    ids = torch.multinomial(frequencies, samples * tokens, replacement=True, generator=generator)
    rows = ids.view(samples, tokens).tolist()
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))


def config(shape: str, layers: int | None = None, dtype: str = "bfloat16") -> dict[str, Any]:
    """``config.json`` of the model called ``shape``, with fewer layers if asked for."""
    fewer = {} if layers is None else {"num_hidden_layers": layers}
    return {**SHAPES[shape], **fewer, "dtype": dtype}


def byte_tokenizer(directory: Path) -> None:
    """A tokenizer whose ids 0 to 255 are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def make(
    shape: str,
    out: Path,
    layers: int | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    shard_bytes: int = 1 << 31,
    config_only: bool = False,
) -> int:
    """Write the checkpoint; bytes of tensor data in it."""
    out.mkdir(parents=True)
    fields = config(shape, layers, dtype)
    write_json(out / "config.json", fields)
    if config_only:
        return 0
    byte_tokenizer(out)
    vocabulary = skeleton(out).config.vocab_size
    calibration(out / "calibration.jsonl", vocabulary, samples=128, tokens=512, seed=seed)
    return write_sharded(out, weights(out, getattr(torch, dtype), device, seed), shard_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path, help="directory to make")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cpu", help="where numbers are drawn; cuda takes seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-gb", type=float, default=2.0, help="also what it takes of host memory")
    parser.add_argument("--config-only", action="store_true", help="no weights")
    options = parser.parse_args()
    started = time.perf_counter()
    size = make(
        options.shape,
        options.out,
        options.layers,
        options.dtype,
        options.device,
        options.seed,
        int(options.shard_gb * 1e9),
        options.config_only,
    )
    print(f"{options.out}: {size / 1e9:.2f} GB in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
