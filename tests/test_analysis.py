"""``awqc.analyze`` from a module, a module on meta or a config alone; ``fold`` with scales of one's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import awqc
from awqc.analysis import Analysis
from awqc.capture import relative_error
from awqc.errors import CheckpointError, ConfigError, PipelineError
from awqc.scaleflow.groups import ScaleGroup
from tests.nets import WIDTH, Net, fold_error, inputs, linear, norm
from tests.zoo.models import build, token_ids
from tests.zoo.specimen import BATCH, specimen

Found = list[tuple[str, tuple[str, ...], list[bool]]]


def groups_of(analysis: Analysis) -> Found:
    return [(g.name, g.linears, g.alive.tolist()) for g in analysis.groups]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return Net(lambda m, x: m.b(m.a(m.n(x)).relu()), n=norm(), a=linear(bias=True), b=linear())


@pytest.fixture(scope="module")
def analysis(net: nn.Module) -> Analysis:
    return awqc.analyze(net, inputs())


# -- where a model may come from -------------------------------------------------------------------------


def test_a_directory_with_a_config_and_no_weights(tmp_path: Path) -> None:
    known = specimen("qwen2")
    known.model.config.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    for path in (tmp_path, str(tmp_path)):
        assert groups_of(awqc.analyze(path, BATCH)) == groups_of(known.analysis)


def test_a_directory_is_compared_with_nothing(tmp_path: Path) -> None:
    specimen("llama").model.config.save_pretrained(tmp_path)
    assert awqc.analyze(tmp_path, BATCH).capture.checks == []


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^{tmp_path} has no config that transformers can read "):
        awqc.analyze(tmp_path, BATCH)


def test_a_model_on_meta() -> None:
    known = specimen("gemma2")
    with torch.device("meta"):
        model = type(known.model)(known.model.config)
    found = awqc.analyze(model, BATCH)
    assert groups_of(found) == groups_of(known.analysis)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_what_is_found_on_meta_folds_into_a_model_with_weights() -> None:
    known = specimen("stablelm")
    with torch.device("meta"):  # analyzed under it, too
        found = awqc.analyze(type(known.model)(known.model.config), BATCH)
    model = copy.deepcopy(known.model).double()
    with torch.no_grad():
        before = model(**BATCH).logits
        found.fold(model)
        after = model(**BATCH).logits
    assert relative_error(after, before) < 1e-5


def test_inputs_may_be_the_token_ids_alone() -> None:
    assert groups_of(awqc.analyze(build("llama"), token_ids())) == groups_of(specimen("llama").analysis)


def test_a_model_in_half_precision_is_analyzed_in_half_precision() -> None:
    model = build("llama").to(torch.bfloat16)
    found = awqc.analyze(model, token_ids())
    assert groups_of(found) == groups_of(specimen("llama").analysis)
    assert found.prove(BATCH) < 1e-9


# -- what is said ----------------------------------------------------------------------------------------


def test_every_linear_has_its_group_or_a_reason(analysis: Analysis) -> None:
    assert list(analysis.linears) == ["a.weight", "b.weight"]
    assert [g.name for g in analysis.linears.values() if isinstance(g, ScaleGroup)] == [
        "n.weight",
        "a.weight",
    ]
    assert analysis.capture.rung == "torch.export"


def test_no_linear_at_all() -> None:
    found = awqc.analyze(Net(lambda m, x: m.n(x), n=norm()), inputs())
    assert (found.groups, found.linears) == ([], {})
    assert found.prove(inputs()) == 0.0


# -- fold ------------------------------------------------------------------------------------------------


def test_fold_with_scales_of_ones_own(net: nn.Module, analysis: Analysis) -> None:
    scales = torch.tensor([2.0, 0.5, 4.0, 1.0, 1.0, 0.25, 8.0, 1.0])
    model = copy.deepcopy(net)
    analysis.fold(model, {"n.weight": scales})
    assert torch.equal(model.n.weight, net.n.weight / scales)
    assert torch.equal(model.n.bias, net.n.bias / scales)
    assert torch.equal(model.a.weight, net.a.weight * scales)
    for name in ("a.bias", "b.weight"):
        assert torch.equal(model.get_parameter(name), net.get_parameter(name))


def test_fold_keeps_parameters_that_the_user_holds(net: nn.Module, analysis: Analysis) -> None:
    model = copy.deepcopy(net)
    held = dict(model.named_parameters())
    analysis.fold(model, seed=3)
    assert all(held[name] is parameter for name, parameter in model.named_parameters())


def test_fold_depends_on_the_seed_alone(net: nn.Module, analysis: Analysis) -> None:
    def folded(seed: int) -> Tensor:
        model = copy.deepcopy(net)
        analysis.fold(model, seed=seed)
        return model.a.weight

    assert torch.equal(folded(0), folded(0))
    assert not torch.equal(folded(0), folded(1))


def test_a_fold_moves_nothing(net: nn.Module, analysis: Analysis) -> None:
    assert fold_error(net, analysis) < 1e-12


def test_refused_channels_keep_their_scale() -> None:
    def compute(m: Net, x: Tensor) -> Tensor:
        h = m.n(x)
        return m.a(torch.cat([h[..., :2].tanh(), h[..., 2:]], dim=-1))

    net = Net(compute, n=norm(), a=linear())
    model = copy.deepcopy(net)
    awqc.analyze(net, inputs()).fold(model, {"n.weight": torch.full((WIDTH,), 2.0)})
    assert (model.n.weight / net.n.weight).tolist() == [1.0] * 2 + [0.5] * 6
    assert (model.a.weight / net.a.weight)[0].tolist() == [1.0] * 2 + [2.0] * 6


def test_a_group_that_there_is_not(net: nn.Module, analysis: Analysis) -> None:
    with pytest.raises(ConfigError) as error:
        analysis.fold(copy.deepcopy(net), {"c.weight": torch.ones(WIDTH)})
    assert str(error.value) == "no scale group is called 'c.weight': there are n.weight, a.weight"


def test_a_group_where_there_is_none() -> None:
    net = Net(lambda m, x: m.a(x), a=linear())
    with pytest.raises(ConfigError) as error:
        awqc.analyze(net, inputs()).fold(net, {"a.weight": torch.ones(WIDTH)})
    assert str(error.value) == "no scale group is called 'a.weight': there are none"


def test_scales_of_another_length(net: nn.Module, analysis: Analysis) -> None:
    with pytest.raises(ConfigError) as error:
        analysis.fold(copy.deepcopy(net), {"n.weight": torch.ones(3)})
    assert str(error.value) == "scales of group 'n.weight' have shape (3,): expected (8,)"


def test_a_wrong_argument_folds_nothing(net: nn.Module, analysis: Analysis) -> None:
    model = copy.deepcopy(net)
    with pytest.raises(ConfigError):
        analysis.fold(model, {"n.weight": torch.full((WIDTH,), 2.0), "a.weight": torch.ones(3)})
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), net.parameters(), strict=True))


# -- what need not be given --------------------------------------------------------------------------------


def test_inputs_are_made_up_from_the_config(tmp_path: Path) -> None:
    known = specimen("llama")
    known.model.config.save_pretrained(tmp_path)
    assert groups_of(awqc.analyze(tmp_path)) == groups_of(known.analysis)


def test_an_image_is_made_up_from_the_config() -> None:
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        num_channels=1,
    )
    found = awqc.analyze(transformers.ViTModel(config))
    assert [tuple(n.meta["val"].shape) for n in found.graph.inputs] == [(1, 1, 16, 16)]


def test_a_model_whose_inputs_nobody_knows() -> None:
    model = build("llama")
    model.main_input_name = "brain_waves"
    with pytest.raises(ConfigError) as error:
        awqc.analyze(model)
    assert str(error.value) == (
        "LlamaForCausalLM reads 'brain_waves', and its config does not say of what shape: use "
        "awqc.analyze(model, inputs) from Python"
    )


def test_a_part_of_a_model() -> None:
    found = awqc.analyze(build("llama"), BATCH, root="model.layers.1.mlp")
    assert found.capture.root == "model.layers.1.mlp"
    assert set(found.linears) == {f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    assert [g.name for g in found.groups] == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("variable", ["AWQC_SKIP", "AWQC_DUMP"])
def test_flags_may_name_passes_that_only_a_compile_has(
    net: nn.Module, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "clip-weights")
    assert len(awqc.analyze(net, inputs()).groups) == 2
    monkeypatch.setenv(variable, "no-such-pass")
    with pytest.raises(PipelineError, match=r"^no pass is called 'no-such-pass': there are canonicalize, "):
        awqc.analyze(net, inputs())


def test_a_proof_takes_what_the_model_takes() -> None:
    def compute(m: Net, x: Any) -> Tensor:
        return m.second(torch.relu(m.first(x["pair"][0] + x["pair"][1]))) * x["factor"]

    net = Net(compute, first=linear(), second=linear())
    batch = {"x": {"pair": [inputs()["x"], inputs()["x"]], "factor": 2}}
    found = awqc.analyze(net, batch)
    assert len(found.groups) == 1
    assert found.prove(batch) < 1e-9


def test_tensors_that_a_forward_makes_are_as_precise_as_a_proof() -> None:
    def compute(m: Net, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], WIDTH)
        for step in x.unbind(1):
            state = m.first(step) + m.second(state)
        return state

    assert awqc.analyze(Net(compute, first=linear(), second=linear()), inputs()).prove(inputs()) < 1e-9


def test_an_empty_parameter_is_no_handle() -> None:
    net = Net(
        lambda m, x: m.first(m.norm(x)) + m.norm(x) @ m.none @ m.none.mT,
        norm=norm(),
        first=linear(),
        none=nn.Parameter(torch.ones(WIDTH, 0)),
    )
    assert awqc.analyze(net, inputs()).prove(inputs()) < 1e-9


def test_a_buffer_may_hold_infinity() -> None:
    """Masks that are added to scores do."""
    mask = torch.full((3, 3), float("-inf")).triu(1)
    net = Net(
        lambda m, x: m.out(torch.softmax(m.q(x) @ x.mT + m.mask, -1) @ m.v(m.norm(x))),
        norm=norm(), q=linear(), v=linear(), out=linear(), mask=mask,
    )  # fmt: skip
    assert len(awqc.analyze(net, inputs()).groups) == 2
    compiled = awqc.compile(net, [inputs()] * 2, config=awqc.QuantConfig(bits=8, group_size=WIDTH))
    assert bool(torch.isfinite(compiled(**inputs())).all())
