"""One model of the zoo and what was found in it, analyzed once a run."""

import functools

from torch import nn

import awqc
from awqc.analysis import Analysis
from awqc.scaleflow.groups import ScaleGroup
from tests.zoo.models import build, token_ids

BATCH = {"input_ids": token_ids()}


class Specimen:
    def __init__(self, name: str) -> None:
        self.name = name
        self.model: nn.Module = build(name)
        self.analysis: Analysis = awqc.analyze(self.model, BATCH)

    def group_of(self, linear: str) -> ScaleGroup:
        """The group of the linear with this weight; fails with the reason if it has none."""
        found = self.analysis.linears[linear]
        assert isinstance(found, ScaleGroup), f"{linear}: {found}"
        return found

    def refusal_of(self, linear: str) -> str:
        """Why the linear with this weight has no group; fails if it has one."""
        found = self.analysis.linears[linear]
        assert isinstance(found, str), f"{linear} is in group {found.name}"
        return found


@functools.cache
def specimen(name: str) -> Specimen:
    """The model of this name; whoever takes it leaves it as it is."""
    return Specimen(name)
