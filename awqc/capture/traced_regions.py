"""Regions inside of a trace: modules that ``torch.export`` cannot follow, as one op each.

Which modules these are is found by trying: where a trace stops because it would have to know values, the
innermost module on the stack is made a region, with all others of its class, and the trace starts again.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._pytree import tree_flatten

from awqc.capture.regions import Region, Structure, result_without_weights
from awqc.errors import CaptureError
from awqc.storage.source import named_tensors
from awqc.views import operand

_LIBRARY = torch.library.Library("awqc", "FRAGMENT")
_LIBRARY.define("region(Tensor[] tensors, int key) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))

#: What a trace raises where it would have to know values.
NEEDS_VALUES = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)


@dataclass
class _Call:
    """A region that was met: what it is, and what it returns in kind."""

    region: Region
    results: list[Tensor]


#: The calls of the trace that is going on, by key.
_CALLS: dict[int, _Call] = {}


@torch.library.register_fake("awqc::region", lib=_LIBRARY)
def _region(tensors: list[Tensor], key: int) -> list[Tensor]:
    device = tensors[0].device
    return [torch.empty(r.shape, dtype=r.dtype, device=device) for r in _CALLS[key].results]


def call_of(node: fx.Node) -> Region | None:
    """The region that ``node`` of an exported program stands for, if it does."""
    if node.target is not torch.ops.awqc.region.default:
        return None
    return _CALLS[operand(node, 1)].region


def index_of(node: fx.Node) -> int:
    """Which of a region's results ``node`` takes."""
    index: int = operand(node, 1)
    return index


class Unfollowed(CaptureError):
    """A trace went through, and holds what no graph can.

    Args:
        reason: what, and where.
        stack: names of the modules, outermost first, in whose forwards all of it happens.
    """

    def __init__(self, reason: str, stack: Sequence[str]) -> None:
        super().__init__(reason)
        self.stack = tuple(stack)


class _Unknown(Exception):  # no error: asks for a run outside of the trace
    """A region is called in a way that it was not called in before."""

    def __init__(self, module: nn.Module, arguments: Any) -> None:
        self.module, self.arguments = module, arguments


@dataclass
class TracedRegions:
    """Modules that a trace runs as regions.

    Args:
        paths: names of all modules of the model that is traced.
        dtype: floating-point dtype that the trace computes in; None keeps each tensor's own.
        kinds: the classes that are run as regions.
        most: how much of the parameters regions may hold, as a share.
    """

    paths: dict[nn.Module, str]
    dtype: torch.dtype | None
    kinds: set[type[nn.Module]] = field(default_factory=set)
    most: float = 1.0
    _counting: set[type[nn.Module]] = field(default_factory=set)
    _results: dict[Any, Structure] = field(default_factory=dict)
    _tensors: dict[Any, list[Tensor]] = field(default_factory=dict)

    def install(self) -> None:
        """Put regions in the place of the forwards; to be called within ``evaluation_mode``."""
        _CALLS.clear()
        for module in self.paths:
            if type(module) in self.kinds:
                module.__dict__["forward"] = self._stand_in(module)

    def trace(self, attempt: Callable[[], Any], root: nn.Module, failure: CaptureError) -> Any:
        """Call ``attempt``, which traces with :meth:`install`, until no more regions are needed.

        Args:
            failure: of the trace without regions.

        Raises:
            CaptureError: if it fails for another reason than want of values, or at ``root`` itself.
        """
        self._add_culprit(failure, root)
        while True:
            try:
                return attempt()
            except CaptureError as error:
                if len(self._results) > 4 * len(self.paths):
                    raise CaptureError("its regions are called in another way each time") from error
                if isinstance(error.__cause__, _Unknown):
                    self._learn(error.__cause__.module, error.__cause__.arguments)
                else:
                    self._add_culprit(error, root)

    def _add_culprit(self, failure: CaptureError, root: nn.Module) -> None:
        cause = failure.__cause__
        if isinstance(failure, Unfollowed):
            running = [root.get_submodule(name) for name in failure.stack]
        elif isinstance(cause, NEEDS_VALUES):
            running = running_modules(cause, self.paths)
        elif self.kinds:
            raise failure
        else:
            raise CaptureError("no module stops the trace for want of values")
        # A module of a kind that is a region already stops it in a method other than its forward.
        tried = self.kinds | self._counting
        culprits = [m for m in running if m is not root and type(m) not in tried]
        if not culprits:
            raise CaptureError("it is the forward of the whole that stops the trace for want of values")
        self.kinds.add(type(culprits[-1]))
        share = self.share()
        if share > self.most:
            names = ", ".join(sorted(kind.__name__ for kind in self.kinds))
            raise CaptureError(f"{names} would be run as they are, with {share:.0%} of the parameters")

    def share(self) -> float:
        """How much of the parameters regions hold."""
        inside = {p for m in self.paths if type(m) in self.kinds for p in m.parameters()}
        every = {p for m in self.paths for p in m.parameters(recurse=False)}
        return sum(p.numel() for p in inside) / max(sum(p.numel() for p in every), 1)

    def _learn(self, module: nn.Module, arguments: Any) -> None:
        args, kwargs = arguments
        result = result_without_weights(module, args, kwargs, self.dtype)
        structure, tensors = Structure.of(result)
        if any(isinstance(leaf, (int, float)) for leaf in structure.leaves):
            # Numbers that come from values would be those of this one run: a module around it is the region.
            self.kinds.remove(type(module))
            self._counting.add(type(module))
            return
        key = _signature(module, args, kwargs)
        self._results[key], self._tensors[key] = structure, [t.to("meta") for t in tensors]

    def _stand_in(self, module: nn.Module) -> Callable[..., Any]:
        path = self.paths[module]
        names = tuple(name for name, _ in named_tensors(module))

        def forward(*args: Any, **kwargs: Any) -> Any:
            _check_arguments(module, path, (args, kwargs))
            key = _signature(module, args, kwargs)
            if key not in self._results:
                raise _Unknown(module, (args, kwargs))
            arguments, tensors = Structure.of((args, kwargs))
            number = len(_CALLS)
            _CALLS[number] = _Call(Region(module, path, arguments, names), self._tensors[key])
            return self._results[key].fill(torch.ops.awqc.region(tensors, number))

        return forward


def running_modules(error: BaseException, among: Container[nn.Module]) -> list[nn.Module]:
    """The modules, those of ``among``, whose forwards were running where ``error`` was raised, outermost
    first."""
    found, traceback = [], error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_name == "forward" and frame.f_code.co_varnames:
            module = frame.f_locals.get(frame.f_code.co_varnames[0])
            if isinstance(module, nn.Module) and module in among:
                found.append(module)
        traceback = traceback.tb_next
    return found


def _check_arguments(module: nn.Module, path: str, arguments: Any) -> None:
    for leaf in tree_flatten(arguments)[0]:
        sizes: Sequence[Any] = leaf.shape if isinstance(leaf, Tensor) else (leaf,)
        if any(isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) for size in sizes):
            raise CaptureError(
                f"{path} ({type(module).__name__}) cannot be run as it is: it is called with a number or a "
                "shape that depends on values of tensors"
            )


def _signature(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """What the kind of a result depends on."""
    structure, tensors = Structure.of((args, kwargs))
    weights = tuple((name, tuple(t.shape)) for name, t in named_tensors(module))
    return (
        type(module),
        weights,
        str(structure.spec),
        repr(structure.leaves),
        tuple((tuple(t.shape), t.dtype) for t in tensors),
    )
