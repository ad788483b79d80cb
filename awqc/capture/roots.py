"""Part of a model as the root of a capture: which part, and what it is called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from awqc.capture.inputs import keyword_arguments
from awqc.capture.lent import lent_weights
from awqc.capture.regions import Reached, stand_in
from awqc.capture.tracing import accepted_settings, evaluation_mode, reason
from awqc.errors import CaptureError, ConfigError
from awqc.storage.source import ModelSource, named_tensors, swapped_tensors
from awqc.weights import Weights


def text_part(module: nn.Module) -> str:
    """Name of the submodule that reads and writes text, where that is a part of the model: the one whose
    config the model's config calls the text's. Empty if it is the whole."""
    config = getattr(module, "config", None)
    of_text = getattr(config, "get_text_config", None)
    text = of_text() if of_text is not None else config
    if text is None or text is config:
        return ""
    return next((name for name, m in module.named_modules() if getattr(m, "config", None) is text), "")


def check_root(module: nn.Module, root: str) -> None:
    """Raise ConfigError if ``module`` has no submodule called ``root``."""
    names = [name for name, _ in module.named_modules() if name]
    if root and root not in names:
        near = [name for name in names if name.rpartition(".")[2] == root.rpartition(".")[2]]
        some = ", ".join((near or [name for name, _ in module.named_children()])[:5])
        raise ConfigError(f"root={root!r}: {type(module).__name__} has no such submodule; it has {some}")


def largest_part(module: nn.Module) -> str:
    """Name of the child with most parameters, containers that are never called looked through; empty if
    there is none that holds half of them."""
    total = sum(p.numel() for p in module.parameters())
    name = ""
    while True:
        children = dict(module.named_children())
        sizes = {n: sum(p.numel() for p in child.parameters()) for n, child in children.items()}
        largest = max(sizes, key=lambda n: sizes[n], default="")
        if not largest or 2 * sizes[largest] < total:
            return ""
        module, name = children[largest], f"{name}.{largest}".lstrip(".")
        if not isinstance(module, nn.ModuleList | nn.ModuleDict):
            return name


def arguments_of(
    source: ModelSource, root: str, inputs: Sequence[Mapping[str, Any]], weights: Weights
) -> list[dict[str, Any]]:
    """What the submodule ``root`` is called with, by name, when the model runs on each of ``inputs``.

    A model without weights is run on zeros in their place: only the shapes of what is returned count then.

    Raises:
        CaptureError: if the model does not run on such inputs, or never calls ``root``.
    """
    module = source.module
    if not root:
        return [dict(batch) for batch in inputs]
    names = {id(tensor): name for name, tensor in named_tensors(module)}
    target = module.get_submodule(root)
    settings = accepted_settings(module)

    def value(tensor: Tensor) -> Tensor:
        new = weights[names[id(tensor)]] if source.has_values else stand_in(tensor, weights.dtype)
        return nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new.clone()

    def reached(called: nn.Module, args: Any, kwargs: Any) -> None:
        raise Reached(keyword_arguments(called, args, kwargs))

    found = []
    there = lent_weights(module, weights, names) if weights.streamed else swapped_tensors(module, value)
    with evaluation_mode(module), there, torch.no_grad():
        handle = target.register_forward_pre_hook(reached, with_kwargs=True)
        try:
            for batch in inputs:
                try:
                    module(**settings, **tree_map_only(Tensor, torch.clone, dict(batch)))
                except Reached as call:
                    found.append(
                        {n: v for n, v in call.arguments.items() if n not in accepted_settings(target)}
                    )
                except Exception as error:
                    raise CaptureError(
                        f"{type(module).__name__} does not run on such inputs: {reason(error)}; give inputs "
                        "that its forward takes"
                    ) from error
                else:
                    raise CaptureError(
                        f"{type(module).__name__} does not call {root!r} on such inputs: choose another "
                        "root, or give inputs that reach it"
                    )
        finally:
            handle.remove()
    return found
