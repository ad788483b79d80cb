"""Loads a checkpoint in transformers and writes what it computes. Runs in the environment ``transformers``.

    load_transformers.py CHECKPOINT TOKENS.json ANSWER.json LOGPROBS.npy

TOKENS.json holds B prompts of the same length T, as lists of token ids. LOGPROBS.npy holds the
log probabilities of the next token ``(B, T, vocabulary)``. ANSWER.json holds the greedy continuation of each
prompt, the keys that the checkpoint lacked or had too many (transformers only warns of them, and leaves
random weights), the names of the modules that hold packed weights, and the seconds that loading and running
took.
"""

import json
import os
import sys
import time
from importlib.metadata import version

NEW_TOKENS = 32

os.environ["HF_HUB_OFFLINE"] = "1"


def main(checkpoint: str, tokens: str, answer: str, logprobs: str) -> None:
    import numpy
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AwqConfig

    with open(tokens) as file:
        ids = torch.tensor(json.load(file))
    start = time.perf_counter()
    options = {}
    quantization = getattr(AutoConfig.from_pretrained(checkpoint), "quantization_config", None)
    if quantization is not None and quantization["quant_method"] == "awq":
        # Only the kernel is taken from here: bits, group size and skipped modules are the checkpoint's.
        # This kernel dequantizes and multiplies; the default one computes in bfloat16 whatever the model.
        options["quantization_config"] = AwqConfig(backend="torch_awq")
    model, info = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True, **options
    )
    model.eval()
    model.generation_config.eos_token_id = None  # every engine generates the same number of tokens
    quantized = [name for name, module in model.named_modules() if _is_packed(module)]
    loaded = time.perf_counter()
    with torch.no_grad():
        computed = torch.log_softmax(model(ids).logits.float(), -1).numpy()
        greedy = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
        )[:, ids.shape[1] :]
    finished = time.perf_counter()
    numpy.save(logprobs, computed)
    result = {
        "greedy": greedy.tolist(),
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(map(str, info["mismatched_keys"])),
        "quantized": quantized,
        "seconds": {"load": loaded - start, "run": finished - loaded},
        "versions": {
            name: version(name) for name in ("transformers", "gptqmodel", "compressed-tensors", "torch")
        },
    }
    with open(answer, "w") as file:
        json.dump(result, file)


def _is_packed(module):
    return hasattr(module, "qweight") or hasattr(module, "weight_packed")


if __name__ == "__main__":
    main(*sys.argv[1:])
