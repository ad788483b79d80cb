"""The order of passes, top to bottom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from awqc.backend import Backend
from awqc.passes.assume_rounded import AssumeRounded
from awqc.passes.calibrate import Calibrate
from awqc.passes.canonicalize import Canonicalize
from awqc.passes.check_coverage import CheckCoverage
from awqc.passes.clip_weights import ClipWeights
from awqc.passes.drop_unit_scales import DropUnitScales
from awqc.passes.find_scale_groups import FindScaleGroups
from awqc.passes.fold_constants import FoldConstants
from awqc.passes.fold_scales import FoldScales
from awqc.passes.insert_observers import InsertObservers
from awqc.passes.lower import Lower
from awqc.passes.quantize_linears import QuantizeLinears
from awqc.passes.round_weights import RoundWeights
from awqc.passes.scale_inputs import ScaleInputs
from awqc.passes.search_scales import SearchScales
from awqc.pipeline import Pipeline
from awqc.quantized import Scheme


def default_pipeline() -> Pipeline:
    """Passes of :func:`awqc.compile`."""
    return Pipeline(
        (
            # once, over the whole graph
            Canonicalize(),
            ScaleInputs(),
            FoldConstants(),
            FindScaleGroups(),
            InsertObservers(),
            CheckCoverage(),
            # stage by stage, while the calibration tokens move through
            Calibrate(),
            SearchScales(),
            FoldScales(),
            ClipWeights(),
            RoundWeights(),
            # once, over the whole graph
            DropUnitScales(),
            QuantizeLinears(),
            Lower(),
        )
    )


def analysis_pipeline() -> Pipeline:
    """Passes of :func:`awqc.analyze`: those that need no weights."""
    return Pipeline((Canonicalize(), FoldConstants(), FindScaleGroups(proof=False)))


def canonical_pipeline() -> Pipeline:
    """One form for linears, as the lowered graph of a compile has them: for that of a loaded checkpoint."""
    return Pipeline((Canonicalize(),))


def outline_pipeline(
    pipeline: Pipeline,
    backend: str | Backend,
    device: torch.device,
    schemes: Mapping[str, Scheme] | None = None,
) -> Pipeline:
    """What ``pipeline`` does to the nodes of a graph, without its weights: the passes that run over the
    whole, for linears that run on ``device``.

    Args:
        schemes: see :class:`awqc.passes.assume_rounded.AssumeRounded`.
    """
    passes = [one for one in pipeline if one.scope == "graph"]
    quantize = [one.name for one in passes].index(QuantizeLinears.name)
    passes.insert(quantize, AssumeRounded(schemes))
    return Pipeline(
        tuple(
            replace(one, proof=False)
            if isinstance(one, FindScaleGroups)
            else replace(one, backend=backend, device=device)
            if isinstance(one, Lower)
            else one
            for one in passes
        )
    )
