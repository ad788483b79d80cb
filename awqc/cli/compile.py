"""``awqc compile``: a float model in, a quantized checkpoint out."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from awqc.cli.options import Backend, Column, Debug, Device, FloatModel, Full, Json, MaxUse, Seed, Split
from awqc.cli.output import Bars, print_json, stdout
from awqc.errors import ConfigError

_QUANTIZATION, _CALIBRATION, _PASSES = "Quantization", "Calibration", "Passes"


def compile(
    model: FloatModel,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="OUT", show_default=False, help="Directory to write; whole or not at all."
        ),
    ],
    calib: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="A .txt, .jsonl or .parquet file, a data set (pileval, wikitext, c4, owner/name), or self: "
            "the model writes its own text.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = "self",
    backend: Backend = "auto",
    format: Annotated[
        str,
        typer.Option(metavar="NAME", help="Of the checkpoint: awq, compressed-tensors or awqc (any scheme)."),
    ] = "awq",
    bits: Annotated[int, typer.Option(help="Width of a code, 2 to 8.", rich_help_panel=_QUANTIZATION)] = 4,
    group_size: Annotated[
        int,
        typer.Option(
            help="Input channels that share a scale; -1 for whole rows.", rich_help_panel=_QUANTIZATION
        ),
    ] = 128,
    zero_point: Annotated[
        bool,
        typer.Option(
            "--zero-point/--symmetric", help="Asymmetric or symmetric groups.", rich_help_panel=_QUANTIZATION
        ),
    ] = True,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Linears to leave in float, by name or pattern ('*.down_proj'); may be repeated.",
            show_default=False,
            rich_help_panel=_QUANTIZATION,
        ),
    ] = None,
    quantize_head: Annotated[
        bool,
        typer.Option("--quantize-head", help="Also quantize the output head.", rich_help_panel=_QUANTIZATION),
    ] = False,
    input_scales: Annotated[
        bool,
        typer.Option(
            "--input-scales",
            help="Where no parameter can absorb a scale, apply it at run time; needs --format awqc.",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = False,
    require_coverage: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="Fail before calibration if scale groups cover a smaller share of the parameters to be "
            "quantized, such as 0.9.",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = 0.0,
    propagate: Annotated[
        str,
        typer.Option(
            metavar="MODE",
            help="Calibrate later layers on the outputs of the quantized layers before them, or of the "
            "float ones: quantized or float.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = "quantized",
    propagate_dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="Precision of the products that compute what later layers see: auto, float32 or bfloat16.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = "auto",
    min_expert_tokens: Annotated[
        int,
        typer.Option(
            help="An expert that fewer calibration tokens reach is quantized by those of its whole layer.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = 128,
    calibrate_all_experts: Annotated[
        bool,
        typer.Option(
            help="Calibrate every expert on every token, not on those that come to it.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = False,
    max_calib_samples: Annotated[
        int, typer.Option(help="Sequences at most.", rich_help_panel=_CALIBRATION)
    ] = 128,
    max_calib_seq_len: Annotated[
        int, typer.Option(help="Tokens in a sequence.", rich_help_panel=_CALIBRATION)
    ] = 512,
    split: Split = None,
    column: Column = None,
    seed: Seed = 0,
    before: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PASS",
            help="Insert a pass before the pass NAME. PASS is file.py:Class, module:Class or the name of a "
            "pass, with options as in 'file.py:Class(bits=8)'.",
            show_default=False,
            rich_help_panel=_PASSES,
        ),
    ] = None,
    after: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PASS",
            help="Insert a pass after the pass NAME.",
            show_default=False,
            rich_help_panel=_PASSES,
        ),
    ] = None,
    replace: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PASS",
            help="""Replace the pass NAME, as in 'round-weights=round-weights(method="nearest")'.""",
            show_default=False,
            rich_help_panel=_PASSES,
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Leave the pass NAME out.", show_default=False, rich_help_panel=_PASSES
        ),
    ] = None,
    device: Device = "cpu",
    max_memory: MaxUse = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Continue a compile to OUT that was interrupted, or start over.",
        ),
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint at OUT.")] = False,
    full: Full = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize MODEL and write a checkpoint that transformers, vLLM and awqc load."""
    with Bars("reading the model") as bars, ExitStack() as processes:
        from awqc.checkpoints import check_input_scales, check_output
        from awqc.cli.models import check_device, quiet, sizes
        from awqc.cli.passes import edit
        from awqc.cli.storable import Storable
        from awqc.config import QuantConfig
        from awqc.context import Silent
        from awqc.pipeline import Pipeline
        from awqc.ranks import current, job
        from awqc.streaming import compile_to

        quiet()
        config = QuantConfig(
            bits=bits,
            group_size=group_size,
            zero_point=zero_point,
            propagate=propagate,  # type: ignore[arg-type]  # checked by QuantConfig itself
            propagate_dtype=propagate_dtype,  # type: ignore[arg-type]
            min_expert_tokens=min_expert_tokens,
            calibrate_all_experts=calibrate_all_experts,
            keep=tuple(keep or ()),
            quantize_head=quantize_head,
            input_scales=input_scales,
            require_coverage=require_coverage,
            seed=seed,
        )
        # What can be refused is refused now: a compile may take hours.
        if check_output(out, overwrite=overwrite) == model.resolve():
            raise ConfigError(f"{out} is the model itself: choose another output path")
        storable = Storable(format)
        storable.check_scheme(config.scheme)
        if input_scales:
            check_input_scales(format)
        pipeline = edit(
            Pipeline.default().insert_after("insert-observers", storable),
            before or (),
            after or (),
            replace or (),
            without or (),
        )
        place = processes.enter_context(job(check_device(device)))
        first = current().first
        compiled = compile_to(
            model,
            out,
            calib,
            format=format,
            overwrite=overwrite,
            resume=resume,
            max_memory=sizes(max_memory),
            backend=backend,
            config=config,
            pipeline=pipeline,
            max_calib_samples=max_calib_samples,
            max_calib_seq_len=max_calib_seq_len,
            split=split,
            column=column,
            device=place,
            progress=bars if first else Silent(),
        )
    if not first:  # what there is to say is said once
        return
    path = compiled.path
    if json:
        print_json({"path": str(path), "format": format, "report": compiled.report.as_dict()})
        return
    from awqc import tables

    report = compiled.report
    parts = [tables.summary(report), tables.linears(report, full), tables.notes(report)]
    stdout().print(tables.spaced(part for part in parts if part is not None))
    stdout().print(f"\n{path} ({format}, {tables.size(size_on_disk(path))} of tensors)", soft_wrap=True)
    stdout().print(
        f"next: awqc generate {out} --prompt ...; awqc inspect {out} --report shows every decision",
        soft_wrap=True,
    )


def size_on_disk(path: Path) -> int:
    """Bytes of the safetensors files in a model directory."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))
