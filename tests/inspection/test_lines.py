"""The lowered graph with what is known of each linear."""

from __future__ import annotations

import json

from awqc.inspection.lines import document, in_float, refusals, segments
from awqc.inspection.subject import Subject
from awqc.text import graph_text


def test_every_node_has_a_line(loaded: Subject) -> None:
    found = segments(loaded, fold=False)
    lines = [line.text for segment in found for line in segment.lines]
    assert sorted(lines) == sorted(graph_text(loaded.graph).splitlines())
    assert [segment.layer for segment in found] == ["", "model.layers.0", "model.layers.1", ""]


def test_linears_say_group_and_kernel(loaded: Subject) -> None:
    about = {
        line.about.linear: line.about for s in segments(loaded, fold=False) for line in s.lines if line.about
    }
    assert about.keys() == loaded.linears.keys()
    down = about["model.layers.1.mlp.down_proj"]
    group = loaded.report.groups["model.layers.1.mlp.up_proj.weight"]
    assert down.group == "scale of model.layers.1.mlp.up_proj.weight"
    assert down.scale == (f"{group.family} {group.ratio:g}" if group.applied else "none was better")
    assert down.kernels in (["dot_products.py:linear"], ["aten._weight_int4pack_mm_for_cpu"])
    assert (down.scheme, down.backend) == ("W4 g32 asym", "cpu")


def test_layers_that_differ_in_numbers_alone_are_shown_once() -> None:
    """Those after the first: that one also computes what all of them share."""
    from awqc import QuantConfig
    from awqc.inspection.outline import outline
    from awqc.inspection.subject import of_outline
    from tests.models import llama

    subject = of_outline(outline(llama(num_hidden_layers=5), QuantConfig(group_size=32)))
    folded = segments(subject)
    assert sum(len(s.lines) * (1 + len(s.alike)) for s in folded) == len(
        graph_text(subject.graph).splitlines()
    )
    assert [s.layer for s in folded] == ["", "model.layers.0", "model.layers.1", ""]
    assert folded[2].alike == ["model.layers.2", "model.layers.3", "model.layers.4"]


def test_refusals_name_the_reason(loaded: Subject, outlined: Subject) -> None:
    reasons = refusals(loaded)["cpu"]
    assert reasons["marlin runs on NVIDIA GPUs, not on cpu"] == list(loaded.linears)
    assert refusals(outlined) == {"marlin": {}}


def test_linears_in_float(loaded: Subject) -> None:
    (head,) = in_float(loaded)
    assert head[1] == "kept: computes the model's output (quantize_head=True quantizes it)"


def test_as_json(outlined: Subject) -> None:
    found = json.loads(json.dumps(document(segments(outlined, fold=False), outlined)))
    assert (found["hardware"], found["outlined"]) == ("nvidia_h200", True)
    linears = [node["linear"]["linear"] for node in found["nodes"] if "linear" in node]
    assert sorted(linears) == sorted(outlined.linears)
    names = {node["name"] for node in found["nodes"]}
    assert all(operand in names for node in found["nodes"] for operand in node["operands"])
