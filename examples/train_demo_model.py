"""Train the tiny language model that ships in ``awqc/demo/model``.

A Llama-type decoder of 2.9 million parameters with a byte-level BPE vocabulary of its own, trained from
scratch on public-domain novels. The text is small enough for the model to learn it by heart, so the run is
steered by text it never sees, the end of every novel: dropout, strong weight decay and an exponential moving
average of the weights narrow the gap, and the average with the lowest held-out loss is stored, in float16.

    python examples/train_demo_model.py --text novels.txt.xz --out awqc/demo/model

``--text`` names UTF-8 text, plain or .xz: one paragraph a line, documents separated by ``<|endoftext|>``.
One data-centre GPU needs about two minutes; ``--steps 5 --batch 2`` tries everything on a CPU.
"""

from __future__ import annotations

import json
import lzma
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

CONTEXT = 512
DOCUMENT_SEPARATOR = "<|endoftext|>"
PARAGRAPH_BREAK = "\n\n"
BOS, EOS = "<bos>", "<eos>"

# Words with the space before them, English contractions, digits one by one, runs of punctuation, and a run of
# newlines as one piece, so that a paragraph break is a single token.
PIECES = r"'(?:s|d|m|t|ll|ve|re)\b| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n+|[^\S\n]+"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] | trim }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)

PROMPTS = (
    "The old house stood at the end of the lane, and",
    '"I have waited for you all the evening," she said,',
    "When the morning came, the two brothers went down to the harbour",
)


