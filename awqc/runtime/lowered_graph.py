"""The lowered graph as a module that runs, and in the forms in which people and other programs look at it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from awqc.text import graph_text, node_op, value_type

if TYPE_CHECKING:
    import networkx

#: Colours of the kinds of node in a drawing.
_FILL = {
    "input": "#dbe9f6",
    "output": "#dbe9f6",
    "parameter": "#f0f0f0",
    "quantized": "#f6dccb",
    "op": "#ffffff",
}


class LoweredGraph(fx.GraphModule):
    """What a compiled model computes, on the model's own tensors: a ``torch.fx.GraphModule`` of ATen ops and
    of the ops of backends.

    Args:
        tensors: parameters and buffers by name, shared with the model.
        nodes: the graph.
        quantized: names of the quantized linears, and of the quantized stacks of experts' weights.
    """

    def __init__(self, tensors: Mapping[str, Tensor], nodes: fx.Graph, quantized: Iterable[str] = ()) -> None:
        # What runs reads ``self.NAME``: a module of the model called like a method below comes before it.
        hidden = {name.partition(".")[0] for name in tensors} & LoweredGraph.__dict__.keys()
        self.__dict__.update({name: nn.Module() for name in hidden})
        super().__init__(dict(tensors), nodes)
        self._modules.update({name: self.__dict__[name] for name in hidden})
        # fx carries ``meta`` along to copies.
        self.meta["quantized"] = frozenset(quantized)

    def text(self) -> str:
        """One line a node, the same for the same model: ``name: f32[1, 16, 64] = awqc.qlinear_cpu(...)``."""
        return graph_text(self.graph)

    def to_networkx(self) -> networkx.DiGraph[str]:
        """See :func:`to_networkx`."""
        return to_networkx(self.graph, self.meta.get("quantized", ()))

    def to_dot(self, parameters: bool = False) -> str:
        """See :func:`to_dot`."""
        return to_dot(self.graph, self.meta.get("quantized", ()), parameters)


def node_name(node: fx.Node) -> str:
    """The name of a node in texts: that of the parameter for one that reads it."""
    return str(node.target) if node.op == "get_attr" else node.name


def quantized_linear(node: fx.Node, quantized: Container[str]) -> str | None:
    """Which of the linears ``quantized`` the node is: its packed tensors are named after it."""
    if node.op != "call_function":
        return None
    owners = (str(n.target).rpartition(".")[0] for n in node.all_input_nodes if n.op == "get_attr")
    return next((owner for owner in owners if owner in quantized), None)


def to_networkx(graph: fx.Graph, quantized: Container[str] = ()) -> networkx.DiGraph[str]:
    """A directed graph from operands to results, for the algorithms of networkx.

    Nodes are named as in the text and have ``kind`` (input, parameter, op, quantized or output), ``op``,
    ``shape``, ``dtype`` and, if quantized, ``linear``. Edges have ``positions``: as which operands the
    tail is given.
    """
    import networkx

    found: networkx.DiGraph[str] = networkx.DiGraph()
    for node in graph.nodes:
        value, linear = node.meta.get("val"), quantized_linear(node, quantized)
        tensor = isinstance(value, Tensor)
        found.add_node(
            node_name(node),
            kind=_kind(node, quantized),
            op=node_op(node),
            shape=tuple(value.shape) if tensor else None,
            dtype=str(value.dtype).removeprefix("torch.") if tensor else None,
            **({"linear": linear} if linear else {}),
        )
        positions: dict[str, list[int]] = {}
        for position, operand in enumerate(_operands(node)):
            positions.setdefault(node_name(operand), []).append(position)
        for operand_name, at in positions.items():
            found.add_edge(operand_name, node_name(node), positions=tuple(at))
    return found


def to_dot(graph: fx.Graph, quantized: Container[str] = (), parameters: bool = False) -> str:
    """A drawing for Graphviz: ``dot -Tsvg``.

    Args:
        parameters: draw a box for every parameter too; without, their names are in the box of who reads them.
    """
    lines = ["digraph {", '  node [shape=box, style=filled, fontname="monospace", fontsize=10]']
    for node in graph.nodes:
        kind = _kind(node, quantized)
        if kind == "parameter" and not parameters:
            continue
        label = [node_name(node), f"{node_op(node)} {value_type(node.meta.get('val'))}"]
        if kind == "output":
            label = ["output"]
        if not parameters:
            label += [node_name(n) for n in node.all_input_nodes if n.op == "get_attr"]
        text = "\\n".join(_escaped(line) for line in label)
        lines.append(f'  "{_escaped(node_name(node))}" [label="{text}", fillcolor="{_FILL[kind]}"]')
        lines += [
            f'  "{_escaped(node_name(operand))}" -> "{_escaped(node_name(node))}"'
            for operand in node.all_input_nodes
            if parameters or operand.op != "get_attr"
        ]
    return "\n".join([*lines, "}"]) + "\n"


def _operands(node: fx.Node) -> list[fx.Node]:
    """Operands in order; one that is given twice comes twice."""
    found: list[fx.Node] = []

    def collect(value: Any) -> Any:
        found.append(value)
        return value

    fx.node.map_arg((node.args, node.kwargs), collect)
    return found


def _kind(node: fx.Node, quantized: Container[str]) -> str:
    names = {"placeholder": "input", "get_attr": "parameter", "output": "output"}
    return names.get(node.op) or ("quantized" if quantized_linear(node, quantized) else "op")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
