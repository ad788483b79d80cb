"""Text that the model writes itself."""

import copy

import pytest
import torch
import torch.nn.functional as F

from awqc.calibration import load_tokens
from awqc.errors import CalibrationError, NonFiniteError


def test_self_calibration_is_seeded(model):
    options = {"model": model, "max_calib_samples": 3, "max_calib_seq_len": 20}
    state = torch.get_rng_state()
    first = load_tokens("self", **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.ids.shape == (3, 20)
    assert first.source == "the model's own text (seed 0)"
    assert (first.ids[:, 0] == model.config.bos_token_id).all()
    assert len({tuple(row) for row in first.ids.tolist()}) == 3
    assert torch.equal(first.ids, load_tokens("self", **options).ids)
    assert not torch.equal(first.ids, load_tokens("self", seed=1, **options).ids)


def test_the_models_own_defaults_do_not_bend_the_distribution(model):
    """Greedy defaults would make all rows alike, and an end-of-text would end them."""
    model = copy.deepcopy(model)
    defaults = model.generation_config
    defaults.top_k = 1
    defaults.repetition_penalty = 5.0
    found = load_tokens("self", model=model, max_calib_samples=64, max_calib_seq_len=30)
    assert model.generation_config is defaults
    assert found.ids.shape == (64, 30)
    assert (found.ids == model.config.eos_token_id).any()


def test_tokens_follow_the_models_distribution(model):
    """The second token of many samples against the probabilities after the first, by a chi-square bound."""
    samples = 4096
    found = load_tokens("self", model=model, max_calib_samples=samples, max_calib_seq_len=2)
    with torch.no_grad():
        logits = model(input_ids=found.ids[:1, :1]).logits[0, -1]
    expected = samples * F.softmax(logits.double(), -1)
    counts = torch.bincount(found.ids[:, 1], minlength=logits.numel()).double()
    freedom = logits.numel() - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - freedom) < 6 * (2 * freedom) ** 0.5


def test_progress_counts_tokens(model):
    calls = []
    load_tokens(
        "self",
        model=model,
        max_calib_samples=40,
        max_calib_seq_len=5,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls[-1] == (200, 200)
    assert calls == sorted(calls)


def test_a_model_without_special_tokens_starts_anywhere(model):
    model = copy.deepcopy(model)
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = None
    found = load_tokens("self", model=model, max_calib_samples=30, max_calib_seq_len=3)
    assert len(set(found.ids[:, 0].tolist())) > 10


def test_one_token_is_the_prompt(model):
    assert load_tokens("self", model=model, max_calib_samples=2, max_calib_seq_len=1).ids.tolist() == [
        [1],
        [1],
    ]


@pytest.mark.parametrize(
    ("model", "kind"), [(None, "no model was given"), (torch.nn.Linear(2, 2), "Linear has no generate()")]
)
def test_self_needs_a_model_that_generates(model, kind):
    with pytest.raises(CalibrationError) as error:
        load_tokens("self", model=model)
    assert str(error.value) == (
        f"calib='self' needs a model that can write text, but {kind}: give a file, strings or token ids"
    )


def test_self_reads_no_data(model):
    with pytest.raises(CalibrationError) as error:
        load_tokens("self", model=model, split="train")
    assert str(error.value) == "calib='self' reads no data: leave out split and column"


def test_nan_is_found_before_it_is_sampled_from(model):
    model = copy.deepcopy(model)
    model.model.norm.weight.data[0] = float("nan")
    defaults = model.generation_config
    with pytest.raises(NonFiniteError) as error:
        load_tokens("self", model=model, max_calib_samples=2, max_calib_seq_len=4)
    assert str(error.value) == (
        "calib='self': the model's logits for token 1 hold NaN: check its weights and dtype"
    )
    assert model.generation_config is defaults
