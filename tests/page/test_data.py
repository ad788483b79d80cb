"""The columns that the page reads are the report."""

from __future__ import annotations

import json
from typing import Any

import pytest

from awqc.page.data import document, rounded, stored_bytes
from awqc.page.graphs import LayerGraph
from awqc.quantized import Scheme, packed_bytes
from awqc.report import GroupRow, LinearRow, Report
from tests.page.reports import RATIOS, synthetic


def name(written: dict[str, Any], value: list[int]) -> str:
    text, numbers = written["strings"][value[0]], iter(value[1:])
    return "".join(str(next(numbers)) if part == "*" else part for part in text)


@pytest.fixture(scope="module")
def report() -> Report:
    return synthetic(2, experts=3)


@pytest.fixture(scope="module")
def written(report: Report) -> dict[str, Any]:
    """As it comes back from JSON."""
    return json.loads(
        json.dumps(document(report, {"net.blocks.1": LayerGraph(diff=["+a"])}), allow_nan=False)
    )


def test_names_of_linears_and_groups_come_back(report: Report, written: dict[str, Any]) -> None:
    assert [name(written, n) for n in written["linears"]["name"]] == [r.name for r in report.linears.values()]
    assert [name(written, n) for n in written["groups"]["name"]] == list(report.groups)


def test_linears_know_their_layer_and_kind(report: Report, written: dict[str, Any]) -> None:
    last = list(report.linears).index("net.blocks.1.moe.experts.2.down.weight")
    assert written["layers"][written["linears"]["layer"][last]] == {"stack": "net.blocks", "index": 1}
    assert written["strings"][written["linears"]["kind"][last]] == "moe.experts.*.down"
    head = list(report.linears).index("head.weight")
    assert written["linears"]["layer"][head] == 0


def test_errors_keep_four_digits(report: Report, written: dict[str, Any]) -> None:
    for row, before, after in zip(
        report.linears.values(), written["linears"]["before"], written["linears"]["after"], strict=True
    ):
        if row.error is None or row.nearest_error is None:
            assert (before, after) == (None, None)
        else:
            assert before == pytest.approx(row.nearest_error, rel=5e-4)
            assert after == pytest.approx(row.error, rel=5e-4)


def test_groups_point_at_their_linears(report: Report, written: dict[str, Any]) -> None:
    found = written["groups"]["linears"][list(report.groups).index("net.blocks.0.norm.weight")]
    assert [name(written, written["linears"]["name"][i]) for i in found] == [
        f"net.blocks.0.attn.{part}" for part in "qkv"
    ]


def test_curves_share_one_grid(written: dict[str, Any]) -> None:
    assert written["groups"]["grid"] == [["identity", 0.0], *(["activation", r] for r in RATIOS)]
    assert written["groups"]["curve"][0][0] == 1.0
    assert len(written["groups"]["curve"][0]) == 12


def test_graphs_are_numbered_like_layers(written: dict[str, Any]) -> None:
    (number,) = written["graphs"]
    assert written["layers"][int(number)] == {"stack": "net.blocks", "index": 1}
    assert written["graphs"][number]["diff"] == ["+a"]


def test_what_json_cannot_say_is_missing() -> None:
    row = LinearRow("a", 4, 8, nearest_error=float("nan"), error=float("inf"))
    report = Report(linears={"a.weight": row}, groups={"g": GroupRow("g", ["a"], 8, 8, gain=float("nan"))})
    found = document(report, {})
    assert (found["linears"]["before"], found["linears"]["after"]) == ([None], [None])
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("value", "expected"), [(0.123456, 0.1235), (123456.0, 123500.0), (0.0, 0.0), (None, None)]
)
def test_rounded(value: float | None, expected: float | None) -> None:
    assert rounded(value) == expected


@pytest.mark.parametrize(
    "scheme", [Scheme(), Scheme(3, 32, False), Scheme(8, -1)], ids=lambda scheme: str(scheme)
)
def test_bytes_are_those_of_the_scheme(scheme: Scheme) -> None:
    row = LinearRow("a", 24, 96, decision="quantized", scheme=str(scheme))
    assert stored_bytes(row) == packed_bytes(24, 96, scheme)


def test_bytes_of_a_linear_in_float() -> None:
    assert stored_bytes(LinearRow("a", 24, 96, decision="refused")) == 2 * 24 * 96
