"""``awqc generate``: text from a model, and how fast it comes."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from awqc.cli.options import (
    Backend,
    Debug,
    Device,
    DeviceMap,
    Dtype,
    Json,
    MaxMemory,
    Model,
    OffloadFolder,
    Seed,
)
from awqc.cli.output import Bars, print_json, stderr
from awqc.errors import ConfigError


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt.

    Args:
        text: without the prompt.
        tokens: how many were generated.
        seconds: from the prompt to the last token.
    """

    text: str
    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second, the reading of the prompt included."""
        return self.tokens / self.seconds


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to continue.", show_default=False)],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens at most.")
    ] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the most likely token.")] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens that make up this share."),
    ] = 1.0,
    seed: Seed = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template.")] = False,
    backend: Backend = "auto",
    device: Device = "cpu",
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt with MODEL, float or quantized."""
    with Bars("reading the model"):
        from awqc.cli.models import Division, open_model
        from awqc.storage.source import load_tokenizer

        division = Division(device_map, max_memory, offload_folder)
        module = open_model(model, backend, device, dtype, division)
        tokenizer = load_tokenizer(model)
    streamer = None if json else _streamer(tokenizer, chat)
    written = write(module, tokenizer, prompt, max_new_tokens, temperature, top_p, seed, chat, streamer)
    if json:
        print_json(
            {"model": str(model), "prompt": prompt} | asdict(written) | {"tokens_per_second": written.rate}
        )
        return
    stderr().print(
        f"\n{written.tokens} tokens in {written.seconds:.2f} s: {written.rate:.1f} tokens/s", style="dim"
    )


def write(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    streamer: Any = None,
) -> Continuation:
    """Continue ``prompt``.

    Raises:
        ConfigError: if the prompt is empty, the result would exceed the model's limit, or there is no chat
            template.
    """
    import torch

    # Weights that are offloaded are on meta; inputs may then be anywhere.
    device = "cpu" if model.device.type == "meta" else model.device
    ids = _encode(tokenizer, prompt, chat).to(device)
    _check_length(model, ids.shape[1], max_new_tokens)
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    if tokenizer.pad_token_id is not None:
        options["pad_token_id"] = tokenizer.pad_token_id
    torch.manual_seed(seed)
    started = time.perf_counter()
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            **options,
        )
    new = out[0, ids.shape[1] :]
    seconds = time.perf_counter() - started
    return Continuation(tokenizer.decode(new, skip_special_tokens=True), len(new), seconds)


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """Token ids ``(1, n)``."""
    import torch

    if chat and not tokenizer.chat_template:
        raise ConfigError("--chat: the tokenizer has no chat template: leave --chat out")
    if chat:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    # A template brings its own special tokens.
    ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise ConfigError("the prompt is empty: give at least one token to continue")
    return torch.tensor([ids])


def _check_length(model: Any, given: int, new: int) -> None:
    from awqc.calibration import sequence_limit

    limit = sequence_limit(model.config)
    if limit is not None and given + new > limit:
        raise ConfigError(
            f"a prompt of {given} tokens and --max-new-tokens {new} exceed the model's limit of {limit} "
            "tokens: shorten one of them"
        )


def _streamer(tokenizer: Any, chat: bool) -> Any:
    """Prints text as it is made; of a plain prompt, the prompt first."""
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
