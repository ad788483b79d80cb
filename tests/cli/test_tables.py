"""The report as text."""

from __future__ import annotations

import io

import pytest
from rich.console import Console, RenderableType

from awqc import tables
from awqc.report import GroupRow, LinearRow, Report


def lines(table: RenderableType | None, width: int = 100) -> list[str]:
    assert table is not None
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


def quantized(name: str, error: float, **fields: object) -> LinearRow:
    row = LinearRow(name, 11008, 4096, "quantized", scheme="W4 g128 asym", nearest_error=0.01, error=error)
    row.clipped, row.rounding, row.backend = 0.05, "compensated", "cpu"
    for field, value in fields.items():
        setattr(row, field, value)
    return row


@pytest.fixture
def report() -> Report:
    rows = [
        quantized("model.layers.0.mlp.up_proj", 0.002, notes=["approximate"]),
        quantized("model.layers.1.mlp.up_proj", 0.004, rounding="nearest", notes=["approximate"]),
        quantized("model.layers.0.mlp.down_proj", 0.005, group=None, no_group="aten.silu (silu): bends"),
        quantized("model.layers.1.mlp.down_proj", 0.005, group=None, no_group="aten.silu (silu_1): bends"),
        LinearRow("lm_head", 32000, 4096, "kept", "computes the model's output"),
    ]
    for row in rows[:2]:
        row.group = "model.layers.0.norm.weight"
    groups = [
        GroupRow("model.layers.0.norm.weight", ["model.layers.0.mlp.up_proj"], 4096, 4096),
        GroupRow("model.layers.1.norm.weight", ["model.layers.1.mlp.up_proj"], 4096, 4096),
    ]
    groups[1].family, groups[1].ratio, groups[1].applied, groups[1].gain = "duo", 0.35, True, 0.125
    return Report(
        capture={"rung": "torch.export", "checks": [("calibration", 0.0), ("reversed", 2e-7)], "notes": []},
        calibration={
            "source": "story.txt",
            "samples": 8,
            "seq_len": 512,
            "tokens": 4096,
            "dropped": 1200,
            "sha256": "",
        },
        linears={f"{row.name}.weight": row for row in rows},
        groups={group.name: group for group in groups},
        coverage=0.5,
        proof={"groups": 2, "relative_error": 3e-16, "dtype": "float64"},
        seconds={"capture": 3.0, "search-scales": 1.0},
        notes=[("calibration", "1200 of 5296 tokens were not used")],
        sizes={
            "linears_before": 10**9,
            "linears_after": 260 * 10**6,
            "model_before": 1_100_000,
            "model_after": 999,
        },
    )


def test_summary(report: Report) -> None:
    assert lines(tables.summary(report)) == [
        "Summary",
        "calibration       8 x 512 = 4,096 tokens of story.txt, 1,200 not used",
        "capture           torch.export; differs from eager execution by 2e-07",
        "scale proof       2 groups, outputs move by 3e-16 in float64",
        "linears           4 W4 g128 asym, 1 kept",
        "coverage          50.0% of the quantized parameters are in a scale group",
        "scales            applied to 1 of 2 groups, held-out error 12.5% lower there",
        "error             4.0e-03 of the linears' outputs, held-out tokens (round-to-nearest 1.0e-02)",
        "linears' weights  1.00 GB in 16 bits -> 260.00 MB",
        "model             1.10 MB in 16 bits -> 999 B",
        "time              4.0 s",
    ]


def test_linears_of_a_kind_share_a_row(report: Report) -> None:
    assert lines(tables.linears(report)) == [
        "Quantized linears",
        "linear                        n       N x K    error  vs RTN  clipped  GPTQ  backend",
        "model.layers.*.mlp.up_proj    2  11008x4096  3.0e-03    -70%     5.0%   1/2  cpu",
        "model.layers.*.mlp.down_proj  2  11008x4096  5.0e-03    -50%     5.0%   2/2  cpu",
    ]


