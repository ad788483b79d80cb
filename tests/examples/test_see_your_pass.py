"""The walk from a custom pass to its effect."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "see_your_pass.py"
LINE = re.compile(r"(\S+) +(\S+) -> (\S+)  (\d+) -> (\d+) bytes")


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60


def test_graph_difference_errors_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("see_your_pass", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    page = tmp_path / "page.html"
    example.main(page, samples=2)

    printed = capsys.readouterr().out.splitlines()
    removed = {line[1:] for line in printed if line.startswith("-") and "awqc.qlinear" in line}
    added = {line[1:] for line in printed if line.startswith("+") and "awqc.qlinear" in line}
    assert added
    # The pass changed nothing about the graph but the size of groups.
    assert {line.replace(", 32)", ", 128)") for line in added} == removed

    rows = [match.groups() for line in printed if (match := LINE.fullmatch(line))]
    finer = [row for row in rows if row[3] != row[4]]
    assert 0 < len(finer) == len(added) < len(rows)
    assert all(int(after) > int(before) for *_, before, after in finer)
    # A smaller group has a smaller range and so a finer step; single linears may be unlucky all the same.
    better = sum(float(after) < float(before) for _, before, after, *_ in finer)
    assert better > 0.9 * len(finer)

    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text("utf-8"))
    assert found is not None
    diffs = [line for graph in json.loads(found[1])["graphs"].values() for line in graph["diff"]]
    assert {line[1:] for line in diffs if line.startswith("+") and "awqc.qlinear" in line} == added
