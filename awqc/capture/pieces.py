"""A graph of pieces: modules that can be traced, joined by the forwards that cannot.

The model is run once. A module that cannot be traced is run as it is, but every module that it calls is a
piece of its own: traced with the arguments that it was called with, or taken apart in the same way. What
such a forward computes between two calls is a region of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from awqc.capture.builder import Builder
from awqc.capture.exported import graph_of_program
from awqc.capture.inputs import flat_inputs
from awqc.capture.numerics import compare
from awqc.capture.patches import exporter_patches, prepared_arguments
from awqc.capture.regions import ReadTensors, Region, Structure, stand_in
from awqc.capture.subject import Subject
from awqc.capture.traced_regions import TracedRegions
from awqc.capture.tracing import Fakes, evaluation_mode, export, reason
from awqc.errors import CaptureError
from awqc.graph import Graph
from awqc.storage.source import named_tensors, swapped_tensors

_MISSING = object()
_Traced = tuple[Graph, list[Any]]


def in_pieces(subject: Subject) -> Graph:
    """The root taken apart.

    Raises:
        CaptureError: if the model does not run on its inputs, or nothing in it can be traced.
    """
    pieces = _Pieces(subject)
    graph = pieces.build()
    if not pieces.traced:
        raise CaptureError("no module that it calls can be traced either")
    subject.notes.append(f"{pieces.traced} calls of modules traced, {pieces.apart} forwards run as they are")
    subject.notes += pieces.failures.values()
    return graph


@dataclass
class _Known:
    """Which node computed a tensor, and how often it had been written to then."""

    tensor: Tensor
    node: fx.Node
    version: int


@dataclass
class _Frame:
    """A forward that is run as it is: its arguments, and the calls that it has made so far."""

    module: nn.Module
    arguments: Structure
    operands: list[fx.Node]
    reads: ReadTensors
    answers: list[tuple[nn.Module, Structure]] = field(default_factory=list)
    answered: list[fx.Node] = field(default_factory=list)


class _Pieces:
    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.builder = subject.builder()
        self.traced = self.apart = 0
        #: why the modules of a class could not be traced, each said once
        self.failures: dict[type, str] = {}
        self._paths = subject.paths()
        self._forwards = {m: m.__dict__.get("forward", _MISSING) for m in self._paths}
        self._known: dict[int, _Known] = {}

    def build(self) -> Graph:
        """Run the root and put the pieces of it together."""
        root, weights, names = self.subject.module, self.builder.weights, dict(self.builder.names)

        def value(tensor: Tensor) -> Tensor:
            name = names[id(tensor)]
            there = self.subject.source.has_values
            new = weights[name] if there else stand_in(tensor, weights.dtype)
            new = nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new.clone()
            self.builder.names[id(new)] = name
            return new

        arguments = tree_map_only(Tensor, torch.clone, self.subject.arguments())
        for name, tensor in flat_inputs(arguments).items():
            self._know(tensor, self.builder.input(name, torch.empty_like(tensor, device="meta")))
        with evaluation_mode(root), swapped_tensors(root, value), torch.no_grad():
            try:
                result = self._take_apart(root, (), arguments)
            except CaptureError:
                raise
            except Exception as error:
                raise CaptureError(f"{type(root).__name__} does not run: {reason(error)}") from error
            tensors = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
            return self.builder.graph([self._known[id(t)].node for t in tensors])

    # -- a module that is traced ----------------------------------------------------------------------------

    def _piece(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Nodes for one call of ``module``; its result."""
        failure: CaptureError | None = None
        for attempt in (self._plain, self._with_regions, self._patched):
            try:
                graph, leaves = attempt(module, args, kwargs, failure)
                result = module(*args, **kwargs)
                self._place(graph, leaves, (args, kwargs), result)
            except CaptureError as error:
                failure = failure or error
                continue
            self.traced += 1
            return result
        self.failures.setdefault(type(module), f"{self._paths[module]}: {failure}")
        return self._take_apart(module, args, kwargs)

    def _place(self, graph: Graph, leaves: list[Any], arguments: Any, result: Any) -> None:
        """Put ``graph`` in for a call that has returned ``result``."""
        inputs = Structure.of(arguments)[1]
        found = tree_flatten(result)[0]
        if len(found) != len(leaves):
            raise CaptureError(f"its graph has {len(leaves)} results instead of {len(found)}")
        results = {i: leaf for i, leaf in enumerate(found) if isinstance(leaf, Tensor)}
        if self.subject.source.has_values:
            batch = {str(n.target): x for n, x in zip(graph.inputs, inputs, strict=True)}
            compare(graph, batch, list(results.values()), "the input of this module")
        env = self.builder.splice(graph, [self._known[id(x)].node for x in inputs])
        for index, tensor in results.items():
            self._know(tensor, env[leaves[index]])

    def _plain(self, module: nn.Module, args: Any, kwargs: Any, failure: Any) -> _Traced:
        return self._trace(module, args, kwargs, lambda: None, {})

    def _with_regions(self, module: nn.Module, args: Any, kwargs: Any, failure: Any) -> _Traced:
        paths = {child: self._paths[child] for child in module.modules()}
        regions = TracedRegions(paths, self.subject.dtype)
        found: _Traced = regions.trace(
            lambda: self._trace(module, args, kwargs, regions.install, {}), module, failure
        )
        return found

    def _patched(self, module: nn.Module, args: Any, kwargs: Any, failure: Any) -> _Traced:
        with exporter_patches():
            extra = prepared_arguments(module, kwargs)
            return self._trace(module, args, kwargs, lambda: None, extra)

    def _trace(
        self, module: nn.Module, args: Any, kwargs: Any, prepare: Callable[[], None], extra: dict[str, Any]
    ) -> _Traced:
        subject, path = self.subject, self._paths[module]
        fakes = Fakes(subject.dtype, subject.device)
        program = export(module, args, {**kwargs, **extra}, fakes, prepare)
        builder = Builder(self.builder.weights, self.builder.names)
        return graph_of_program(program, module, builder, path, flat_inputs(extra))

    # -- a module that is run as it is ---------------------------------------------------------------

    def _take_apart(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run ``module``, and make nodes of the calls in it and of what it computes in between."""
        self.apart += 1
        arguments, tensors = Structure.of((args, kwargs))
        reads = ReadTensors({id(t): name for name, t in named_tensors(module)})
        frame = _Frame(module, arguments, [self._known[id(t)].node for t in tensors], reads)
        with self._stand_ins(frame, module), reads:
            result = module(*args, **kwargs)
        self._resolve(frame, result, upto=False)
        return result

    @contextmanager
    def _stand_ins(self, frame: _Frame, module: nn.Module) -> Iterator[None]:
        """Within the block, ``frame`` hears of every call of a module inside ``module``."""
        inside = [child for child in module.modules() if child is not module]
        before = {child: child.__dict__.get("forward", _MISSING) for child in inside}
        for child in inside:
            child.__dict__["forward"] = self._stand_in(frame, child)
        try:
            yield
        finally:
            _put_back(before)

    def _stand_in(self, frame: _Frame, module: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            frame.reads.__exit__(None, None, None)
            before = {child: child.__dict__["forward"] for child in module.modules()}
            try:
                self._resolve(frame, (args, kwargs), upto=True)
                _put_back({child: self._forwards[child] for child in before})
                result = self._piece(module, args, kwargs)
            finally:
                _put_back(before)
                frame.reads.__enter__()
            structure, tensors = Structure.of(result)
            frame.answers.append((module, structure))
            frame.answered += [self._known[id(t)].node for t in tensors]
            return result

        return forward

    def _resolve(self, frame: _Frame, value: Any, upto: bool) -> None:
        """Make a node of every tensor of ``value`` that ``frame`` has computed by itself."""
        tensors = Structure.of(value)[1]
        unknown = [i for i, tensor in enumerate(tensors) if not self._is_known(tensor)]
        if not unknown:
            return
        region = Region(
            frame.module,
            self._paths[frame.module],
            frame.arguments,
            tuple(frame.reads.found),
            tuple(frame.answers),
            upto,
            tuple(unknown),
        )
        results = [tensors[i] for i in unknown]
        nodes = self.builder.region(region, [*frame.operands, *frame.answered], results)
        for tensor, node in zip(results, nodes, strict=True):
            self._know(tensor, node)

    # -- which node a tensor is ----------------------------------------------------------------------

    def _know(self, tensor: Tensor, node: fx.Node) -> None:
        self._known[id(tensor)] = _Known(tensor, node, tensor._version)

    def _is_known(self, tensor: Tensor) -> bool:
        known = self._known.get(id(tensor))
        if known is None and id(tensor) in self.builder.names:
            self._know(tensor, self.builder.tensor(tensor))
            return True
        return known is not None and known.version == tensor._version


def _put_back(forwards: dict[nn.Module, Any]) -> None:
    for module, forward in forwards.items():
        if forward is _MISSING:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = forward
