"""Text of a quantized model, the same from every backend: greedy tokens, on a GPU.

    python benchmarks/gpu_text.py MODEL

MODEL is a quantized checkpoint, or a float one, which is quantized first on a few random tokens.
Each backend continues the same prompts by 64 tokens. Where one chooses another token than the reference does,
the logits of both candidates are shown under both: two tokens that are as likely as rounding can tell apart
are no error, anything else is, and the exit status says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import awqc


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--backends", nargs="*", default=["marlin", "triton", "exllama"])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device, checkpoint = torch.device(options.device), Path(options.model)
    if "quantization_config" not in json.loads((checkpoint / "config.json").read_text()):
        tokens = torch.randint(2, 1000, (8, 128), generator=torch.Generator().manual_seed(1))
        quantized = awqc.compile(checkpoint, tokens, backend="reference", device=device)
        checkpoint = Path(quantized.save(Path(tempfile.mkdtemp()) / "quantized"))

    def model(backend: str) -> torch.nn.Module:
        return awqc.load(checkpoint, backend, device=device, dtype=torch.float16).eval()

    reference = model("reference")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, 1000, (4, 16), generator=generator).to(device)
    mask = torch.ones_like(prompts)

    def text(net: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            out = net.generate(prompts, attention_mask=mask, max_new_tokens=options.tokens, do_sample=False)
        return out[:, prompts.shape[1] :]

    want, worst = text(reference), 0
    equal = {}
    for backend in options.backends:
        net = model(backend)
        ran = {linear.backend.name for linear in net.quantized_linears().values()}
        got = text(net)
        same = 0
        for row in range(len(prompts)):
            different = (got[row] != want[row]).nonzero()
            if not len(different):
                same += 1
                continue
            at = int(different[0])
            tokens = torch.cat([prompts[row], want[row, :at]])[None]
            with torch.no_grad():
                logits = [n(tokens).logits[0, -1].float() for n in (reference, net)]
            ids = [int(want[row, at]), int(got[row, at])]
            gap = float(logits[0][ids[0]] - logits[0][ids[1]])
            moved = float((logits[0] - logits[1]).abs().max())
            # A tie to what rounding moves logits by, and that is within a few units of float16.
            rounding = 32 * torch.finfo(torch.float16).eps * float(logits[0].abs().max())
            tie = gap <= 2 * moved and moved <= rounding
            worst |= not tie
            print(
                f"{backend}: prompt {row} differs at token {at}: {ids}, apart by {gap:.2e} in the reference, "
                f"logits moved by at most {moved:.2e} ({'a tie' if tie else 'AN ERROR'})"
            )
        equal[backend] = f"{same}/{len(prompts)}" + ("" if ran == {backend} else f" (ran {sorted(ran)})")
        worst |= ran != {backend}
        del net
    print(f"equal texts of {options.tokens} tokens: " + ", ".join(f"{b} {e}" for b, e in equal.items()))
    return worst


if __name__ == "__main__":
    sys.exit(main())
