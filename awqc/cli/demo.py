"""``awqc demo``: the whole way with the model and the texts that ship in the package."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from awqc.cli.options import Debug, Json
from awqc.cli.output import Bars, print_json, stdout

PROMPT = "It was late in the evening when the old man"
_NEW_TOKENS = 60


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="OUT", help="Keep the quantized checkpoint here.", show_default=False
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compile, evaluate, save, load and generate with a tiny model that is included: no download, no GPU."""
    started = time.perf_counter()
    with ExitStack() as stack:
        bars = stack.enter_context(Bars("loading torch"))
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "demo-4bit"
        found = _demo(folder, bars)
    found["seconds"]["total"] = time.perf_counter() - started
    if json:
        print_json(found | {"path": out and str(out.resolve())})
    else:
        _show(found, out)


def _demo(out: Path, bars: Bars) -> dict[str, Any]:
    """Everything the demo measures."""
    from awqc.api import compile
    from awqc.calibration import all_tokens
    from awqc.checkpoints import check_output
    from awqc.cli.compile import size_on_disk
    from awqc.cli.generate import write
    from awqc.cli.models import open_model
    from awqc.config import QuantConfig
    from awqc.demo import CALIBRATION_TEXT, EVALUATION_TEXT, MODEL_PATH
    from awqc.evaluate import compare
    from awqc.storage.source import load_tokenizer

    check_output(out)
    original, tokenizer = open_model(MODEL_PATH), load_tokenizer(MODEL_PATH)
    config = QuantConfig()
    start = time.perf_counter()
    compiled = compile(MODEL_PATH, str(CALIBRATION_TEXT), config=config, progress=bars)
    end = time.perf_counter()
    bars.now("writing and reading back")
    compiled.save(out)
    quantized = open_model(out)
    ids = all_tokens(EVALUATION_TEXT, tokenizer=tokenizer)
    quality = compare(quantized, original, ids, progress=bars.count("evaluating"))
    bars.now("generating")
    texts = {
        name: asdict(write(model, tokenizer, PROMPT, _NEW_TOKENS))
        for name, model in (("before", original), ("after", quantized))
    }
    return {
        "scheme": str(config.scheme),
        "calibration_tokens": compiled.report.calibration["tokens"],
        "linears": len(compiled.quantized_linears()),
        "perplexity": {"before": quality.reference.value, "after": quality.perplexity.value},
        "kl": quality.kl,
        "top1_agreement": quality.top1_agreement,
        "evaluation_tokens": ids.numel(),
        "bytes": {"before": size_on_disk(MODEL_PATH), "after": size_on_disk(out)},
        "linear_bytes": {
            "before": compiled.report.sizes["linears_before"],
            "after": compiled.report.sizes["linears_after"],
        },
        "prompt": PROMPT,
        "text": texts,
        "seconds": {"compile": end - start},
    }


def _show(found: dict[str, Any], out: Path | None) -> None:
    from rich.table import Table
    from rich.text import Text

    from awqc.tables import size

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    pair = ("before", "after")
    table.add_row("format", "16-bit floats", found["scheme"])
    table.add_row("perplexity", *(f"{found['perplexity'][when]:.2f}" for when in pair))
    table.add_row("weights of its linears", *(size(found["linear_bytes"][when]) for when in pair))
    table.add_row("model on disk", *(size(found["bytes"][when]) for when in pair))
    console = stdout()
    console.print(
        f"A Llama of 2.9 million parameters, trained on English novels; its {found['linears']} linears "
        f"compiled with {found['calibration_tokens']:,} tokens of a story in "
        f"{found['seconds']['compile']:.1f} s.\n"
    )
    console.print(table)
    console.print(
        f"\nOn {found['evaluation_tokens']:,} tokens of another story: KL {found['kl']:.4f} nats, the same "
        f"most likely token {found['top1_agreement']:.1%} of the time.\n"
    )
    for when in pair:
        text = Text.assemble((f"{when:8}", "bold"), (found["prompt"], "dim"), found["text"][when]["text"])
        console.print(text, end="\n\n")
    console.print(
        f"{found['seconds']['total']:.0f} s in all." + (f" The checkpoint is in {out}." if out else "")
    )
    console.print("Your own model: awqc compile MODEL --calib TEXT.txt -o OUT", soft_wrap=True)
