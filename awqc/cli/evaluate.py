"""``awqc eval``: perplexity on a text, and how far a quantized model is from its original."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from awqc.cli.options import (
    Backend,
    Column,
    Debug,
    Device,
    DeviceMap,
    Dtype,
    Json,
    MaxMemory,
    Model,
    OffloadFolder,
    Split,
)
from awqc.cli.output import Bars, print_json, stdout


def evaluate(
    model: Model,
    text: Annotated[
        str,
        typer.Option(
            metavar="DATA", help="A .txt, .jsonl or .parquet file, or a data set.", show_default=False
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="ORIGINAL",
            help="The float model to compare with.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of context; windows do not overlap.")] = 512,
    max_tokens: Annotated[
        int | None, typer.Option(help="Stop after so many tokens of the text.", show_default=False)
    ] = None,
    split: Split = None,
    column: Column = None,
    backend: Backend = "auto",
    device: Device = "cpu",
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Perplexity of MODEL, float or quantized, on a text, and with --against its distance to ORIGINAL."""
    with Bars("reading the model") as bars:
        from awqc.calibration import all_tokens
        from awqc.cli.models import Division, open_model
        from awqc.evaluate import compare, perplexity
        from awqc.storage.source import load_tokenizer

        division = Division(device_map, max_memory, offload_folder)
        module = open_model(model, backend, device, dtype, division)
        original = open_model(against, backend, device, dtype, division) if against is not None else None
        ids = all_tokens(
            text, tokenizer=load_tokenizer(model), split=split, column=column, max_tokens=max_tokens
        )
        started = time.perf_counter()
        advance = bars.count(f"evaluating {ids.numel():,} tokens")
        found: dict[str, Any]
        if original is None:
            found = {"perplexity": asdict(perplexity(module, ids, window, progress=advance))}
        else:
            found = asdict(compare(module, original, ids, window, progress=advance))
        seconds = time.perf_counter() - started
    if json:
        print_json(
            {"model": str(model), "against": against and str(against), "text": text, "window": window}
            | found
            | {"seconds": seconds}
        )
        return
    stdout().print(_table(model, against, found))
    stdout().print(
        f"\n{found['perplexity']['tokens']:,} predictions of {text} in windows of {window}, {seconds:.1f} s",
        soft_wrap=True,
    )


def _table(model: Path, against: Path | None, found: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("model")
    for heading in ("perplexity", *(("KL to original", "same first token") if against else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    if against is not None:
        table.add_row(str(against), f"{found['reference']['value']:.3f}", "", "")
    distance = [f"{found['kl']:.4f} nats", f"{found['top1_agreement']:.1%}"] if against else []
    table.add_row(str(model), f"{found['perplexity']['value']:.3f}", *distance)
    return table
