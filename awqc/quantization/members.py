"""The weights that a group's scale has to suit, and which of them can be suited apart from others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor, fx

from awqc.graph import Graph
from awqc.observers.stages import Observer
from awqc.quantization.matrices import batches
from awqc.quantization.schemes import Schemes
from awqc.quantized import Scheme
from awqc.scaleflow.groups import ScaleGroup
from awqc.views import ExpertLinear, Linear


@dataclass(frozen=True)
class Run:
    """Matrices of a member that are handled at once.

    Args:
        places: their numbers among those of the member, part by part.
        matrices: their numbers in the stack.
    """

    places: range
    matrices: range


@dataclass(frozen=True)
class Member:
    """Matrices of one linear or of one stack of experts in P parts of a group, M in each.

    Args:
        view: where they are.
        node: the activation that they read.
        scheme: bits, group size, symmetry.
        matrices: ``(P, M)`` their numbers in the stack.
        ids: ``(P, M, K)`` for each input column its channel within the part, -1 without one; or
            ``(P, 1, K)`` where those of a part are alike.
        degree: the power of the scale that divides the input.
    """

    view: Linear | ExpertLinear
    node: fx.Node
    scheme: Scheme
    matrices: list[list[int]]
    ids: Tensor
    degree: float

    def runs(self, rows: int = 0) -> list[Run]:
        """All matrices; see :func:`awqc.quantization.matrices.batches` for ``rows``."""
        numbers, found = [number for part in self.matrices for number in part], list[Run]()
        most = len(batches(self.view, rows)[0])
        for _, following in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
            pairs = list(following)
            for start in range(0, len(pairs), most):
                (place, number), size = pairs[start], len(pairs[start : start + most])
                found.append(Run(range(place, place + size), range(number, number + size)))
        return found

    def columns(self, scales: Tensor, run: Run) -> Tensor:
        """The factor of each input column under ``scales`` ``(P, S, C)``: ``(B, S, K)``."""
        each = len(self.matrices[0])
        padded = torch.cat([scales, scales.new_ones(*scales.shape[:2], 1)], -1)
        ids = self.ids.expand(-1, each, -1).flatten(0, 1)[run.places.start : run.places.stop, None]
        index = torch.where(ids >= 0, ids, scales.shape[-1]).expand(-1, scales.shape[1], -1)
        if len(scales) == 1:
            padded = padded.expand(len(index), -1, -1)
        else:
            padded = padded[torch.tensor([place // each for place in run.places], device=scales.device)]
        return padded.gather(2, index) ** self.degree


@dataclass(frozen=True)
class Parts:
    """P parts of a group that are alike: the members of each share channels with each other, and with no
    other member of the group.

    Args:
        channels: ``(P, C)`` the channels of the group that they read; ``ids`` of members count in these.
        alive: ``(P, C)`` bool, which of them may differ from 1.
        members: at least one.
    """

    channels: Tensor
    alive: Tensor
    members: tuple[Member, ...]


@dataclass(frozen=True)
class _Reader:
    """A quantized linear or stack with the channels ``(E, K)`` that its input has, -1 without."""

    view: Linear | ExpertLinear
    node: fx.Node
    ids: Tensor
    degree: float


def parts(graph: Graph, observers: list[Observer], group: ScaleGroup) -> list[Parts]:
    """The quantized matrices of ``group``, its linears and each expert of its stacks, in parts that can be
    searched apart: between their linears, experts have channels of their own."""
    schemes, device = graph.facts[Schemes], graph.weights.device
    readers = [reader for reader in _readers(observers, group) if reader.view.parameter in schemes]
    if not readers:
        return []
    labels, of_channel = _labels([reader.ids for reader in readers], group.channels)
    matrices: dict[int, list[list[int]]] = {}
    for number, own in enumerate(labels):
        for index, label in enumerate(own.tolist()):
            matrices.setdefault(label, [[] for _ in readers])[number].append(index)
    order = of_channel.argsort(stable=True)
    sizes = torch.bincount(of_channel, minlength=sum(map(len, labels)) + 1)[:-1].tolist()
    channels = dict(enumerate(order[: sum(sizes)].split(sizes)))
    place = torch.full((group.channels + 1,), -1)  # id -1 picks the last element
    for own in channels.values():
        place[own] = torch.arange(len(own))
    alike: dict[tuple[int, ...], list[int]] = {}
    for label in sorted(matrices):
        alike.setdefault((len(channels[label]), *map(len, matrices[label])), []).append(label)
    found = []
    for those in alike.values():
        members = []
        for number, reader in enumerate(readers):
            numbers = [matrices[label][number] for label in those]
            if not numbers[0]:
                continue
            ids = place[reader.ids[torch.tensor(numbers)]]
            ids = ids[:, :1] if bool((ids == ids[:, :1]).all()) else ids
            scheme = schemes[reader.view.parameter]
            members.append(Member(reader.view, reader.node, scheme, numbers, ids.to(device), reader.degree))
        read = torch.stack([channels[label] for label in those])
        found.append(Parts(read.to(device), group.alive[read].to(device), tuple(members)))
    return found


def _readers(observers: list[Observer], group: ScaleGroup) -> Iterator[_Reader]:
    for observer in observers:
        for view in observer.views:
            if isinstance(view, ExpertLinear):
                yield _Reader(view, observer.node, *group.at_experts(view))
            else:
                ids, degree = group.at_input(observer.node)
                yield _Reader(view, observer.node, ids[None], degree)


def _labels(ids: list[Tensor], channels: int) -> tuple[list[Tensor], Tensor]:
    """The part that each matrix is in, and that each channel is in: the number of its first matrix; of
    channels that none reads, the number of matrices.

    Args:
        ids: ``(E, K)`` of each reader.
    """
    sizes = [len(each) for each in ids]
    count = sum(sizes)
    labels = [torch.arange(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
    index = [torch.where(each >= 0, each, channels) for each in ids]
    while True:
        lowest = torch.full((channels + 1,), count)
        for where, own in zip(index, labels, strict=True):
            lowest.scatter_reduce_(0, where.flatten(), own[:, None].expand_as(where).flatten(), "amin")
        lowest[-1] = count
        spread = [own.minimum(lowest[where].amin(1)) for where, own in zip(index, labels, strict=True)]
        if all(map(torch.equal, spread, labels)):
            return labels, lowest[:-1]
        labels = spread
