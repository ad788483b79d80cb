"""Modules that are run as they are: one node of the graph, with everything they read as operands.

A region hides what a module does, so no scale passes through it, and nothing it reads can be scaled. Its
linears are quantized all the same: :class:`LinearInputs` gives what each of them reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from awqc.capture.nests import open_dataclasses
from awqc.capture.tracing import evaluation_mode, reason, same_random
from awqc.errors import CaptureError
from awqc.storage.source import named_tensors, swapped_tensors

_SLOT = object()
#: Products of sorted rows with the weights of experts, where torch has them.
_GROUPED = {f for f in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)) if f}


@dataclass(frozen=True)
class Structure:
    """A nest of values with its tensors taken out.

    Args:
        spec: the nest.
        leaves: its leaves in order, a mark in the place of each tensor.
    """

    spec: TreeSpec
    leaves: tuple[Any, ...]

    @staticmethod
    def of(value: Any) -> tuple[Structure, list[Tensor]]:
        """The structure of ``value`` and its tensors in order."""
        open_dataclasses(value)
        leaves, spec = tree_flatten(value)
        slots = tuple(_SLOT if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return Structure(spec, slots), [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    @property
    def tensors(self) -> int:
        """How many tensors were taken out."""
        return sum(leaf is _SLOT for leaf in self.leaves)

    def fill(self, tensors: Iterable[Any]) -> Any:
        """The nest with ``tensors`` in place."""
        rest = iter(tensors)
        return tree_unflatten([next(rest) if leaf is _SLOT else leaf for leaf in self.leaves], self.spec)


class Reached(Exception):  # no error: how a replay ends early
    """The call that a replay was to reach, with its arguments."""

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments


@dataclass(frozen=True, eq=False, repr=False)
class Region:
    """One call of a module as a function of tensors.

    Called with the tensors of its arguments, the tensors that it reads (in the order of ``names``), the
    tensors of the answers, and any more, which it ignores: they only have to be computed before.

    Args:
        module: what is run; its own tensors are not used.
        path: its name in the model.
        arguments: of the call: ``(args, kwargs)``.
        names: parameters and buffers that it reads, by their first names in ``module``.
        answers: calls of modules inside it that are not run but answered: module and structure of its result.
        upto: return the arguments of the first call that is not answered instead of the result.
        picks: which tensors of that to return; None for all.
    """

    module: nn.Module
    path: str
    arguments: Structure
    names: tuple[str, ...]
    answers: tuple[tuple[nn.Module, Structure], ...] = ()
    upto: bool = False
    picks: tuple[int, ...] | None = None
    #: The module holds its linears itself: what replaces them there, it runs.
    runs_module: ClassVar[bool] = True

    def _key(self) -> tuple[Any, ...]:
        return (type(self), self.module, self.path, self.names, self.upto, self.picks, len(self.answers))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Region) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        return self

    @property
    def __name__(self) -> str:
        """How a refusal calls it."""
        return type(self.module).__name__

    def __repr__(self) -> str:
        return f"{type(self.module).__name__} ({self.path or 'the whole model'})"

    def __call__(self, *operands: Any) -> list[Tensor]:
        """Run the module.

        Raises:
            CaptureError: if it takes another way through its submodules than when it was captured.
        """
        inputs, rest = operands[: self.arguments.tensors], operands[self.arguments.tensors :]
        values, rest = dict(zip(self.names, rest, strict=False)), rest[len(self.names) :]
        # Clones: a forward may write into what it is given.
        args, kwargs = self.arguments.fill(x.clone() for x in inputs)
        answers = []
        for module, structure in self.answers:
            taken, rest = rest[: structure.tensors], rest[structure.tensors :]
            answers.append((module, structure.fill(x.clone() for x in taken)))
        tensors = {id(t): values.get(name) for name, t in named_tensors(self.module)}

        def swap(tensor: Tensor) -> Tensor:
            value = tensors[id(tensor)]
            # What is not an operand must not be read: without values it cannot be by mistake.
            value = torch.empty_like(tensor, device="meta") if value is None else value
            return (
                nn.Parameter(value, requires_grad=False)
                if isinstance(tensor, nn.Parameter)
                else value.clone()
            )

        precise = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in operands)
        with (
            evaluation_mode(self.module),
            swapped_tensors(self.module, swap),
            torch.no_grad(),
            same_random(),
            in_float64() if precise else nullcontext(),
        ):
            result = self._run(args, kwargs, answers)
        found = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        return found if self.picks is None else [found[i] for i in self.picks]

    def _run(self, args: Any, kwargs: Any, answers: list[tuple[nn.Module, Any]]) -> Any:
        if not answers and not self.upto:
            return self.module(*args, **kwargs)
        calls = iter(answers)

        def answer(module: nn.Module, call_args: Any, call_kwargs: Any) -> Any:
            expected, result = next(calls, (module, Reached))
            if result is Reached and self.upto:
                raise Reached((call_args, call_kwargs))
            if expected is not module or result is Reached:
                raise CaptureError(
                    f"{self.path or type(self.module).__name__} calls its submodules in another order than "
                    "when it was captured: its forward depends on values that the graph does not follow"
                )
            return result

        intercept(self.module, answer)
        try:
            result = self.module(*args, **kwargs)
        except Reached as reached:
            return reached.arguments
        return result


def intercept(module: nn.Module, answer: Callable[[nn.Module, Any, Any], Any]) -> None:
    """Let ``answer`` stand in for the forward of every submodule of ``module``.

    To be called within :func:`awqc.capture.tracing.evaluation_mode`, which undoes it.
    """

    def stand_in(child: nn.Module) -> Callable[..., Any]:
        return lambda *args, **kwargs: answer(child, args, kwargs)

    for child in module.modules():
        if child is not module:
            child.__dict__["forward"] = stand_in(child)


@dataclass(frozen=True, eq=False, repr=False)
class LinearInputs(Region):
    """The inputs of the linears in a region: ``(rows, K)`` for each, no rows if it is not reached.

    Args:
        weights: the weights of the linears, by their names in ``module``.
    """

    weights: tuple[str, ...] = ()

    def _run(self, args: Any, kwargs: Any, answers: list[tuple[nn.Module, Any]]) -> Any:
        tensors = dict(self.module.named_parameters(remove_duplicate=False))
        seen = _LinearCalls({id(tensors[name]): [] for name in self.weights})
        with seen:
            super()._run(args, kwargs, answers)
        return [
            torch.cat(rows) if rows else tensors[name].new_empty(0, tensors[name].shape[1])
            for name in self.weights
            for rows in [seen.rows[id(tensors[name])]]
        ]

    def _key(self) -> tuple[Any, ...]:
        return (*super()._key(), self.weights)


@dataclass
class _LinearCalls(TorchFunctionMode):
    """Collects what ``F.linear`` is called with, by the identity of its weight."""

    rows: dict[int, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight = [*args, *(kwargs[k] for k in ("input", "weight")[len(args) :])][:2]
            if id(weight) in self.rows:
                x = _outside_of_transforms(x.detach())
                self.rows[id(weight)].append(x.reshape(-1, x.shape[-1]).clone())
        return func(*args, **kwargs)


def _outside_of_transforms(x: Tensor) -> Tensor:
    """``x`` as it is outside of ``torch.vmap`` and the like, with batches of it in front."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        batch = functorch.maybe_get_bdim(x) if functorch.is_batchedtensor(x) else None
        x = functorch.get_unwrapped(x)
        x = x if batch is None else x.movedim(batch, 0)
    return x


