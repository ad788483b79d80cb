"""The choice of a backend for one linear, with the reasons of those that refused it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from awqc.backend import Backend, LinearShape, PackedLinear, backends, get_backend
from awqc.errors import BackendError
from awqc.quantized import QuantizedWeight


@dataclass(frozen=True)
class Lowered:
    """One linear, packed for the backend that took it.

    Args:
        backend: the backend that runs it.
        packed: its op and tensors.
        shape: what was lowered.
        refused: backends that were preferred to ``backend``, each with its reason.
    """

    backend: Backend
    packed: PackedLinear
    shape: LinearShape
    refused: Mapping[str, str]


def lower_linear(
    weight: QuantizedWeight,
    bias: Tensor | None,
    dtype: torch.dtype,
    device: torch.device | str,
    backend: str | Backend = "auto",
) -> Lowered:
    """Pack ``weight`` ``(N, K)`` and ``bias`` ``(N,)``, or the weights ``(E, N, K)`` of experts, for
    activations of ``dtype`` on ``device``.

    Args:
        backend: a name, a backend object (which carries its options), or ``"auto"`` for the one of highest
            priority that can run this linear. A backend that cannot is replaced by ``reference`` and its
            reason is kept in the result.

    Raises:
        BackendError: for an unknown name, or if ``reference`` refuses too.
    """
    device = torch.device(device)
    shape = LinearShape(
        weight.out_features, weight.in_features, weight.scheme, dtype, device, weight.expert_count
    )
    refused: dict[str, str] = {}
    for candidate in _candidates(backend):
        reason = _reason(candidate, shape)
        if reason is None:
            # Without values a weight is packed where it is: for outlines.
            place = torch.device("meta") if weight.codes.is_meta else device
            packed = candidate.pack(weight.to(place), None if bias is None else bias.to(place), dtype)
            return Lowered(candidate, packed, shape, refused)
        refused[candidate.name] = reason
    refusals = "; ".join(f"{name} {reason}" for name, reason in refused.items())
    shapes = "x".join(map(str, weight.codes.shape))
    raise BackendError(
        f"no backend runs a {shapes} linear of {weight.scheme} weights "
        f"with {dtype} activations on {device}: {refusals}"
    )


def reasons(shape: LinearShape) -> dict[str, str | None]:
    """Every backend, best first, with the reason why it cannot run ``shape``; None if it can."""
    return {candidate.name: _reason(candidate, shape) for candidate in _candidates("auto")}


def _reason(candidate: Backend, shape: LinearShape) -> str | None:
    if shape.expert_count is not None and not candidate.runs_experts:
        return "has no op for the experts of a mixture"
    return candidate.refuses(shape)


def _candidates(backend: str | Backend) -> list[Backend]:
    """Backends in order of preference."""
    if backend == "auto":
        ranked = sorted(backends().values(), key=lambda cls: (-cls.priority, cls.name))
        return [cls() for cls in ranked]
    chosen = get_backend(backend) if isinstance(backend, str) else backend
    reference = get_backend("reference")
    return [chosen] if chosen.name == reference.name else [chosen, reference]
