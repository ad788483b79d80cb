"""Decoding speed of a random model with Llama-3-8B's shapes under transformers' ``generate``.

    python benchmarks/gpu_decode.py marlin

The linears (not the head) are 4-bit codes in groups of 128 with zero points; the rest is float16. A static
cache, the forward compiled by ``torch.compile(fullgraph=True)`` into a CUDA graph, batch 1, a prompt
of 128 tokens. Stated: new tokens over the seconds of a generation of ``--tokens`` tokens, the best of three,
after one that compiles; and graph breaks, of which there must be none.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from awqc.backend import LinearShape, get_backend
from awqc.kernels.fuse import FuseLinears
from awqc.quantized import QuantizedWeight, Scheme
from awqc.runtime.linear import QuantLinear
from awqc.runtime.lowering import Lowered

#: Where processes that share a device meet, and what the one that measures holds.
FOLDER = Path(tempfile.gettempdir()) / f"awqc-gpu-decode-{os.getppid()}"
LOCK = FOLDER / "lock"


def wait_for_peers(count: int, seconds: float = 150) -> None:
    """Wait until so many processes, this one counted, have compiled: none computes while one measures."""
    if count < 2:
        return
    (FOLDER / f"ready-{os.getpid()}").touch()
    last = time.monotonic() + seconds
    while len(list(FOLDER.glob("ready-*"))) < count and time.monotonic() < last:
        time.sleep(0.2)


def random_linear(n: int, k: int, backend: str, device: torch.device) -> QuantLinear:
    """A linear with random codes, of weights of about unit variance over the square root of K."""
    scheme, chosen = Scheme(4, 128), get_backend(backend)
    shape = LinearShape(n, k, scheme, torch.float16, device)
    if reason := chosen.refuses(shape):
        raise SystemExit(f"{backend} refuses {n}x{k}: {reason}")
    groups = scheme.groups(k)
    weight = QuantizedWeight(
        torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device),
        torch.full((n, groups), 1 / (4.6 * k**0.5), dtype=torch.float16, device=device),
        torch.full((n, groups), 8, dtype=torch.uint8, device=device),
        scheme,
    )
    return QuantLinear(Lowered(chosen, chosen.pack(weight, None, torch.float16), shape, {}))


def random_model(layers: int, backend: str, device: torch.device) -> nn.Module:
    """The model on the device, its linears quantized, without a float copy of them at any time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).half()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("model."):
            parent, _, own = name.rpartition(".")
            linear = random_linear(module.out_features, module.in_features, backend, device)
            setattr(model.get_submodule(parent), own, linear)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=torch.float16, device=device)
                value = value.normal_(0, 0.02) if value.ndim > 1 else value.fill_(1)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
    # Non-persistent buffers, of rotary embeddings, are computed from the config.
    rotary = type(model.model.rotary_emb)(config).to(device)
    model.model.rotary_emb = rotary
    return model.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("backend", help="a backend's name")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--fuse", action="store_true", help="with awqc.kernels.fuse.FuseLinears (marlin)")
    parser.add_argument("--peers", type=int, default=1, help="processes with one parent to wait for")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    from transformers import CompileConfig

    FOLDER.mkdir(exist_ok=True)
    device = torch.device(options.device)
    began = time.monotonic()
    model = random_model(options.layers, options.backend, device)
    print(
        f"built in {time.monotonic() - began:.0f} s; {torch.cuda.memory_allocated() / 1e9:.1f} GB", flush=True
    )
    prompt = torch.randint(0, 128256, (1, options.prompt), device=device)

    # What mode="reduce-overhead" stands for, spelled out: a mode and options exclude each other.
    fuse = FuseLinears()
    chosen = {"triton.cudagraphs": True} | ({"post_grad_custom_post_pass": fuse} if options.fuse else {})
    how = CompileConfig(fullgraph=True, mode=None, dynamic=False, options=chosen)

    def generate() -> Tensor:
        with torch.no_grad():
            return model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=options.tokens,
                min_new_tokens=options.tokens,
                do_sample=False,
                cache_implementation="static",
                compile_config=how,
                disable_compile=False,
                pad_token_id=0,
            )

    began = time.monotonic()
    first = generate()
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    wait_for_peers(options.peers)
    best = 0.0
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for _ in range(3):
            began = time.perf_counter()
            out = generate().cpu()
            best = max(best, options.tokens / (time.perf_counter() - began))
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    graphs = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    print(
        json.dumps(
            {
                "backend": options.backend,
                "layers": options.layers,
                "tokens_per_second": round(best, 1),
                "graph_breaks": breaks,
                "graphs": graphs,
                "fused": fuse.made,
                "same_twice": torch.equal(first.cpu(), out),
                "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
            }
        )
    )
    return 0 if not breaks and graphs else 1


if __name__ == "__main__":
    sys.exit(main())
