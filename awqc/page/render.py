"""Templates, styles, scripts and data as one HTML file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from awqc import __version__
from awqc.page import facts
from awqc.page.costs import Costs
from awqc.page.data import document
from awqc.page.evaluation import Measured
from awqc.page.graphs import LayerGraph
from awqc.report import Report

#: In the order in which they are read.
_STYLES = ("base.css", "sections.css", "table.css", "narrow.css")
_SCRIPTS = ("data.js", "theme.js", "heat.js", "flow.js", "detail.js", "text.js", "table.js", "main.js")
_LIBRARIES = {
    "d3": "D3 7.9.0, ISC license",
    "plot": "Observable Plot 0.6.17, ISC license",
    "dagre": "dagre 3.1.3, MIT license",
}
#: A browser's developer tools would ask for the map that a library's last line names.
_SOURCE_MAP = re.compile(r"^//# sourceMappingURL=.*$", re.MULTILINE)


def render(
    report: Report,
    title: str,
    measured: Sequence[Measured] = (),
    graphs: Mapping[str, LayerGraph] | None = None,
    costs: Costs | None = None,
) -> str:
    """The page as HTML text that needs nothing else, no network either.

    Args:
        report: of a compile.
        title: what was compiled.
        measured: perplexities, and distances to the original.
        graphs: text and scale flow by layer, from :func:`awqc.page.graphs.layer_graphs`.
        costs: where the time of a step goes, from :func:`awqc.page.costs.read_costs`.
    """
    environment = Environment(
        loader=PackageLoader("awqc.page"),
        autoescape=select_autoescape(("html",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["seconds"] = facts.duration
    return environment.get_template("page.html").render(
        title=title,
        version=__version__,
        figures=list(facts.figures(report, measured)),
        measured=bool(measured),
        costs=costs,
        steps=facts.steps(report),
        facts=facts.facts(report),
        reasons=facts.reasons(report),
        notes=report.notes,
        libraries=_LIBRARIES,
        style="\n".join(_asset("assets", name) for name in _STYLES),
        vendor=[_library(name) for name in _LIBRARIES],
        script="\n".join(_asset("assets", name) for name in _SCRIPTS),
        document=document(report, graphs or {}),
    )


def _library(name: str) -> str:
    """A library below its license, which has to go along."""
    license, code = _asset("vendor", f"{name}.LICENSE"), _asset("vendor", f"{name}.min.js")
    return f"/*!\n{license.strip()}\n*/\n{_SOURCE_MAP.sub('', code)}"


def _asset(folder: str, name: str) -> str:
    return (files("awqc.page") / folder / name).read_text(encoding="utf-8")
