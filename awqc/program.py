"""Nodes of a graph, run one by one: how graphs are checked, and how calibration tokens move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from awqc.weights import Weights

Env = dict[fx.Node, Any]


class _Step(NamedTuple):
    """A node of a program.

    Args:
        call: what is called for it.
        args: its positional arguments, each with how to read it: :data:`_VALUE` of a node before,
            :data:`_WEIGHT` by its name, :data:`_NESTED` nodes in a list or the like, or :data:`_GIVEN`.
        kwargs: its keyword arguments.
        done: nodes whose values nothing needs any more.
        read: names of weights that nothing reads any more.
    """

    node: fx.Node
    call: Callable[..., Any]
    args: list[tuple[int, Any]]
    kwargs: dict[str, Any]
    done: list[fx.Node]
    read: list[str]


_GIVEN, _VALUE, _WEIGHT, _NESTED = range(4)


class Program:
    """Nodes in execution order, made ready to be run many times.

    Args:
        nodes: a slice of a graph; only ops are run.
        keep: nodes whose values must remain; all others of ``nodes`` are freed after their last use
            within the slice. None keeps everything.
        calls: what to call for a node instead of its op.
    """

    def __init__(
        self,
        nodes: Iterable[fx.Node],
        keep: Iterable[fx.Node] | None = None,
        calls: Mapping[fx.Node, Callable[..., Any]] = MappingProxyType({}),
    ) -> None:
        nodes = [n for n in nodes if n.op == "call_function"]
        last = {operand: node for node in nodes for operand in node.all_input_nodes}
        last = {**{node: node for node in nodes}, **last}  # what nothing reads is done at once
        kept = set(last) if keep is None else set(keep)
        done: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
        read: dict[fx.Node, list[str]] = {node: [] for node in nodes}
        for operand, node in last.items():
            if operand.op == "get_attr":
                read[node].append(str(operand.target))
            elif operand not in kept:
                done[node].append(operand)
        self._steps = [
            _Step(
                node,
                calls.get(node, node.target),  # type: ignore[arg-type]
                [_argument(a) for a in node.args],
                dict(node.kwargs),
                done[node],
                read[node],
            )
            for node in nodes
        ]

    def run(
        self,
        env: Env,
        weights: Weights | Mapping[str, Tensor],
        tap: Callable[[fx.Node, Any], None] | None = None,
    ) -> None:
        """Run the nodes, reading and writing values in ``env``.

        Args:
            env: values of the nodes computed before; updated in place.
            weights: values of ``get_attr`` nodes; streamed ones are dropped after the last node that reads
                them.
            tap: called with every node and its value right after it is computed.
        """
        streamed = weights if isinstance(weights, Weights) and weights.streamed else None

        def value(operand: fx.Node) -> Any:
            return weights[str(operand.target)] if operand.op == "get_attr" else env[operand]

        with torch.no_grad():
            for node, call, given, named, done, read in self._steps:
                args = [
                    env[a]
                    if how == _VALUE
                    else weights[a]
                    if how == _WEIGHT
                    else a
                    if how == _GIVEN
                    else map_arg(a, value)
                    for how, a in given
                ]
                kwargs = map_arg(named, value) if named else named
                env[node] = call(*args, **kwargs)
                if tap is not None:
                    tap(node, env[node])
                if streamed is not None and read:
                    del args, kwargs
                    for name in read:
                        streamed.drop(name)
                for operand in done:
                    env.pop(operand, None)


def _argument(argument: Any) -> tuple[int, Any]:
    """How a program reads an argument of a node."""
    if isinstance(argument, fx.Node):
        weight = argument.op == "get_attr"
        return (_WEIGHT, str(argument.target)) if weight else (_VALUE, argument)
    nested = isinstance(argument, list | tuple | dict | slice)
    return (_NESTED if nested else _GIVEN), argument


def execute(
    nodes: Iterable[fx.Node],
    env: Env,
    weights: Weights | Mapping[str, Tensor],
    keep: Iterable[fx.Node] | None = None,
    tap: Callable[[fx.Node, Any], None] | None = None,
    calls: Mapping[fx.Node, Callable[..., Any]] = MappingProxyType({}),
) -> None:
    """Run ``nodes`` once; see :class:`Program`."""
    Program(nodes, keep, calls).run(env, weights, tap)
