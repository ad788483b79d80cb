"""What is on the page before any script runs, and what it carries."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

import awqc.page
from awqc.errors import CheckpointError, ConfigError
from awqc.page import read_evaluation, render
from awqc.page.evaluation import Measured
from awqc.page.facts import duration, percent, steps
from awqc.page.render import _LIBRARIES, _SCRIPTS, _STYLES
from awqc.page.sources import read_report
from awqc.report import Report
from tests.page.reports import synthetic

FOLDER = Path(awqc.page.__file__).parent
EVALUATION = {
    "model": "out",
    "text": "test.txt",
    "perplexity": {"value": 40.6, "tokens": 1000, "nll": 3.7},
    "reference": {"value": 40.29, "tokens": 1000, "nll": 3.69},
    "kl": 0.0191,
    "top1_agreement": 0.913,
}


def test_names_cannot_leave_their_place() -> None:
    """A checkpoint's names are data: none ends the script or opens a tag."""
    report = synthetic(1)
    report.linears["x"] = report.linears["head.weight"]
    report.linears["x"].reason = "</script><script>alert(1)</script>"
    page = render(report, "<b>bold</b>")
    assert "alert(1)</script>" not in page
    assert "<b>bold" not in page


def test_nothing_is_loaded_from_elsewhere() -> None:
    page = render(synthetic(1), "t")
    assert re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?!data:)", page) == []
    assert "sourceMappingURL" not in page
    assert "default-src 'none'" in page


def test_the_libraries_are_those_of_the_list() -> None:
    rows = re.findall(r"^\| (\S+\.js) \| (\S+) \| (\S+) \|.* ([0-9a-f]{64}) \|$", _readme(), re.MULTILINE)
    assert {file for file, *_ in rows} == {file.name for file in (FOLDER / "vendor").glob("*.js")}
    for file, _, version, digest in rows:
        assert hashlib.sha256((FOLDER / "vendor" / file).read_bytes()).hexdigest() == digest
        assert version in _LIBRARIES[file.removesuffix(".min.js")]
        assert (FOLDER / "vendor" / file.replace(".min.js", ".LICENSE")).is_file()


def _readme() -> str:
    return (FOLDER / "vendor" / "README.md").read_text(encoding="utf-8")


def test_every_script_is_read() -> None:
    assert {file.name for file in (FOLDER / "assets").iterdir()} == {*_SCRIPTS, *_STYLES}


def test_licenses_go_along() -> None:
    page = render(synthetic(1), "t")
    for library in _LIBRARIES:
        assert (FOLDER / "vendor" / f"{library}.LICENSE").read_text(encoding="utf-8").strip() in page


def test_what_is_measured_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    file.write_text(json.dumps(EVALUATION))
    measured = read_evaluation(file)
    assert measured == Measured("test.txt", 1000, 40.6, 40.29, 0.0191, 0.913)
    page = render(synthetic(1), "t", [measured])
    assert "0.0191 nats" in page
    assert "Perplexity was not measured" not in page
    assert "Perplexity was not measured" in render(synthetic(1), "t")


def test_perplexity_alone(tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    file.write_text(json.dumps({k: EVALUATION[k] for k in ("text", "perplexity")}))
    assert read_evaluation(file) == Measured("test.txt", 1000, 40.6)


@pytest.mark.parametrize(
    ("content", "why"),
    [("[]", "'list' object has no attribute"), ("{}", "no 'text'"), ("{", "Expecting property name")],
)
def test_what_is_no_evaluation(tmp_path: Path, content: str, why: str) -> None:
    file = tmp_path / "eval.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=f"eval.json is not what 'awqc eval --json' prints .{why}"):
        read_evaluation(file)


def test_what_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_report(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} has no awqc_report.json: only checkpoints that awqc has written hold one"
    )
    with pytest.raises(CheckpointError) as caught:
        read_report(tmp_path / "none")
    assert str(caught.value) == f"there is no {tmp_path / 'none'}: give a checkpoint directory or a report"
    damaged = tmp_path / "awqc_report.json"
    damaged.write_text('{"linears": {"a": {"no_such_field": 1}}}')
    with pytest.raises(CheckpointError, match="is damaged, or of another version of awqc"):
        read_report(tmp_path)


def test_a_report_is_read_from_its_directory_or_its_file(tmp_path: Path) -> None:
    report = synthetic(1)
    (tmp_path / "awqc_report.json").write_text(report.to_json())
    assert read_report(tmp_path) == report == read_report(tmp_path / "awqc_report.json")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.0%"), (0.00093, "0.093%"), (0.0046, "0.46%"), (0.0146, "1.5%"), (0.57, "57%"), (1.2, "120%")],
)
def test_percent(value: float, text: str) -> None:
    assert percent(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00 s"), (0.0042, "4.2 ms"), (0.234, "0.23 s"), (19.2, "19 s"), (200, "3 min 20 s")],
)
def test_duration(value: float, text: str) -> None:
    assert duration(value) == text


def _contrast(first: str, second: str) -> float:
    """WCAG 2.2, "contrast ratio" and "relative luminance"."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("ink", "ground", "least"),
    [
        *((ink, ground, 4.5) for ink in ("ink", "muted", "accent") for ground in ("paper", "raised")),
        ("added-ink", "added", 4.5),
        ("removed-ink", "removed", 4.5),
        ("strong-line", "paper", 3.0),
    ],
)
def test_everything_is_legible(theme: int, ink: str, ground: str, least: float) -> None:
    """WCAG 2.2 AA: 4.5 for text, 3 for the outlines of what is used."""
    style = (FOLDER / "assets" / "base.css").read_text(encoding="utf-8")
    colours = {n: c for n, *c in re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)", style)}
    assert _contrast(colours[ink][theme], colours[ground][theme]) >= least


def test_passes_are_described_in_plain_words() -> None:
    report = Report(seconds={one.name: 1.0 for one in awqc.Pipeline.default()})
    found = steps(report)
    assert [step.name for step in found] == awqc.Pipeline.default().names()
    assert all(step.about and "`" not in step.about for step in found)


def test_an_empty_report() -> None:
    assert "This report holds no times" in render(Report(), "nothing")
