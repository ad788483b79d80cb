"""What a compile returns: the model it came from, with quantized linears in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from awqc.checkpoints.record import SearchRecord
from awqc.errors import CheckpointError
from awqc.report import Report
from awqc.runtime.experts import QuantExperts, replace_expert_weights
from awqc.runtime.linear import QuantLinear, replace_linears
from awqc.runtime.lowered import LoweredExperts, LoweredLinears
from awqc.runtime.lowered_graph import LoweredGraph
from awqc.storage.saving import save
from awqc.storage.source import ModelSource, named_tensors


@dataclass
class Compilation:
    """Everything about a compiled model that its modules do not hold.

    Args:
        source: where the model came from; names on disk, tokenizer files, config.
        report: what was decided and why.
        record: gives fingerprint and scales of the search, for the artifact; reads all source weights.
        lowered: gives the lowered graph; called once, when first asked for.
        sample: an input of the captured shape, for the check after saving.
    """

    source: ModelSource
    report: Report
    record: Callable[[], SearchRecord] | None
    lowered: Callable[[], LoweredGraph]
    sample: Mapping[str, Tensor] = field(default_factory=dict)


class CompiledModel(nn.Module):
    """A model with quantized linears that behaves like the one it came from.

    Everything the model has is there under its own name: ``generate``, ``config``, ``model.layers``,
    ``state_dict``. ``isinstance(compiled, type(model))`` holds, because the class of a compiled model is
    made from both.

    Attributes:
        report: every decision of the compile.
        graph: the lowered ``torch.fx.GraphModule``, with ``text()``, ``to_networkx()`` and ``to_dot()``; it
            shares the model's tensors.
    """

    _awqc: Compilation

    @property
    def report(self) -> Report:
        """What the compile decided and why."""
        return self._awqc.report

    @property
    def graph(self) -> LoweredGraph:
        """The lowered graph, with the same tensors as the modules."""
        if "_awqc_graph" not in self.__dict__:
            self.__dict__["_awqc_graph"] = self._awqc.lowered()
        graph: LoweredGraph = self.__dict__["_awqc_graph"]
        return graph

    def quantized_linears(self) -> dict[str, QuantLinear]:
        """Every quantized linear by module name."""
        return {name: m for name, m in self.named_modules() if isinstance(m, QuantLinear)}

    def quantized_experts(self) -> dict[str, QuantExperts]:
        """Every quantized stack of experts' weights by the name of its parameter."""
        return {name: m for name, m in self.named_modules() if isinstance(m, QuantExperts)}

    def save(
        self, path: str | Path, format: str = "awq", *, overwrite: bool = False, check: bool = True
    ) -> Path:
        """Write a checkpoint that other engines load.

        Args:
            path: directory to write; it appears whole or not at all.
            format: ``"awq"`` (AutoAWQ gemm: transformers, vLLM, SGLang), ``"compressed-tensors"``
                (transformers, vLLM) or ``"awqc"`` (any scheme; re-lowers without a new search).
            overwrite: replace a checkpoint that is there.
            check: read the result back and compare its first stage with this model.

        Returns:
            The absolute path.

        Raises:
            CheckpointError: if the format cannot carry a linear, the path cannot be written, the disk is
                full, or what was written does not read back as this model.
        """
        if hasattr(self, "hf_device_map"):
            raise CheckpointError(
                "a model that is divided among devices is not saved: load it without device_map first"
            )
        return save(self, self._awqc, path, format, overwrite=overwrite, check=check)


def structural_copy(module: nn.Module) -> nn.Module:
    """A copy of ``module`` whose modules are new and whose tensors are shared with it."""
    shared: dict[int, Any] = {id(tensor): tensor for _, tensor in named_tensors(module)}
    return copy.deepcopy(module, shared)


def assemble(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    linears: LoweredLinears,
    stacks: LoweredExperts,
    compilation: Compilation,
) -> CompiledModel:
    """Make ``module`` the compiled model.

    Args:
        module: its own modules are changed; see :func:`structural_copy`.
        tensors: new values of parameters and buffers by name; all others stay.
        linears: quantized linears by module name.
        stacks: quantized weights of experts by parameter name.
        compilation: what the result carries along.
    """
    replace_linears(module, linears)
    replace_expert_weights(module, stacks)
    _replace_tensors(module, tensors)
    cls = type(module)
    module.__class__ = type(cls.__name__, (CompiledModel, cls), {"__module__": cls.__module__})
    module.__dict__["_awqc"] = compilation
    assert isinstance(module, CompiledModel)
    return module.eval()


def _replace_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put ``tensors`` in place under every name that a tied tensor has."""
    new: dict[int, Tensor] = {}
    for name, old in named_tensors(module):
        if name in tensors:
            value = tensors[name]
            new[id(old)] = (
                nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value
            )
    for child in module.modules():
        for store in (child._parameters, child._buffers):
            for name, tensor in list(store.items()):
                if tensor is not None and id(tensor) in new:
                    store[name] = new[id(tensor)]  # type: ignore[assignment]
