"""Capture: the ways of obtaining a graph, tried in order until one computes what eager execution does.

    torch.export                        the whole on fake weights
    torch.export with regions           the same, modules that need values run as they are
    torch.export with attention_mask    the same, with masks and token types that the forward would make up
    torch.export with exporter patches  the same, under the patches of transformers' exporter
    pieces                              each module that can be traced by itself, joined by those that cannot
    tape                                what one run did, for analysis only
    eager                               no graph: no scale is folded, linears are quantized all the same

Two inputs decide: a graph that differs from eager execution on one of them is no graph of the model, and
the next way is tried. A model without weights is not run, so there the first way that traces is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch

from awqc.capture.eager import as_it_is
from awqc.capture.nests import open_dataclasses
from awqc.capture.numerics import check_against_eager
from awqc.capture.pieces import in_pieces
from awqc.capture.report import CaptureReport
from awqc.capture.subject import Subject
from awqc.capture.tape import tape
from awqc.capture.traced_regions import NEEDS_VALUES, Unfollowed
from awqc.capture.whole import FEW, explicit_arguments, trace, with_arguments, with_patches, with_regions
from awqc.errors import CaptureError
from awqc.graph import Graph
from awqc.replaceable import MoreThanLinear, more_than_linear
from awqc.storage.source import ModelSource, named_tensors

#: A way of capturing; it is given the failure of plain ``torch.export``.
Rung = Callable[[Subject, CaptureError], Graph]
Purpose = Literal["compile", "analyze"]
#: The first rung.
EXPORT = "torch.export"
#: The rung without a graph.
EAGER = "eager"
REGIONS = "torch.export with regions"


def capture(
    source: ModelSource,
    inputs: Mapping[str, Any],
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    *,
    root: str = "",
    checks: Mapping[str, Mapping[str, Any]] | None = None,
    purpose: Purpose = "compile",
    rung: str | None = None,
) -> Graph:
    """Capture ``source.module(**inputs)`` as a :class:`Graph`; how is in its :class:`CaptureReport`.

    Args:
        source: the model; its weights are not read unless ``checks`` are given or tracing fails.
        inputs: example inputs by argument name; their shapes become the graph's.
        dtype: floating-point dtype the graph computes in; None keeps that of the parameters.
        device: device the graph is traced for.
        root: submodule to capture; ``inputs`` are then its arguments.
        checks: inputs by name on which graph and eager execution must agree.
        purpose: a tape is good for analysis only.
        rung: the only way to try; None tries all.

    Raises:
        CaptureError: if the module does not run on its inputs.
    """
    open_dataclasses(dict(inputs))
    failures: list[CaptureError] = []
    notes: list[str] = []
    for name, attempt in _rungs(Subject(source, inputs, dtype, device, root), purpose, failures):
        if rung not in (None, name):
            continue
        subject = Subject(source, inputs, dtype, device, root)
        try:
            first = failures[0] if failures else CaptureError("it was not tried")
            graph = attempt(subject, first)
            if not graph.outputs:
                raise CaptureError(
                    f"{type(subject.module).__name__} returns no tensor in a tuple, list, dict or dataclass: "
                    "nothing says what it computes"
                )
            graph.facts[CaptureReport] = CaptureReport(name, notes=notes + subject.notes, root=root)
            if checks:
                names = {id(t): n for n, t in named_tensors(source.module)}
                # A forward that draws random numbers is no graph; as a region it draws the same each time.
                check_against_eager(graph, subject.module, checks, names, seeded=name == EAGER)
            graph.facts[MoreThanLinear] = more_than_linear(source.module)
            return graph
        except CaptureError as error:
            failures.append(error)
            notes.append(f"{name}: {error}")
        except torch.cuda.OutOfMemoryError as error:
            what = str(error).partition(". ")[0]
            raise CaptureError(
                f"{type(subject.module).__name__} does not fit as the whole that {name!r} takes ({what}), "
                f"and other ways failed: {'; '.join(notes) or 'none was tried'}"
            ) from error
    raise failures[-1] if failures else CaptureError(f"there is no rung {rung!r} to {purpose} with")


def _rungs(subject: Subject, purpose: Purpose, failures: list[CaptureError]) -> Iterator[tuple[str, Rung]]:
    yield EXPORT, lambda subject, failure: trace(subject)
    # What went through a trace but is no graph may be what explicit masks do without.
    late = bool(failures) and isinstance(failures[0], Unfollowed)
    if not late:
        yield REGIONS, with_regions
    wants_values = bool(failures) and isinstance(failures[0].__cause__, NEEDS_VALUES)
    for explicit in [] if wants_values else explicit_arguments(subject):
        name = f"torch.export with {' and '.join(explicit)}"
        yield name, lambda subject, failure, explicit=explicit: with_arguments(subject, explicit)  # type: ignore[misc]
    if late:
        yield REGIONS, lambda subject, failure: with_regions(subject, failure, most=FEW)
    yield "torch.export with exporter patches", lambda subject, failure: with_patches(subject)
    yield "pieces", lambda subject, failure: in_pieces(subject)
    if late:
        yield REGIONS, with_regions
    if purpose == "analyze":
        yield "tape", lambda subject, failure: tape(subject)
    yield EAGER, lambda subject, failure: as_it_is(subject)
