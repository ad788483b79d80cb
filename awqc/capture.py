"""nn.Module -> Graph through torch.export on fake weights (DESIGN: primary route).

No weight is read: parameters are replaced by fake tensors while the forward is traced, and the graph
refers to them by name. What the traced function computes is then compared with the module run eagerly.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
import torch._functorch.partitioners  # the first export would load these in the middle of a compile
import torch.export
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_flatten

from awqc.errors import CaptureError
from awqc.functional import functionalize
from awqc.graph import Graph
from awqc.source import ModelSource, aliases, named_tensors, swapped_tensors
from awqc.views import BUFFER, CONSTANT, PARAMETER
from awqc.weights import Weights

#: Forward arguments that would make the graph stateful or its output a tuple.
_SETTINGS = {"use_cache": False}


@dataclass
class CaptureReport:
    """How a graph was obtained.

    Args:
        rung: which way of capturing succeeded.
        checks: (input, largest relative error of any output against eager) for each comparison made.
        notes: rungs that failed before, with the reason.
    """

    rung: str
    checks: list[tuple[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def capture(
    source: ModelSource,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> Graph:
    """Trace ``source.module(**inputs)`` into a :class:`Graph`.

    Args:
        source: the model; its weights are not read.
        inputs: example inputs by argument name; their shapes become the graph's.
        dtype: floating-point dtype the graph computes in; None keeps that of the parameters.
        device: device the graph is traced for.

    Raises:
        CaptureError: if the forward cannot be traced; the cause is chained.
    """
    module = source.module
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def as_fake(tensor: Tensor) -> Tensor:
        # Buffers too, since the graph's weights are all handed out in one dtype: casting a model to half
        # precision casts its tables along.
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        with fake:
            new = torch.empty(tensor.shape, dtype=kind, device=device)
            return nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new

    tied = aliases(module)
    kwargs = {**_accepted_settings(module), **inputs}
    with fake:
        fake_kwargs = {
            k: torch.empty(v.shape, dtype=v.dtype, device=device) if isinstance(v, Tensor) else v
            for k, v in kwargs.items()
        }
    with evaluation_mode(module), swapped_tensors(module, as_fake), torch.no_grad():
        try:
            with quick_tracing():
                program = torch.export.export(module, (), fake_kwargs, strict=False)
        except Exception as error:
            cause = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
            raise CaptureError(
                f"{type(module).__name__} could not be traced by torch.export: {cause}; "
                "check that it runs on such inputs, and that its forward does not branch on values of tensors"
            ) from error
    weights = Weights(source.names(), source.read, dtype, device, tied)
    graph = _named_graph(program, weights, tied)
    functionalize(graph)
    graph.facts[CaptureReport] = CaptureReport("torch.export")
    return graph


def _named_graph(program: torch.export.ExportedProgram, weights: Weights, tied: dict[str, str]) -> Graph:
    """The exported graph with parameters as ``get_attr`` nodes under their names in the model."""
    signature = program.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = dict(signature.inputs_to_lifted_tensor_constants)
    nodes, env = fx.Graph(), dict[fx.Node, fx.Node]()
    by_name: dict[str, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = targets.get(node.name) or constants.get(node.name)
            if name is None:
                if isinstance(node.meta.get("val"), Tensor):
                    env[node] = nodes.placeholder(node.name)
                    env[node].meta = {"val": node.meta["val"]}
                continue
            name = tied.get(name, name)
            if node.name in constants and name not in weights.names:
                _add_constant(weights, name, program.constants[name])
            if not node.users:
                continue
            if name not in by_name:
                by_name[name] = nodes.create_node("get_attr", name, name=name.replace(".", "_"))
                role = PARAMETER if node.name in signature.inputs_to_parameters else BUFFER
                by_name[name].meta = {
                    "val": node.meta["val"],
                    "role": CONSTANT if node.name in constants else role,
                }
            env[node] = by_name[name]
        elif node.op == "output":
            outputs = [n for n in tree_flatten(node.args)[0] if isinstance(n, fx.Node)]
            nodes.output(tuple(env[n] for n in outputs))
        elif node.op == "get_attr":
            region = next(iter(node.users))
            raise CaptureError(
                f"the forward holds a region that awqc does not look into: {region.target} ({region.name}); "
                "remove torch.autocast and the like from the forward"
            )
        else:
            env[node] = nodes.node_copy(node, lambda n: env[n])
            env[node].meta = {"val": node.meta.get("val")}
    graph = Graph(nodes, weights, [str(n) for n in signature.user_outputs])
    graph.fx.eliminate_dead_code()
    return graph


def _add_constant(weights: Weights, name: str, value: Any) -> None:
    if isinstance(value, FakeTensor) or not isinstance(value, Tensor):
        raise CaptureError(
            f"the model holds {name!r}, a constant that depends on traced values: register it as a buffer"
        )
    weights.names.append(name)
    weights[name] = value


def _accepted_settings(module: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters
    return {k: v for k, v in _SETTINGS.items() if k in parameters}


@contextmanager
def quick_tracing() -> Iterator[None]:
    """No garbage collection and no stack traces of nodes within the block. Tracing makes many small
    objects, all of them alive: looking through them again and again takes up to a third of its time, and
    the traces, which nothing reads, a tenth."""
    enabled, config = gc.isenabled(), vars(fx.config)
    traces = config.get("do_not_emit_stack_traces")
    gc.disable()
    if traces is not None:  # older releases have no such option
        config["do_not_emit_stack_traces"] = True
    try:
        yield
    finally:
        if traces is not None:
            config["do_not_emit_stack_traces"] = traces
        if enabled:
            gc.enable()


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Dropout and the like off within the block; after it, every submodule is as it was: its mode, and what
    a forward has assigned to it or registered on it."""
    stores = ("_parameters", "_buffers", "_modules")
    before = {child: dict(child.__dict__) for child in module.modules()}
    entries = {child: {name: dict(child.__dict__[name]) for name in stores} for child in before}
    module.eval()
    try:
        yield
    finally:
        for child, attributes in before.items():
            child.__dict__.clear()
            child.__dict__.update(attributes)
            for name, items in entries[child].items():
                child.__dict__[name].clear()
                child.__dict__[name].update(items)


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