class _Float64(TorchFunctionMode):
    """Every floating-point dtype that a forward names is float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        args, kwargs = tree_map(wide, (args, dict(kwargs or {})))
        if func in _GROUPED:  # torch's own knows no float64
            x, stack, *rest = args
            offsets = rest[0] if rest else kwargs["offs"]
            return torch.ops.awqc.grouped_linear(x, stack.mT, offsets)
        return func(*args, **kwargs)


@contextmanager
def in_float64() -> Iterator[None]:
    """Forwards compute in float64 within the block, whatever they cast to: how a region takes part in a
    proof."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(before)


class ReadTensors(TorchFunctionMode):
    """Which of some tensors any torch function is called with.

    Args:
        watched: id of a tensor -> its name.
    """

    def __init__(self, watched: Mapping[int, str]) -> None:
        super().__init__()
        self.found: dict[str, None] = {}
        self._watched = watched

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "__get__":  # shapes and dtypes are no values
            for leaf in tree_flatten((args, kwargs))[0]:
                if id(leaf) in self._watched:
                    self.found[self._watched[id(leaf)]] = None
        return func(*args, **kwargs)


def inner_linears(module: nn.Module) -> list[tuple[str, str | None]]:
    """Weight and bias, by their first names in ``module``, of every linear module in it."""
    first = {id(t): name for name, t in named_tensors(module)}
    found: dict[str, str | None] = {}
    for child in module.modules():
        if isinstance(child, nn.Linear):
            bias = None if child.bias is None else first[id(child.bias)]
            found.setdefault(first[id(child.weight)], bias)
    return list(found.items())


def stand_in(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor like ``tensor`` of zeros that takes no memory."""
    cast = dtype is not None and tensor.is_floating_point()
    return torch.zeros((), dtype=dtype if cast else tensor.dtype).expand(tensor.shape)


def result_without_weights(module: nn.Module, args: Any, kwargs: Any, dtype: torch.dtype | None) -> Any:
    """What ``module`` returns, in kind: run on zeros in the place of its weights and of its arguments.

    Raises:
        CaptureError: if it does not run on zeros.
    """
    structure, tensors = Structure.of((args, kwargs))
    zeros = structure.fill(torch.zeros(t.shape, dtype=t.dtype) for t in tensors)

    def swap(tensor: Tensor) -> Tensor:
        value = stand_in(tensor, dtype)
        return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value.clone()

    with evaluation_mode(module), swapped_tensors(module, swap), torch.no_grad():
        try:
            return module(*zeros[0], **zeros[1])
        except Exception as error:
            raise CaptureError(f"{type(module).__name__} does not run on zeros: {reason(error)}") from error