def read_text(path: Path, held_out: float) -> tuple[list[str], list[str]]:
    """The text's documents, each cut in two: what is trained on and its last ``held_out`` share.

    Headings and other lines without a lower-case letter are left out.
    """
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    training, unseen = [], []
    for document in raw.decode("utf-8").split(DOCUMENT_SEPARATOR):
        lines = [line.strip() + PARAGRAPH_BREAK for line in document.splitlines() if re.search("[a-z]", line)]
        cut = round(len(lines) * (1 - held_out))
        training.append("".join(lines[:cut]))
        unseen.append("".join(lines[cut:]))
    return training, unseen


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: no unknown token, every text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    ids = [(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """All documents as one int64 stream ``(T,)``, each closed by the end-of-text token."""
    stream: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=False):
        stream += [*encoding.ids, tokenizer.eos_token_id]
    return torch.tensor(stream)


def sample_rows(
    stream: torch.Tensor, breaks: torch.Tensor, rows: int, bos: int, generator: torch.Generator
) -> torch.Tensor:
    """Random windows ``(rows, CONTEXT + 1)`` of the stream.

    Half of them begin anywhere. The other half begin at a paragraph, with the break before it replaced by the
    beginning-of-text token: that is how a prompt looks to the model.
    """
    device = stream.device
    last = len(stream) - CONTEXT - 1
    anywhere = torch.randint(last, (rows,), generator=generator, device=device)
    paragraph = breaks[torch.randint(len(breaks), (rows,), generator=generator, device=device)]
    at_paragraph = torch.arange(rows, device=device) % 2 == 0
    start = torch.where(at_paragraph, paragraph.clamp(max=last), anywhere)
    window = stream[start[:, None] + torch.arange(CONTEXT + 1, device=device)]
    window[:, 0] = torch.where(at_paragraph, bos, window[:, 0])
    return window


def add_dropout(model: LlamaForCausalLM, p: float) -> None:
    """Dropout on the embeddings and on what each block adds to the residual; Llama itself has none there."""

    def drop(module: torch.nn.Module, _: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, p, training=module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def next_token_loss(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of ``rows`` ``(B, T + 1)``, in bfloat16 with a float32 softmax."""
    with torch.autocast(rows.device.type, torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, stream: torch.Tensor) -> float:
    """Loss in nats per token over consecutive windows, as perplexity is usually measured."""
    model.eval()
    rows = stream[: len(stream) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    return sum(next_token_loss(model, part).item() * len(part) for part in rows.split(32)) / len(rows)


def optimizer_for(model: torch.nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves the norms alone."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint: float16 safetensors, and the tokenizer without indentation (a third the size)."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        repetition_penalty=1.2,  # greedy text of so small a model goes round in circles without one
    )
    model.to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    (out / "tokenizer.json").write_text(
        json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
    )
    # transformers 5 writes its own new class name; this is the one that every release and engine knows.
    settings = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def report(out: Path, tokenizer: PreTrainedTokenizerFast, stream: torch.Tensor, characters: int) -> None:
    """Reload what was written, measure it and let it write."""
    model = AutoModelForCausalLM.from_pretrained(out).to(stream.device)
    loss = held_out_loss(model, stream)
    bits = loss * len(stream) / characters / math.log(2)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"stored {model.num_parameters():,} parameters, {size:,} bytes")
    print(f"held out: perplexity {math.exp(loss):.2f}, {bits:.4f} bits per character")
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(stream.device)
        text = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=120,
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
        )
        print("---\n" + tokenizer.decode(text[0], skip_special_tokens=True))


def main(
    text: Annotated[Path, typer.Option(help="training text, .txt or .xz")],
    out: Annotated[Path, typer.Option(help="directory for the checkpoint")],
    held_out: Annotated[float, typer.Option(help="share at the end of each document, not trained on")] = 0.02,
    vocab_size: int = 1792,
    hidden_size: int = 256,
    intermediate_size: int = 384,
    layers: int = 5,
    dropout: float = 0.1,
    steps: int = 4000,
    batch: Annotated[int, typer.Option(help="windows of 512 tokens a step")] = 64,
    learning_rate: float = 3e-3,
    weight_decay: float = 1.0,
    ema: Annotated[float, typer.Option(help="decay of the averaged weights, per step")] = 0.999,
    evaluate_every: int = 250,
    seed: int = 0,
) -> None:
    """Train the model, keep the best averaged weights by held-out loss, store and sample them."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(seed)

    training, unseen = read_text(text, held_out)
    tokenizer = train_tokenizer(training, vocab_size)
    stream, unseen_stream = (encode(tokenizer, part).to(device) for part in (training, unseen))
    if min(len(stream), len(unseen_stream)) <= CONTEXT + 1:
        found = f"{len(stream)} tokens to train on and {len(unseen_stream)} held out"
        raise typer.BadParameter(f"{text} gives {found}; each must be over {CONTEXT + 1}")
    break_id = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(PARAGRAPH_BREAK))[0]
    breaks = (stream == break_id).nonzero().flatten()

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(1, hidden_size // 128),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).to(device)
    add_dropout(model, dropout)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema))
    optimizer = optimizer_for(model, learning_rate, weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(500, steps // 10), steps)
    loss_of: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor] = next_token_loss
    if device.type == "cuda":
        loss_of = torch.compile(next_token_loss)

    print(f"{len(stream):,} tokens, {model.num_parameters():,} parameters, {device}", flush=True)
    best, best_weights, started = math.inf, model.state_dict(), time.perf_counter()
    for step in range(1, steps + 1):
        model.train()
        rows = sample_rows(stream, breaks, batch, tokenizer.bos_token_id, generator)
        loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        averaged.update_parameters(model)
        if step % evaluate_every == 0 or step == steps:
            unseen_loss = held_out_loss(averaged.module, unseen_stream)
            if unseen_loss < best:
                best = unseen_loss
                best_weights = {name: w.clone() for name, w in averaged.module.state_dict().items()}
            rate = step * batch * CONTEXT / (time.perf_counter() - started)
            print(
                f"{step:6d}  train {loss.item():.4f}  held out {unseen_loss:.4f}  {rate:,.0f} tok/s",
                flush=True,
            )

    model.load_state_dict(best_weights)
    save(model, tokenizer, out)
    report(out, tokenizer, unseen_stream, sum(map(len, unseen)))


if __name__ == "__main__":
    typer.run(main)
