"""The weights that a group's scale has to suit, and which of them can be suited apart from others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awqc.graph import Graph
from awqc.observers.input_statistics import InputStatistics
from awqc.observers.stages import Observer
from awqc.observers.statistics import Statistics, column_scales
from awqc.quantization.matrices import Matrix, matrices
from awqc.quantization.schemes import Schemes
from awqc.quantized import Scheme
from awqc.scaleflow.groups import ScaleGroup
from awqc.views import ExpertLinear


@dataclass(frozen=True)
class Member:
    """One quantized matrix of a group, as a search sees it.

    Args:
        matrix: which one.
        weight: ``(N, K)`` float32.
        scheme: bits, group size, symmetry.
        statistics: of its inputs.
        ids: ``(K,)`` channel of each input column, -1 without one.
        degree: the power of the scale that divides the input.
    """

    matrix: Matrix
    weight: Tensor
    scheme: Scheme
    statistics: InputStatistics
    ids: Tensor
    degree: float

    def columns(self, scales: Tensor) -> Tensor:
        """The factor of each input column, ``(K,)``."""
        return column_scales(self.ids, self.degree, scales)


@dataclass(frozen=True)
class Part:
    """Members that share channels with each other and with no other member of their group.

    Args:
        channels: ``(C,)`` the channels of the group that they read; ``ids`` of members count in these.
        alive: ``(C,)`` bool, which of them may differ from 1.
        members: at least one.
    """

    channels: Tensor
    alive: Tensor
    members: tuple[Member, ...]


def parts(graph: Graph, observers: list[Observer], group: ScaleGroup) -> list[Part]:
    """The quantized matrices of ``group``, its linears and each expert of its stacks, in parts that can be
    searched apart: between their linears, experts have channels of their own."""
    label = torch.full((group.channels,), -1)
    found: dict[int, list[Member]] = {}
    for number, member in enumerate(_members(graph, observers, group)):
        read = member.ids[member.ids >= 0].cpu()
        met = [part for part in label[read].unique().tolist() if part >= 0]
        found[number] = [m for part in met for m in found.pop(part)] + [member]
        for part in met:
            label[label == part] = number
        label[read] = number
    return [_part(group, label == number, part) for number, part in found.items()]


def _part(group: ScaleGroup, read: Tensor, found: list[Member]) -> Part:
    device = found[0].ids.device
    channels = read.nonzero().flatten()
    place = torch.full((group.channels + 1,), -1)  # id -1 picks the last element
    place[channels] = torch.arange(len(channels))
    place = place.to(device)
    renumbered = tuple(replace(member, ids=place[member.ids]) for member in found)
    return Part(channels.to(device), group.alive[channels].to(device), renumbered)


def _members(graph: Graph, observers: list[Observer], group: ScaleGroup) -> Iterator[Member]:
    statistics, schemes = graph.facts[Statistics], graph.facts[Schemes]
    for observer in observers:
        for view in observer.views:
            if view.parameter not in schemes:
                continue
            if isinstance(view, ExpertLinear):
                ids, degree = group.at_experts(view)
            else:
                ids, degree = group.at_input(observer.node)
                ids = ids[None]
            ids = ids.to(graph.weights.device)
            for index, matrix in enumerate(matrices(view)):
                yield Member(
                    matrix,
                    matrix.weight(graph.weights),
                    schemes[view.parameter],
                    statistics.of(observer.node, matrix),
                    ids[index],
                    degree,
                )
