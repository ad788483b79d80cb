"""Where in a model a name belongs, told from the numbers in names alone.

A name is a path: ``decoder.blocks.3.mlp.experts.7.w1``. Every number in it is an index into a stack of
modules (``decoder.blocks``; inside of block 3, ``mlp.experts``). The layers of a model are the outermost
stack whose members are alike: two indices with the same names below them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_NUMBER = re.compile(r"(?:(?<=^)|(?<=[.\[]))\d+(?=[.\]]|$)")


@dataclass(frozen=True)
class Place:
    """Where one name belongs.

    Args:
        stack: path of the stack of layers, empty for a name outside of all.
        index: of the layer in its stack, -1 outside.
        kind: the name within its layer with ``*`` for every further number.
    """

    stack: str
    index: int
    kind: str

    @property
    def layer(self) -> str:
        """Path of the layer, empty outside of all."""
        return f"{self.stack}.{self.index}".lstrip(".") if self.index >= 0 else ""


def template(name: str) -> str:
    """``name`` with ``*`` for every number in it."""
    return _NUMBER.sub("*", name)


def numbers(name: str) -> list[int]:
    """What the stars of :func:`template` stand for."""
    return [int(found) for found in _NUMBER.findall(name)]


class Layers:
    """The layers of a model.

    Args:
        names: of its linears, modules or parameters; the more there are, the surer the answer.
    """

    def __init__(self, names: Iterable[str]) -> None:
        alike: dict[tuple[str, str], set[int]] = {}
        found = [[_split(name, at) for at in _NUMBER.finditer(name)] for name in names]
        for places in found:
            for place in places:
                alike.setdefault((place.stack, place.kind), set()).add(place.index)
        repeated = [[p for p in places if len(alike[p.stack, p.kind]) > 1] for places in found]
        # Of a model with one layer nothing repeats: then every outermost number is an index.
        outermost = repeated if any(repeated) else found
        self.stacks = {places[0].stack for places in outermost if places}
        self._places: dict[str, Place] = {}

    def place(self, name: str) -> Place:
        """Where ``name`` belongs; of several stacks, the outermost."""
        if name not in self._places:
            self._places[name] = self._find(name)
        return self._places[name]

    def _find(self, name: str) -> Place:
        for at in _NUMBER.finditer(name):
            place = _split(name, at)
            if place.stack in self.stacks:
                return place
        return Place("", -1, template(name))


def _split(name: str, at: re.Match[str]) -> Place:
    return Place(name[: at.start()].rstrip(".["), int(at.group()), template(name[at.end() :].lstrip(".]")))
