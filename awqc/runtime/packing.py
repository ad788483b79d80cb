"""Packed modules from what a checkpoint stores, and their sizes before any is made."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from awqc.backend import Backend
from awqc.checkpoints import Checkpoint
from awqc.runtime.compiled import structural_copy
from awqc.runtime.experts import QuantExperts, replace_expert_weights
from awqc.runtime.input_scales import SUFFIX
from awqc.runtime.linear import QuantLinear, replace_linears
from awqc.runtime.lowering import Lowered, lower_linear
from awqc.storage.contents import Contents
from awqc.storage.expert_storage import join


@dataclass
class Packing:
    """Reads quantized weights and packs them for a backend.

    Args:
        checkpoint: what stores them.
        contents: under which names.
        dtype: of activations.
        backend: as :func:`awqc.runtime.lowering.lower_linear` takes it.
    """

    checkpoint: Checkpoint
    contents: Contents
    dtype: torch.dtype
    backend: str | Backend
    _templates: dict[Hashable, Lowered] = field(default_factory=dict)

    def pack(self, name: str, device: torch.device) -> QuantLinear | QuantExperts:
        """The linear or the stack of experts ``name``, packed for ``device`` and there."""
        return self._module(name, self._lowered(name, device), device)

    def sized(self, module: nn.Module, device: torch.device) -> nn.Module:
        """A copy of ``module`` on ``meta`` with packed modules as large as those that run on ``device``.

        One weight of each kind is packed to find out how large it is.
        """
        copy = structural_copy(module).to("meta", self.dtype)
        linears: dict[str, QuantLinear] = {}
        stacks: dict[str, QuantExperts] = {}
        for name in (*self.contents.linears, *self.contents.stacks):
            made = self._module(name, self._template(name, device), torch.device("meta"))
            if isinstance(made, QuantLinear):
                linears[name] = made
            else:
                stacks[name] = made
        replace_linears(copy, linears)
        replace_expert_weights(copy, stacks)
        return copy

    def _module(self, name: str, lowered: Lowered, device: torch.device) -> QuantLinear | QuantExperts:
        if name in self.contents.stacks:
            return QuantExperts(lowered, self.contents.stacks[name][1])
        scale = self.contents.linears[name] + SUFFIX
        stored = scale in self.checkpoint.tensors
        return QuantLinear(lowered, self.checkpoint.dense(scale).to(device) if stored else None)

    def _lowered(self, name: str, device: torch.device) -> Lowered:
        if name in self.contents.stacks:
            weight, bias = join(self.contents.stacks[name][0], self.checkpoint.weight), None
        else:
            disk = self.contents.linears[name]
            weight, stored = self.checkpoint.weight(disk), f"{disk}.bias"
            bias = self.checkpoint.dense(stored) if stored in self.checkpoint.tensors else None
        return lower_linear(weight, bias, self.dtype, device, self.backend)

    def _template(self, name: str, device: torch.device) -> Lowered:
        """``name`` lowered, with tensors of its own on ``meta``; what is stored alike is packed alike."""
        kind = self._kind(name)
        if kind not in self._templates:
            self._templates[kind] = _on_meta(self._lowered(name, device))
        return _on_meta(self._templates[kind])

    def _kind(self, name: str) -> Hashable:
        stored = self.contents.stacks.get(name)
        disk = [self.contents.linears[name]] if stored is None else [one.name for one in stored[0]]
        assert self.checkpoint.linears is not None
        infos = [
            self.checkpoint.tensors.info(t) for one in disk for t in self.checkpoint.linears.tensors(one)
        ]
        return tuple((tuple(i.shape), i.dtype) for i in infos), f"{disk[0]}.bias" in self.checkpoint.tensors


def _on_meta(lowered: Lowered) -> Lowered:
    packed = lowered.packed
    tensors = {
        n: None if t is None else torch.empty_like(t, device="meta") for n, t in packed.tensors.items()
    }
    kept = {n: torch.empty_like(t, device="meta") for n, t in packed.kept.items()}
    return replace(lowered, packed=replace(packed, tensors=tensors, kept=kept))
