"""Reports without a compile."""

from __future__ import annotations

import random

from awqc.report import GroupRow, LinearRow, Report

RATIOS = [round(i / 10, 1) for i in range(11)]


def synthetic(layers: int, experts: int = 0, seed: int = 0) -> Report:
    """A decoder of so many layers, each with a mixture of ``experts`` if any; errors are random."""
    generator = random.Random(seed)
    report = Report(
        capture={"rung": "torch.export", "checks": [["calibration", 0.0]], "notes": []},
        calibration={"source": "text.txt", "samples": 4, "seq_len": 32, "tokens": 128, "dropped": 0},
        config={"bits": 4, "group_size": 128, "zero_point": True},
        proof={"groups": 2 * layers, "relative_error": 2e-15, "dtype": "float64"},
        seconds={"capture": 2.0, "canonicalize": 0.01, "calibrate": 5.5, "their-own": 0.5},
        notes=[("capture", "a note")],
        sizes={"linears_before": 4000, "linears_after": 1100, "model_before": 6000, "model_after": 3100},
    )
    for layer in range(layers):
        stem = f"net.blocks.{layer}"
        _add(report, generator, f"{stem}.norm.weight", [f"{stem}.attn.{part}" for part in "qkv"])
        _add(report, generator, f"{stem}.attn.v.weight", [f"{stem}.attn.o"])
        if not experts:
            _add(report, generator, f"{stem}.norm2.weight", [f"{stem}.mlp.up"])
            _add(report, generator, None, [f"{stem}.mlp.down"])
        for expert in range(experts):
            inner = f"{stem}.moe.experts.{expert}"
            _add(report, generator, f"{stem}.norm2.weight", [f"{inner}.gate", f"{inner}.up"])
            _add(report, generator, f"{inner}.up.weight", [f"{inner}.down"])
    head = LinearRow("head", 512, 128, decision="kept", reason="computes the model's output")
    report.linears["head.weight"] = head
    return report


def _add(report: Report, generator: random.Random, group: str | None, names: list[str]) -> None:
    if group is not None:
        row = report.groups.setdefault(group, GroupRow(group, [], channels=128, alive=128))
        row.linears += names
        row.family, row.ratio, row.applied, row.gain = "activation", 0.3, True, 0.1
        row.curve = [("identity", 0.0, 1.0), *(("activation", r, 1 - r * (0.6 - r)) for r in RATIOS)]
        row.tokens, row.held_out_tokens = 112, 16
    for name in names:
        nearest = 10 ** generator.uniform(-3.5, -1.5)
        report.linears[f"{name}.weight"] = LinearRow(
            name,
            128,
            256,
            decision="quantized",
            scheme="W4 g128 asym",
            group=group,
            no_group="" if group else "aten.gelu lets no scale through",
            energy=1.0,
            nearest_error=nearest,
            error=nearest * generator.uniform(0.1, 0.9),
            clipped=0.07,
            rounding="compensated",
            backend="cpu",
            notes=["scales are rounded to bfloat16"],
        )
