"""Layers are found from the numbers in names."""

from __future__ import annotations

import pytest

from awqc.page.layers import Layers, Place, numbers, template


def test_a_stack_of_layers_and_what_is_outside() -> None:
    layers = Layers(["lm_head", *(f"model.layers.{i}.mlp.{w}" for i in range(3) for w in ("up", "down"))])
    assert layers.place("model.layers.2.mlp.up") == Place("model.layers", 2, "mlp.up")
    assert layers.place("model.layers.2.mlp.up").layer == "model.layers.2"
    assert layers.place("model.layers.1.norm.weight") == Place("model.layers", 1, "norm.weight")
    assert layers.place("lm_head") == Place("", -1, "lm_head")
    assert layers.place("lm_head").layer == ""


def test_experts_are_not_layers_even_where_there_are_more_of_them() -> None:
    layers = Layers([f"layers.{i}.moe.experts.{e}.w1" for i in range(2) for e in range(8)])
    assert layers.place("layers.1.moe.experts.7.w1") == Place("layers", 1, "moe.experts.*.w1")


def test_a_number_that_wraps_the_model_is_no_layer() -> None:
    """As in a Sequential of a trunk and a head."""
    layers = Layers(["1.weight", *(f"0.blocks.{i}.fc" for i in range(4))])
    assert layers.place("0.blocks.3.fc") == Place("0.blocks", 3, "fc")


@pytest.mark.parametrize("name", ["h.0.fc", "0.fc"])
def test_a_single_layer_is_one(name: str) -> None:
    assert Layers([name]).place(name).index == 0


def test_two_stacks() -> None:
    layers = Layers([f"{stack}.block.{i}.layer.0.q" for stack in ("encoder", "decoder") for i in range(2)])
    assert layers.stacks == {"encoder.block", "decoder.block"}
    assert layers.place("decoder.block.1.layer.0.q") == Place("decoder.block", 1, "layer.*.q")


def test_indices_in_brackets() -> None:
    layers = Layers([f"layers.{i}.experts.up[{e}]" for i in range(2) for e in range(2)])
    assert layers.place("layers.1.experts.up[0]") == Place("layers", 1, "experts.up[*]")


def test_a_template_and_its_numbers_are_the_name() -> None:
    name = "model.layers.12.experts.3.w1.v2"
    assert (template(name), numbers(name)) == ("model.layers.*.experts.*.w1.v2", [12, 3])
