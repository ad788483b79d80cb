"""Part of a model as the root: chosen, named, wrong; inputs of several kinds; what stays outside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import awqc
from awqc.capture import relative_error
from awqc.errors import CalibrationError, CaptureError, ConfigError

CONFIG = awqc.QuantConfig(group_size=32)
SIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE = 63


@pytest.fixture(scope="module")
def llava() -> transformers.LlavaForConditionalGeneration:
    torch.manual_seed(0)
    text = {**SIDE, "model_type": "llama", "vocab_size": 64, "num_key_value_heads": 2}
    vision = {**SIDE, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def images(count: int) -> list[dict[str, Tensor]]:
    """Batches of four image tokens and twelve of text."""
    draw = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.cat(
                [torch.full((1, 4), IMAGE), torch.randint(3, 60, (1, 12), generator=draw)], dim=1
            ),
            "pixel_values": torch.randn(1, 3, 16, 16, generator=draw),
        }
        for _ in range(count)
    ]


def seq2seq() -> transformers.BartForConditionalGeneration:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
    )
    return transformers.BartForConditionalGeneration(config).half().eval()


def test_vision_stays_in_float_unless_asked(llava: transformers.LlavaForConditionalGeneration) -> None:
    compiled = awqc.compile(llava, images(3), config=CONFIG)
    assert compiled.report.capture["root"] == "model.language_model"
    assert (
        "capture",
        "only 'model.language_model', which reads the text, is compiled: pass root='' for the whole",
    ) in compiled.report.notes
    names = set(compiled.quantized_linears())
    assert len(names) == 7
    assert all(name.startswith("model.language_model.") for name in names)
    kept = {row.name: row.reason for row in compiled.report.linears.values() if row.decision == "kept"}
    assert (
        kept["model.vision_tower.encoder.layers.0.mlp.fc1"] == "is outside of the root 'model.language_model'"
    )
    assert kept["lm_head"] == "is outside of the root 'model.language_model'"
    (batch,) = images(1)
    with torch.no_grad():
        assert relative_error(compiled(**batch).logits, llava(**batch).logits) < 0.2


def test_the_whole_is_quantized_when_asked(llava: transformers.LlavaForConditionalGeneration) -> None:
    compiled = awqc.compile(llava, images(3), config=CONFIG, root="")
    assert compiled.report.capture["root"] == ""
    assert "model.vision_tower.encoder.layers.0.mlp.fc1" in compiled.quantized_linears()


def test_a_submodule_can_be_named(llava: transformers.LlavaForConditionalGeneration) -> None:
    compiled = awqc.compile(llava, images(3), config=CONFIG, root="model.vision_tower")
    assert all(name.startswith("model.vision_tower.") for name in compiled.quantized_linears())


def test_tokens_alone_reach_the_text(llava: transformers.LlavaForConditionalGeneration) -> None:
    ids = torch.randint(3, 60, (3, 40), generator=torch.Generator().manual_seed(0))
    report = awqc.compile(llava, ids, config=CONFIG).report
    assert report.capture["root"] == "model.language_model"
    assert len(list(report.quantized())) == 7


def test_a_root_that_is_not_there(llava: transformers.LlavaForConditionalGeneration) -> None:
    with pytest.raises(ConfigError) as error:
        awqc.compile(llava, images(1), config=CONFIG, root="language_model")
    assert str(error.value) == (
        "root='language_model': LlavaForConditionalGeneration has no such submodule; it has "
        "model.language_model"
    )


def test_a_root_that_is_not_reached(llava: transformers.LlavaForConditionalGeneration) -> None:
    ids = torch.arange(3, 40)[None]
    with pytest.raises(CaptureError) as error:
        awqc.compile(llava, ids, config=CONFIG, root="model.vision_tower")
    assert str(error.value) == (
        "LlavaForConditionalGeneration does not call 'model.vision_tower' on such inputs: choose another "
        "root, or give inputs that reach it"
    )


def test_batches_of_another_shape_are_left_out(llava: transformers.LlavaForConditionalGeneration) -> None:
    batches = images(3)
    batches[1] = {**batches[1], "input_ids": batches[1]["input_ids"][:, :-1]}
    report = awqc.compile(llava, batches, config=CONFIG).report
    assert report.calibration["samples"] == 2
    assert ("calibration", "1 of 3 batches have another shape and were left out: pad them to one shape") in (
        report.notes
    )


def test_a_model_of_images_says_what_it_reads() -> None:
    config = transformers.ViTConfig(**SIDE, image_size=16, patch_size=8)
    model = transformers.ViTForImageClassification(config)
    with pytest.raises(CalibrationError) as error:
        awqc.compile(model, torch.arange(40)[None], config=CONFIG)
    assert str(error.value) == (
        "ViTForImageClassification reads 'pixel_values', not tokens: give calib as a list of dicts of its "
        "inputs, such as its processor makes"
    )
    batches = [{"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(2)]
    assert len(list(awqc.compile(model, batches, config=CONFIG).report.quantized())) == 6


def test_an_encoder_decoder_generates_and_reloads(tmp_path: Path) -> None:
    """Its weights are half precision, as those on disk are, so what is read back is the same."""
    model = seq2seq()
    ids = torch.randint(3, 64, (4, 24), generator=torch.Generator().manual_seed(0))
    compiled = awqc.compile(model, ids, config=CONFIG, backend="reference")
    assert (
        "calibration",
        "the decoder is given the encoder's tokens, shifted: pass dicts for pairs of your own",
    ) in compiled.report.notes
    assert len(compiled.quantized_linears()) == 16
    loaded = awqc.load(compiled.save(tmp_path / "out"), "reference", dtype=torch.float16)
    batch = {"input_ids": ids[:1], "decoder_input_ids": ids[1:2, :5]}
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, compiled(**batch).logits)
        written = compiled.generate(ids[:1], max_new_tokens=8, do_sample=False, num_beams=1)
        assert torch.equal(loaded.generate(ids[:1], max_new_tokens=8, do_sample=False, num_beams=1), written)


def test_both_sides_may_be_given() -> None:
    draw = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_ids": torch.randint(3, 64, (1, 24), generator=draw),
            "attention_mask": torch.ones(1, 24, dtype=torch.int64),
            "decoder_input_ids": torch.randint(3, 64, (1, 12), generator=draw),
        }
        for _ in range(3)
    ]
    report = awqc.compile(seq2seq(), batches, config=CONFIG).report
    assert report.calibration["tokens"] == 3 * 36
    assert len(list(report.quantized())) == 16
