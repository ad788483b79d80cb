"""``awqc export``: a model in the format of another runtime."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from awqc.cli.options import Debug, Dtype, Json, Model
from awqc.cli.output import Bars, print_json, stdout
from awqc.errors import ConfigError

_FORMATS = ("onnx",)
#: What an export to ONNX imports, all of it in the extra of that name.
_PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")


def export(
    model: Model,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="OUT", show_default=False, help="Directory to write; whole or not at all."
        ),
    ],
    format: Annotated[str, typer.Option(metavar="NAME", help="Format of the model: onnx.")] = "onnx",
    linears: Annotated[
        str,
        typer.Option(
            metavar="FORM",
            help="Quantized linears as matmulnbits (ONNX Runtime's own operator) or dequantize (standard "
            "operators: DequantizeLinear and MatMul).",
        ),
    ] = "matmulnbits",
    accuracy_level: Annotated[
        int,
        typer.Option(
            help="Precision of activations in matmulnbits: 0 the runtime's choice, 1 float32, 2 float16, "
            "3 bfloat16, 4 int8 (fastest on CPUs)."
        ),
    ] = 1,
    past: Annotated[
        bool,
        typer.Option("--past/--no-past", help="With past keys and values, to generate; or logits only."),
    ] = True,
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="Compare the logits of ONNX Runtime with those of MODEL."),
    ] = True,
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model at OUT.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write MODEL for another runtime: ONNX with packed weights, dynamic sizes and a cache."""
    if format not in _FORMATS:
        raise ConfigError(f"--format {format}: awqc exports to {', '.join(_FORMATS)}")
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} is not installed: run pip install 'awqc[onnx]'")
    with Bars("reading the model") as bars:
        from awqc.checkpoints import check_output
        from awqc.cli.models import open_model
        from awqc.export.onnx import OnnxConfig, export_onnx

        config = OnnxConfig(linears, accuracy_level, past)  # type: ignore[arg-type]  # checked by itself
        if check_output(out, overwrite=overwrite) == model.resolve():
            raise ConfigError(f"{out} is the model itself: choose another output path")
        module = open_model(model, "reference", dtype=dtype)
        bars.now(f"writing {out}")
        exported = export_onnx(module, out, config, overwrite=overwrite, check=check)
    if json:
        print_json(asdict(exported) | {"path": str(exported.path)})
        return
    from awqc import tables

    forms = ", ".join(f"{count} linears as {form}" for form, count in exported.forms.items())
    stdout().print(
        f"{exported.path}: {tables.size(exported.bytes)}, {forms or 'no quantized linear'}", soft_wrap=True
    )
    if exported.error is not None:
        stdout().print(f"logits in ONNX Runtime differ by {exported.error:.1e} of their norm", soft_wrap=True)
    for note in exported.notes:
        stdout().print(f"note: {note}", soft_wrap=True)
