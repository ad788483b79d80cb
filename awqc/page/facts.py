"""The parts of the page that are text: figures, the pipeline's steps, and facts about the compile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from awqc.page.data import mean
from awqc.page.evaluation import Measured
from awqc.pipeline import Pipeline
from awqc.report import Report
from awqc.tables import size

#: What is timed besides passes.
_STEPS = {
    "read-calibration": "Text in, blocks of token ids out.",
    "capture": "The model as a graph of ATen ops, compared with eager execution.",
    "check-format": "Whether the checkpoint's format can carry every linear.",
    "run-tokens": "Calibration tokens move from stage to stage.",
}
Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class Figure:
    """One of the large figures on top: what it is, what it was before if that is known, and a remark."""

    label: str
    value: str
    before: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Step:
    """One step of the pipeline.

    Args:
        name: as the report calls it.
        seconds: wall time.
        share: of the longest step, 0 to 1.
        about: what it does, in a sentence.
        by_stage: whether it runs once for each stage.
    """

    name: str
    seconds: float
    share: float
    about: str
    by_stage: bool


def percent(value: float, digits: int = 2) -> str:
    """A share with so many significant digits: ``0.11%``."""
    scaled = 100 * value
    places = 0 if scaled >= 10 ** (digits - 1) else max(0, digits - 1 - _exponent(scaled))
    return f"{scaled:.{min(places, 8)}f}%"


def _exponent(value: float) -> int:
    return int(f"{abs(value):e}".partition("e")[2])


def figures(report: Report, measured: Sequence[Measured]) -> Iterator[Figure]:
    """The figures on top of the page."""
    if report.sizes:
        before, after = report.sizes["model_before"], report.sizes["model_after"]
        smaller = f"{before / after:.1f} times smaller than in 16 bits"
        yield Figure("Size", _short(after), _short(before), smaller)
    rows = [row for row in report.quantized() if row.nearest_error and row.error is not None]
    nearest, stored = mean(r.nearest_error for r in rows), mean(r.error for r in rows)
    if nearest and stored is not None:
        change = f"{abs(stored / nearest - 1):.0%} {'less' if stored < nearest else 'more'} than rounding"
        yield Figure("Error of linears", percent(stored), percent(nearest), f"{change} to nearest, held out")
    for one in measured:
        before_text = f"{one.reference:.2f}" if one.reference is not None else ""
        yield Figure(
            "Perplexity",
            f"{one.perplexity:.2f}",
            before_text,
            f"{one.tokens:,} tokens of {Path(one.text).name}",
        )
        if one.kl is not None:
            agree = f"same first token in {one.agreement:.1%}" if one.agreement is not None else ""
            yield Figure("KL to the original", f"{one.kl:.4f} nats", "", agree)
    if report.linears:
        quantized = sum(1 for _ in report.quantized())
        schemes = ", ".join(Counter(row.scheme for row in report.quantized()))
        yield Figure("Linears", f"{quantized:,}", "", f"of {len(report.linears):,} quantized; {schemes}")
    if report.seconds:
        tokens = report.calibration.get("tokens")
        remark = f"{tokens:,} calibration tokens" if tokens else ""
        yield Figure("Compiled in", duration(sum(report.seconds.values())), "", remark)


def _short(count: int) -> str:
    """Bytes with three digits and a space that does not break."""
    value, unit = size(count).split()
    return f"{float(value):.{max(0, 3 - len(value.partition('.')[0]))}f}\N{NO-BREAK SPACE}{unit}"


def duration(seconds: float) -> str:
    """``4.2 ms``, ``0.23 s``, ``19 s``, ``3 min 20 s``."""
    if 0 < seconds < 0.1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 10:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:,} min {rest:02} s" if minutes else f"{rest} s"


def steps(report: Report) -> list[Step]:
    """What took time, in the order it ran."""
    known = {p.name: p for p in Pipeline.default()}
    longest = max(report.seconds.values(), default=0.0) or 1.0
    found = []
    for name, seconds in report.seconds.items():
        doc = (type(known[name]).__doc__ or "") if name in known else _STEPS.get(name, "")
        by_stage = name == "run-tokens" or (name in known and known[name].scope == "stage")
        about = doc.partition("\n")[0].replace("``", "")
        found.append(Step(name, seconds, seconds / longest, about, by_stage))
    return found


def facts(report: Report) -> list[tuple[str, Facts]]:
    """Headings with facts below them."""
    found = [
        ("Calibration", _calibration(report)),
        ("Capture and proof", _capture(report)),
        ("Options", _plain(report.config)),
        ("Bytes", [(key.replace("_", " "), size(value)) for key, value in report.sizes.items()]),
    ]
    return [(heading, rows) for heading, rows in found if rows]


def _calibration(report: Report) -> Facts:
    return _plain(report.calibration)


def _capture(report: Report) -> Facts:
    found: Facts = []
    if report.capture:
        found.append(("captured by", str(report.capture.get("rung", ""))))
        for name, error in report.capture.get("checks", []):
            agreement = f"differs by {error:.1e}" if error else "equal"
            found.append((f"against eager execution, {name} input", agreement))
        found += [("note", str(note)) for note in report.capture.get("notes", [])]
    if report.coverage:
        found.append(("weights to be quantized that have an input scale", f"{report.coverage:.1%}"))
    if report.proof:
        error, groups = report.proof.get("relative_error", 0.0), report.proof.get("groups", 0)
        what = f"{groups:,} groups; outputs move by {error:.1e} in {report.proof.get('dtype', 'float64')}"
        found.append(("random scales folded into", what))
    return found


def _plain(values: dict[str, object]) -> Facts:
    return [(key.replace("_", " "), _value(value)) for key, value in values.items()]


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def reasons(report: Report) -> list[tuple[str, str, list[str]]]:
    """What keeps linears in float or without an input scale: what, why, and the names concerned."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in report.linears.values():
        if row.decision != "quantized":
            found.setdefault((f"{row.decision} in float", row.reason), []).append(row.name)
        elif row.group is None and row.no_group:
            found.setdefault(("without an input scale", row.no_group), []).append(row.name)
    return [(what, why, names) for (what, why), names in found.items()]
