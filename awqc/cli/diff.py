"""``awqc diff``: two compiles side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from awqc.cli.options import Debug, Full, Json
from awqc.cli.output import Bars, print_json, stdout
from awqc.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from awqc.comparison import Comparison, LinearDifference


#: What a compile decides; the rest of what may differ follows from it.
_DECIDED = ("decision", "scheme", "scale", "rounding")


def _side(name: str) -> Any:
    return typer.Argument(metavar=name, show_default=False, help="A quantized checkpoint, or a report.")


def diff(
    a: Annotated[Path, _side("A")],
    b: Annotated[Path, _side("B")],
    weights: Annotated[
        bool, typer.Option("--weights", help="Read the stored weights of both, and how far apart they are.")
    ] = False,
    full: Full = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Which linears differ between two checkpoints or reports: in error, in size, and in what was decided."""
    from awqc.comparison import comparable_weights, compare, open_compiled, weight_difference

    first, second = open_compiled(a), open_compiled(b)
    names = comparable_weights(first, second) if weights else []
    if weights and not names:
        raise ConfigError("--weights: there is no linear that both A and B store quantized")
    with Bars("comparing") as bars:
        reading = bars.track(names, f"reading {len(names):,} weights")
        apart = {name: weight_difference(first, second, name) for name in reading}
        found = compare(first, second, apart)
    if json:
        print_json(_document(a, b, found))
        return
    console = stdout()
    for table in _tables(a, b, found, full):
        console.print(table)


def _document(a: Path, b: Path, found: Comparison) -> dict[str, Any]:
    return {
        "a": str(a),
        "b": str(b),
        "bytes": list(found.sizes),
        "error": list(found.errors),
        "options": {key: list(values) for key, values in found.options.items()},
        "same": found.same,
        "only_a": found.only_a,
        "only_b": found.only_b,
        "linears": [
            {
                "name": one.name,
                "differs": one.fields,
                "a": asdict(one.a),
                "b": asdict(one.b),
                "weights": one.weights,
            }
            for one in found.linears
        ],
    }


def _tables(a: Path, b: Path, found: Comparison, full: bool) -> list[Table]:
    from rich.table import Table

    from awqc.tables import size

    summary = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", "A", "B"):
        summary.add_column(heading, overflow="fold")
    summary.add_row("", str(a), str(b))
    summary.add_row("linears' weights", *(size(count) for count in found.sizes))
    summary.add_row("mean error", *(_error(value) for value in found.errors))
    for key, values in found.options.items():
        summary.add_row(key.replace("_", " "), *(str(value) for value in values))
    for where, names in (("only in A", found.only_a), ("only in B", found.only_b)):
        if names:
            summary.add_row(where, *_one_sided(where, names))
    common = _common_scheme(found.linears)
    if common is not None:
        summary.add_row("scheme where it differs", *common)
    title = f"{len(found.linears):,} of {len(found.linears) + found.same:,} linears differ"
    return [summary, _rows(found.linears, title, full, hide="scheme" if common else "")]


def _one_sided(where: str, names: list[str]) -> tuple[str, str]:
    text = ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
    return (text, "") if where.endswith("A") else ("", text)


def _rows(linears: list[LinearDifference], title: str, full: bool, hide: str) -> Table:
    from rich.table import Table

    from awqc.page.data import mean
    from awqc.page.layers import template
    from awqc.tables import size

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.title, table.title_justify, table.title_style = f"\n{title}", "left", "bold"
    compared = any(one.weights is not None for one in linears)
    table.add_column("linear", overflow="fold")
    numbers = [*([] if full else ["n"]), "error A", "error B", "change", "size A", "size B"]
    for heading in (*numbers, *(["weights"] if compared else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    decided = {
        one.name: [field for field in one.fields if field in _DECIDED and field != hide] for one in linears
    }
    if any(decided.values()):
        table.add_column("also", overflow="fold")
    kinds: dict[str, list[LinearDifference]] = {}
    for one in linears:
        kinds.setdefault(one.name if full else template(one.name), []).append(one)
    for kind, members in kinds.items():
        table.add_row(
            kind,
            *([] if full else [str(len(members))]),
            _error(mean([one.a.error for one in members])),
            _error(mean([one.b.error for one in members])),
            _change(members),
            size(sum(one.a.bytes for one in members)),
            size(sum(one.b.bytes for one in members)),
            *([_percent(mean([one.weights for one in members]))] if compared else []),
            *([_also(members, decided, full)] if any(decided.values()) else []),
        )
    return table


def _common_scheme(linears: list[LinearDifference]) -> tuple[str, str] | None:
    """The schemes of both sides, if all linears whose scheme differs have these."""
    schemes = {(one.a.scheme or "none", one.b.scheme or "none") for one in linears if "scheme" in one.fields}
    return schemes.pop() if len(schemes) == 1 else None


def _also(members: list[LinearDifference], decided: dict[str, list[str]], full: bool) -> str:
    """What was decided differently: names of it, or with both values."""
    if not full:
        return ", ".join(dict.fromkeys(field for one in members for field in decided[one.name]))
    pairs = [(getattr(one.a, field), getattr(one.b, field)) for one in members for field in decided[one.name]]
    return ", ".join(f"{a or 'none'} -> {b or 'none'}" for a, b in pairs)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _change(members: list[LinearDifference]) -> str:
    from awqc.page.data import mean

    first, second = mean([one.a.error for one in members]), mean([one.b.error for one in members])
    return f"{second / first - 1:+.0%}" if first and second is not None else ""


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
