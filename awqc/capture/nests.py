"""Nests of tensors: tuples, lists, dicts, and the dataclasses of the user."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.export
from torch import Tensor
from torch.utils._pytree import tree_leaves

#: Dataclasses that cannot be taken apart, since they are not built from their fields.
_CLOSED: set[type] = set()


def open_dataclasses(value: Any) -> None:
    """Let torch look into the dataclasses with tensors that ``value`` holds, from now on.

    To torch an instance of a class that it has not been told of is a leaf: tensors in it would be seen
    neither as inputs nor as results. What transformers returns is known to it already.
    """
    while kinds := {type(leaf) for leaf in tree_leaves(value) if _is_closed(leaf)}:
        for kind in kinds:
            try:
                torch.export.register_dataclass(kind)
            except ValueError:
                _CLOSED.add(kind)


def _is_closed(leaf: Any) -> bool:
    if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type) or type(leaf) in _CLOSED:
        return False
    values = [getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)]
    return any(isinstance(x, Tensor) or _is_closed(x) for x in tree_leaves(values))