def eager_outputs(module: nn.Module, inputs: Mapping[str, Tensor], weights: Weights) -> list[Any]:
    """Run ``module`` eagerly on the values of ``weights``; its outputs, flattened like the graph's."""
    names = {id(t): n for n, t in named_tensors(module)}

    def real(tensor: Tensor) -> Tensor:
        value = weights[names[id(tensor)]]
        return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value.clone()

    with evaluation_mode(module), swapped_tensors(module, real), torch.no_grad():
        result = module(**_accepted_settings(module), **{name: x.clone() for name, x in inputs.items()})
    return [item for item in tree_flatten(result)[0] if isinstance(item, Tensor)]


def check_against_eager(
    graph: Graph, module: nn.Module, inputs: Mapping[str, Mapping[str, Tensor]]
) -> list[tuple[str, float]]:
    """Compare graph and module on every named input.

    Returns:
        (name, relative error) for each; also appended to the graph's :class:`CaptureReport`.

    Raises:
        CaptureError: if an output differs by more than rounding: ``64 * sqrt(nodes) * eps`` relative.
    """
    checks = []
    for name, batch in inputs.items():
        expected = eager_outputs(module, batch, graph.weights)
        found = graph.run(batch)
        if len(found) != len(expected):
            raise CaptureError(f"the graph has {len(found)} outputs, the module {len(expected)}, on {name}")
        error = max((relative_error(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
        dtype = graph.weights.dtype or expected[0].dtype
        bound = 64 * len(graph.nodes) ** 0.5 * torch.finfo(dtype).eps
        if not error <= bound:
            raise CaptureError(
                f"the captured graph differs from eager execution on {name}: relative error {error:.1e}, "
                f"rounding explains {bound:.1e}; the forward depends on values that tracing froze"
            )
        checks.append((name, error))
    if CaptureReport in graph.facts:
        graph.facts[CaptureReport].checks.extend(checks)
    return checks