def test_in_full_every_linear_has_its_own(report: Report) -> None:
    assert lines(tables.linears(report, full=True)) == [
        "Quantized linears",
        "linear                             N x K    error  vs RTN  clipped  GPTQ  backend",
        "model.layers.0.mlp.up_proj    11008x4096  2.0e-03    -80%     5.0%   1/1  cpu",
        "model.layers.1.mlp.up_proj    11008x4096  4.0e-03    -60%     5.0%   0/1  cpu",
        "model.layers.0.mlp.down_proj  11008x4096  5.0e-03    -50%     5.0%   1/1  cpu",
        "model.layers.1.mlp.down_proj  11008x4096  5.0e-03    -50%     5.0%   1/1  cpu",
    ]


def test_schemes_are_told_apart_where_there_are_several(report: Report) -> None:
    report.linears["model.layers.1.mlp.down_proj.weight"].scheme = "W8 g128 asym"
    assert lines(tables.linears(report)) == [
        "Quantized linears",
        "linear                        n       N x K    error  vs RTN  scheme        GPTQ  backend",
        "model.layers.*.mlp.up_proj    2  11008x4096  3.0e-03    -70%  W4 g128 asym   1/2  cpu",
        "model.layers.*.mlp.down_proj  1  11008x4096  5.0e-03    -50%  W4 g128 asym   1/1  cpu",
        "model.layers.*.mlp.down_proj  1  11008x4096  5.0e-03    -50%  W8 g128 asym   1/1  cpu",
    ]


def test_reasons_that_differ_in_the_number_of_a_node_are_one(report: Report) -> None:
    assert lines(tables.ungrouped(report)) == [
        "Linears without a scale group",
        "linear                        n       N x K  why",
        "model.layers.*.mlp.down_proj  2  11008x4096  aten.silu (silu): bends",
    ]
    assert lines(tables.kept(report)) == [
        "Linears in float",
        "linear   n       N x K  why",
        "lm_head  1  32000x4096  kept: computes the model's output",
    ]


def test_groups(report: Report) -> None:
    assert lines(tables.groups(report)) == [
        "Scale groups",
        "producer             consumers  applied  scales     gain",
        "model.layers.*.norm  up_proj        1/2  duo 0.35  12.5%",
    ]
    assert lines(tables.groups(report, full=True))[2:] == [
        "model.layers.0.norm  up_proj        0/1",
        "model.layers.1.norm  up_proj        1/1  duo 0.35  12.5%",
    ]


def test_seconds_and_notes(report: Report) -> None:
    assert lines(tables.seconds(report)) == [
        "Time",
        "pass           seconds  share",
        "capture           3.00    75%",
        "search-scales     1.00    25%",
    ]
    assert lines(tables.notes(report)) == [
        "Notes",
        "where        what",
        "calibration  1200 of 5296 tokens were not used",
        "2 linears    approximate",
    ]


def test_everything_fits_100_columns_with_the_longest_usual_names(report: Report) -> None:
    name = "model.layers.31.post_attention_layernorm.weight"
    report.groups[name] = GroupRow(name, ["a.gate_proj", "a.up_proj"], 4096, 4096, "duo", 0.2, True, 0.5)
    row = quantized("model.layers.31.self_attn.q_proj", 0.1, scheme="W8 g128 asym", backend="reference")
    report.linears["q"] = row
    page = "\n".join(lines(tables.tables(report)))
    assert "…" not in page
    assert "model.layers.*.post_attention_layernorm" in page
    assert "model.layers.*.self_attn.q_proj" in page
    assert max(map(len, page.splitlines())) <= 100


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (4_915_200, "4.92 MB"), (3 * 10**15, "3000.00 TB")],
)
def test_sizes(count: int, text: str) -> None:
    assert tables.size(count) == text


def test_experts_are_counted_with_their_tokens(report: Report) -> None:
    fields = {"expert_count": 8, "expert_tokens": [40, 4000, 900, 12, 700, 800, 600, 1024], "borrowing": 2}
    report.linears["experts"] = quantized("model.layers.0.mlp.experts.up", 0.004, **fields)
    summary = "\n".join(lines(tables.summary(report)))
    assert "12 to 4,000 calibration tokens each; 2 of 8 had too few and took their layer's" in summary
    assert any("8 x 11008x4096" in line for line in lines(tables.linears(report)))
    report.linears["experts"].borrowing = 0
    assert any(line.endswith("12 to 4,000 calibration tokens each") for line in lines(tables.summary(report)))
