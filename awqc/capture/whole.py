"""The rungs that trace the whole root with ``torch.export``: as it is, and with help."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor

from awqc.capture.exported import graph_of_program
from awqc.capture.patches import exporter_patches
from awqc.capture.subject import Subject
from awqc.capture.traced_regions import NEEDS_VALUES, TracedRegions, Unfollowed
from awqc.capture.tracing import Fakes, export
from awqc.errors import CaptureError
from awqc.graph import Graph

#: Masks, each with the ids that it is about.
_MASKS = {"attention_mask": "input_ids", "decoder_attention_mask": "decoder_input_ids"}
_TYPES = {"token_type_ids": "input_ids"}
#: Share of the parameters in regions below which no taking apart finds more.
FEW = 0.25


def trace(
    subject: Subject, explicit: Mapping[str, Tensor] | None = None, regions: TracedRegions | None = None
) -> Graph:
    """The root as ``torch.export`` sees it.

    Args:
        explicit: arguments besides the inputs; they become constants of the graph.
        regions: modules that are run as they are.

    Raises:
        CaptureError: if it cannot be traced.
    """
    explicit = explicit or {}
    arguments = {**subject.arguments(), **explicit}
    prepare = regions.install if regions is not None else lambda: None
    program = export(subject.module, (), arguments, Fakes(subject.dtype, subject.device), prepare)
    constants = {name: value.to(subject.device) for name, value in explicit.items()}
    graph, _ = graph_of_program(program, subject.module, subject.builder(), subject.root, constants)
    return graph


def with_regions(
    subject: Subject,
    failure: CaptureError,
    explicit: Mapping[str, Tensor] | None = None,
    most: float = 1.0,
) -> Graph:
    """Modules that cannot be traced without values are run as they are.

    Args:
        failure: of :func:`trace` without them.
        most: how much of the parameters they may hold, as a share.

    Raises:
        CaptureError: if that does not help.
    """
    regions = TracedRegions(subject.paths(), subject.dtype, most=most)
    graph: Graph = regions.trace(lambda: trace(subject, explicit, regions), subject.module, failure)
    names = ", ".join(sorted(kind.__name__ for kind in regions.kinds))
    subject.notes.append(f"run as they are: all modules of class {names}")
    return graph


def with_arguments(subject: Subject, explicit: Mapping[str, Tensor]) -> Graph:
    """Masks or token types given to the forward; modules that even so need values are run as they are.

    Raises:
        CaptureError: if that does not help.
    """
    try:
        return trace(subject, explicit)
    except CaptureError as failure:
        if not isinstance(failure.__cause__, NEEDS_VALUES) and not isinstance(failure, Unfollowed):
            raise
        return with_regions(subject, failure, explicit, FEW if isinstance(failure, Unfollowed) else 1.0)


def with_patches(subject: Subject) -> Graph:
    """Under the patches of transformers' own exporter.

    Raises:
        CaptureError: if there are none, or they do not help.
    """
    with exporter_patches():
        return with_arguments(subject, {})


def explicit_arguments(subject: Subject) -> list[dict[str, Tensor]]:
    """Masks and token types that the forward would make up by itself: the choices there are."""
    parameters = inspect.signature(subject.module.forward).parameters

    def missing(names: Mapping[str, str], make: object) -> dict[str, Tensor]:
        assert callable(make)
        there = {n: subject.inputs.get(ids) for n, ids in names.items() if n in parameters}
        return {
            n: make(ids, dtype=torch.int64)
            for n, ids in there.items()
            if isinstance(ids, Tensor) and subject.inputs.get(n) is None
        }

    masks, types = missing(_MASKS, torch.ones_like), missing(_TYPES, torch.zeros_like)
    choices = [masks, {**masks, **types}, types] if masks and types else [{**masks, **types}]
    return [chosen for chosen in choices if chosen]
