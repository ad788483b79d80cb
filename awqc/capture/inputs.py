"""Inputs of a forward: keyword arguments of any nesting, as the flat tensors that a graph takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import key_get, keystr, tree_flatten_with_path  # noqa: F401

from awqc.capture.nests import open_dataclasses
from awqc.errors import CaptureError


def flat_inputs(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among keyword arguments under the names of the graph's inputs.

    An argument that is a tensor keeps its name; tensors inside of tuples, lists and dicts are called
    after the way to them: ``positions_0``.
    """
    found = {}
    open_dataclasses(dict(inputs))
    for path, leaf in tree_flatten_with_path(dict(inputs))[0]:
        if isinstance(leaf, Tensor):
            found[_name(path)] = leaf
    return found


def _name(path: Sequence[Any]) -> str:
    return "_".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def keyword_arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments, all by name; those that are None are left out.

    Raises:
        CaptureError: if the forward takes some by position only.
    """
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise CaptureError(
                f"{type(module).__name__} takes {name!r} by position only and cannot be a root: choose a "
                "module around it"
            )
        else:
            named[name] = value
    return {name: value for name, value in named.items() if value is not None}


def other_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A second input like ``inputs``: ids in reverse order, halved and reversed activations.

    What describes the others (masks, sizes of images) stays as it is.
    """

    def one(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        if value.is_floating_point():
            return value.flip(0) * 0.5
        return value.flip(-1) if name.endswith("ids") else value

    return {name: one(name, value) for name, value in inputs.items()}
