"""No graph: the root is one region, run as it is. Its linears are still seen, and what they read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from awqc.capture.inputs import flat_inputs
from awqc.capture.numerics import eager_outputs
from awqc.capture.regions import Region, Structure, result_without_weights
from awqc.capture.subject import Subject
from awqc.graph import Graph
from awqc.storage.source import named_tensors


def as_it_is(subject: Subject) -> Graph:
    """The root as one region.

    Raises:
        CaptureError: if it does not run on its inputs.
    """
    root, builder, arguments = subject.module, subject.builder(), subject.arguments()
    if subject.source.has_values:
        results = eager_outputs(root, subject.inputs, builder.weights, builder.names, seeded=True)
    else:
        result = result_without_weights(root, (), arguments, subject.dtype)
        results = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
    structure, _ = Structure.of(((), arguments))
    names = flat_inputs(arguments)
    operands = [builder.input(n, torch.empty_like(x, device="meta")) for n, x in names.items()]
    call = Region(root, subject.root, structure, tuple(name for name, _ in named_tensors(root)))
    subject.notes.append(
        "its linears are quantized where they are; no scale is folded, since nothing is known in between"
    )
    return builder.graph(builder.region(call, operands, results))
