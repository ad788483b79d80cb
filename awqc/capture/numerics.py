"""Graph against eager execution: what decides whether a capture succeeded."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from awqc.capture.inputs import flat_inputs
from awqc.capture.lent import lent_weights
from awqc.capture.report import CaptureReport
from awqc.capture.tracing import accepted_settings, evaluation_mode, reason, same_random
from awqc.errors import CaptureError
from awqc.graph import Graph
from awqc.storage.source import named_tensors, swapped_tensors
from awqc.weights import Weights


def relative_error(found: Any, expected: Any) -> float:
    """Norm of the difference over the norm of ``expected``, in float64; 0 for equal non-tensors.

    Elements that are the same NaN or Inf in both do not count: that is no difference, and what they mean
    is for others to say.
    """
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return 0.0 if found is expected or found == expected else float("inf")
    a, b = found.detach().double(), expected.detach().double()
    if a.shape != b.shape:
        return float("inf")
    if not bool(torch.isfinite(b.sum())):
        same = ~b.isfinite() & ((a == b) | (a.isnan() & b.isnan()))
        a, b = a.masked_fill(same, 0.0), b.masked_fill(same, 0.0)
    error = (a - b).norm() / b.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return float("inf") if bool(error.isnan()) else float(error)


def eager_outputs(
    module: nn.Module,
    inputs: Mapping[str, Any],
    weights: Weights,
    names: Mapping[int, str] | None = None,
    seeded: bool = False,
) -> list[Any]:
    """Run ``module`` eagerly on the values of ``weights``; its outputs, flattened like the graph's.

    Args:
        names: id of each tensor of ``module`` -> its name among ``weights``; needed for a submodule.
        seeded: draw what a region draws (:func:`awqc.capture.tracing.same_random`).

    Raises:
        CaptureError: if the module does not run on such inputs.
    """
    names = names or {id(t): n for n, t in named_tensors(module)}

    def real(tensor: Tensor) -> Tensor:
        value = weights[names[id(tensor)]]
        return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value.clone()

    streamed = weights.streamed
    there = lent_weights(module, weights, names) if streamed else swapped_tensors(module, real)
    arguments = {**accepted_settings(module), **tree_map_only(Tensor, torch.clone, dict(inputs))}
    random = same_random() if seeded else nullcontext()
    with evaluation_mode(module), there, torch.no_grad(), random:
        try:
            result = module(**arguments)
        except Exception as error:
            raise CaptureError(
                f"{type(module).__name__} does not run on such inputs: {reason(error)}; give inputs that its "
                "forward takes"
            ) from error
    return [item for item in tree_flatten(result)[0] if isinstance(item, Tensor)]


def check_against_eager(
    graph: Graph,
    module: nn.Module,
    inputs: Mapping[str, Mapping[str, Any]],
    names: Mapping[int, str] | None = None,
    seeded: bool = False,
) -> list[tuple[str, float]]:
    """Compare graph and module on every named input; for the rest see :func:`eager_outputs`.

    Returns:
        (name, relative error) for each; also appended to the graph's :class:`CaptureReport`.

    Raises:
        CaptureError: if an output differs by more than rounding: ``64 * sqrt(nodes) * eps`` relative.
    """
    checks = []
    weights = graph.weights.for_checks()
    for name, batch in inputs.items():
        expected = eager_outputs(module, batch, weights, names, seeded)
        checks.append((name, compare(graph, flat_inputs(batch), expected, name, weights)))
    if CaptureReport in graph.facts:
        graph.facts[CaptureReport].checks.extend(checks)
    return checks


def compare(
    graph: Graph,
    batch: Mapping[str, Tensor],
    expected: list[Any],
    name: str,
    weights: Weights | None = None,
) -> float:
    """The largest relative error of any output of ``graph`` on ``batch`` against ``expected``.

    Raises:
        CaptureError: if it exceeds what rounding explains; ``name`` says which input.
    """
    found = run(graph, batch, name, weights)
    if len(found) != len(expected):
        raise CaptureError(f"the graph has {len(found)} outputs, the module {len(expected)}, on {name}")
    error = max((relative_error(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
    floating = [t.dtype for t in expected if t.is_floating_point()]
    dtype = graph.weights.dtype or next(iter(floating), torch.float32)
    bound = 64 * len(graph.nodes) ** 0.5 * torch.finfo(dtype).eps
    if not error <= bound:
        raise CaptureError(
            f"the captured graph differs from eager execution on {name}: relative error {error:.1e}, "
            f"rounding explains {bound:.1e}; the forward depends on values that tracing froze"
        )
    return error


def run(graph: Graph, batch: Mapping[str, Tensor], name: str, weights: Weights | None = None) -> list[Any]:
    """``graph.run``; whatever an op of it raises becomes a :class:`CaptureError`."""
    try:
        return graph.run(batch, weights)
    except Exception as error:
        raise CaptureError(f"the captured graph does not run on {name}: {reason(error)}") from error
