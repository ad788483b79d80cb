"""Models of text with images or sound."""

from __future__ import annotations

from typing import Any

from tests.zoo.inputs import image_chat, inputs_of, pairs, patch_chat, tile_chat
from tests.zoo.sizes import words

#: One image of pixels, as many placeholders in the text as it has features.
_IMAGE = words("""
    aya_vision cohere2_vision emu3 fuyu gemma3 got_ocr2 internvl llava ovis2 paligemma video_llava vipllava
""")
#: Images as tiles, ``(1, images, channels, height, width)``.
_TILES = words("idefics2 idefics3 smolvlm")
#: Images as rows of patches, with a grid.
_PATCHES = words("glm4v glm4v_moe qwen2_5_vl qwen2_vl qwen3_vl qwen3_vl_moe qwen3_5")
#: Called with text alone: how their images are cut is a matter of their processors.
_TEXT = words("""
    aria deepseek_vl gemma4 lfm2_vl llava_next llava_next_video llava_onevision mistral3 mllama
    video_llama_3
""")
_CAPTIONS = words("blip git udop")
_PAIRS = words("""
    altclip bridgetower bros chinese_clip clip clip_text_model clipseg flava groupvit layoutlmv3 lilt lxmert
    metaclip_2 owlv2 owlvit siglip vilt visual_bert
""")
_SOUND = words("audioflamingo3 granite_speech qwen2_audio voxtral")

_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
#: Model type -> fields that the sizes of everybody do not suit.
CHANGES: dict[str, dict[str, Any]] = {
    "gemma3": {"mm_tokens_per_image": 4},
    "cohere2_vision": {"alignment_intermediate_size": 96},
    "glm4v": {"text_config": _ROPE},
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                **_ROPE["rope_parameters"],
                "mrope_section": [1, 1, 2],
                "partial_rotary_factor": 0.5,
            }
        }
    },
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16, "input_size": 32},
    "lilt": {"channel_shrink_ratio": 4, "hidden_size": 96},
    "lxmert": {"visual_feat_dim": 64, "l_layers": 1, "x_layers": 1, "r_layers": 1},
    "qwen2_5_vl": {"text_config": _ROPE},
    "qwen2_vl": {"text_config": _ROPE},
    "vipllava": {"vision_feature_layers": [-2, -1]},
}

HEADS = (
    dict.fromkeys(_IMAGE + _TILES + _PATCHES + _TEXT + _CAPTIONS, "ImageTextToText")
    | dict.fromkeys(_PAIRS, "")
    | dict.fromkeys(_SOUND, "Seq2SeqLM")
)
INPUTS = (
    dict.fromkeys(_IMAGE, image_chat)
    | dict.fromkeys(_TILES, tile_chat)
    | dict.fromkeys(_PATCHES, patch_chat)
    | dict.fromkeys(_TEXT + _SOUND, inputs_of)
    | dict.fromkeys(_CAPTIONS + _PAIRS, pairs)
)
