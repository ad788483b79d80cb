"""Scale rules for ATen ops, one family a file: what dividing an operand does to the result.

A rule is a function of :class:`awqc.scaleflow.op.Op` that returns the abstract value of the node, registered
with the ops it covers and samples that prove it:

    @rule(aten.relu.default, samples=[Sample((example(3, 4),), scale={0: ids})])
    def relu(op: Op) -> Value:
        return op.value(op.arg(0))

Every sample is executed by the test suite: operands are divided as the flow says, the op is run, and the
result is compared with the rule's claim.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from awqc.scaleflow.op import Rule

_RULES: dict[Any, Rule] = {}
_SAMPLES: dict[Any, list[Sample]] = {}
_KNOW_ROWS: set[Rule] = set()


#: Samples are drawn apart from the user's random numbers, which importing awqc must not advance.
_RANDOM = torch.Generator().manual_seed(0)


def example(*size: int) -> Tensor:
    """A normally distributed float64 tensor for samples."""
    return torch.randn(size, dtype=torch.float64, generator=_RANDOM)


@dataclass(frozen=True)
class Sample:
    """A concrete call that a rule must be right about.

    Args:
        args: positional arguments; tensors become operands of the traced call.
        kwargs: keyword arguments.
        scale: position of the tensor among the tensors in ``args`` -> ids of its shape (broadcastable).
        parameters: positions of tensors that are parameters, and so may join the flow.
        constants: positions of tensors that are written in the forward, so that their values are known.
        alive: how many channels must survive; None when all must.
    """

    args: tuple[Any, ...]
    scale: dict[int, Tensor]
    kwargs: dict[str, Any] = field(default_factory=dict)
    parameters: tuple[int, ...] = ()
    constants: tuple[int, ...] = ()
    alive: int | None = None


def rule(*ops: Any, samples: Sequence[Sample], rows: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for ``ops``; ``samples`` are run by the tests against every op of the rule.

    Args:
        rows: the rule itself says which expert serves each row of its result, see
            :mod:`awqc.scaleflow.routing`;
            for any other it is found by asking the rule where row numbers go.

    Raises:
        ValueError: if there is no sample, or an op has a rule already.
    """
    if not samples:
        raise ValueError("a rule needs at least one sample that proves it")

    def add(function: Rule) -> Rule:
        for op in ops:
            if op in _RULES:
                raise ValueError(f"{op} has a rule already: {_RULES[op].__module__}.{_RULES[op].__name__}")
            _RULES[op] = function
            _SAMPLES[op] = list(samples)
        if rows:
            _KNOW_ROWS.add(function)
        return function

    return add


def rule_for(node: fx.Node) -> Rule | None:
    """The rule for a node's op, or None."""
    return _RULES.get(node.target)


def knows_rows(function: Rule) -> bool:
    """Whether a rule handles routed operands by itself."""
    return function in _KNOW_ROWS


def samples() -> dict[Any, list[Sample]]:
    """All samples by op."""
    return dict(_SAMPLES)


for _module in pkgutil.iter_modules(__path__, __name__ + "."):
    importlib.import_module(_module.name)
