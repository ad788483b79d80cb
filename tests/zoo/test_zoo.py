"""Every group found in every architecture folds, and what is found is what the golden files say."""

import copy
import math
import re

import pytest
import torch
from torch import Tensor, nn

from awqc.analysis import Analysis
from awqc.capture import relative_error
from awqc.scaleflow.groups import random_scales
from awqc.scaleflow.sites import fold
from awqc.views import linears
from tests.golden.compare import check_golden
from tests.zoo.models import ZOO
from tests.zoo.specimen import BATCH, Specimen, specimen


@pytest.fixture(params=list(ZOO))
def found(request: pytest.FixtureRequest) -> Specimen:
    return specimen(request.param)


def table(analysis: Analysis) -> str:
    """Groups and refusals as text. Numbers at the end of node names are left out: they only count ops."""
    lines = []
    for group in analysis.groups:
        lines.append(f"group {group.name}: {int(group.alive.sum())} of {group.channels} channels")
        for part in group.parts:
            shape = ", ".join(map(str, part.ids.shape))
            lines.append(f"  {part.parameter} ({shape}) ^{-part.degree:g}")
    for name, reason in analysis.linears.items():
        if isinstance(reason, str):
            lines.append(f"refused {name}: " + re.sub(r"(_default)?(_\d+)?\b", "", reason))
    return "\n".join(lines) + "\n"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**BATCH, use_cache=False).logits


def test_groups_are_those_of_the_golden_file(found: Specimen) -> None:
    check_golden(f"zoo/{found.name}.txt", table(found.analysis))


def test_every_linear_has_a_group_or_a_reason(found: Specimen) -> None:
    assert set(found.analysis.linears) == {view.parameter for view in linears(found.analysis.graph)}
    lookups = {id(m.weight) for m in found.model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in found.model.named_parameters():
        if parameter.ndim == 2 and id(parameter) not in lookups:
            assert name in found.analysis.linears


def test_random_scales_move_nothing_in_float64(found: Specimen) -> None:
    assert found.analysis.prove(BATCH) < 1e-9


def test_random_scales_move_nothing_in_eager_execution(found: Specimen) -> None:
    """Norms cast to float32 inside, so the rounding of float32 is what eager execution can reach."""
    model = copy.deepcopy(found.model).double()
    before = logits(model)
    found.analysis.fold(model, seed=1)
    parameters = dict(model.named_parameters())
    folded = {part.parameter for group in found.analysis.groups for part in group.parts}
    for name, original in found.model.named_parameters():
        assert torch.equal(parameters[name].float(), original) == (name not in folded), name
    bound = 64 * math.sqrt(len(found.analysis.graph.nodes)) * torch.finfo(torch.float32).eps
    assert relative_error(logits(model), before) < bound


def test_producers_alone_move_the_output(found: Specimen) -> None:
    """So the proof can fail: it sees when the consumers of any one group are forgotten."""
    graph = found.analysis.graph.retyped(torch.float64)
    before = graph.run(BATCH)[0]
    for group in found.analysis.groups:
        weights = graph.weights.like(torch.float64)
        scales = random_scales(group, torch.Generator().manual_seed(0))
        for part in group.producers:
            fold(part, scales, weights)
        assert relative_error(graph.run(BATCH, weights)[0], before) > 1e-3, group.name
