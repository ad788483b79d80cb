"""Models of images and video."""

from __future__ import annotations

from typing import Any

from tests.zoo.inputs import masked, video
from tests.zoo.sizes import words

_CLASSIFIERS = words("""
    beit bit convnext convnextv2 data2vec-vision dinov2 dinov2_with_registers efficientnet focalnet hgnet_v2
    hiera ijepa mobilenet_v2 mobilevit poolformer pvt pvt_v2 regnet resnet segformer siglip swiftformer swin
    swinv2 vit vit_msn
""")
_VIDEO = words("timesformer videomae vivit")
_TOWERS = words("""
    aimv2_vision_model clip_vision_model conditional_detr detr dinov3_vit donut-swin dpt glpn idefics3_vision
    imagegpt internvl_vision maskformer-swin mlcd_vision_model pixio pixtral sam_vision_model
    siglip_vision_model tipsv2_vision_model videoprism_vision_model vit_mae vitdet vjepa2 yolos
""")

_STAGED = {"image_size": 64, "patch_size": 4}
_DETR = {
    "use_timm_backbone": False,
    "backbone": None,
    "backbone_config": {"model_type": "resnet", "out_features": ["stage4"]},
    "num_queries": 8,
}
_SWIN = {**_STAGED, "embed_dim": 16, "window_size": 2}
#: Model type -> fields that the sizes of everybody do not suit.
CHANGES: dict[str, dict[str, Any]] = {
    "conditional_detr": _DETR,
    "convnext": _STAGED,
    "convnextv2": _STAGED,
    "detr": _DETR,
    "donut-swin": _SWIN,
    "efficientnet": {
        "hidden_dim": 320,
        "width_coefficient": 0.25,
        "depth_coefficient": 0.25,
        "image_size": 64,
        "depth_divisor": 8,
    },
    "focalnet": {**_STAGED, "embed_dim": 16, "hidden_sizes": [32, 64, 64, 64]},
    "hgnet_v2": {
        "stem_channels": [3, 8, 16],
        "stage_in_channels": [16, 32, 32, 64],
        "stage_mid_channels": [8, 8, 16, 16],
        "stage_out_channels": [32, 32, 64, 64],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [1, 1, 2, 2],
        "hidden_sizes": [32, 32, 64, 64],
        "embedding_size": 16,
        "image_size": 64,
    },
    "hiera": {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 4]},
    "levit": {
        "image_size": 64,
        "patch_size": 16,
        "hidden_sizes": [32, 48, 64],
        "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1],
    },
    "maskformer-swin": _SWIN,
    "mobilevit": {
        "image_size": 64,
        "hidden_sizes": [32, 48, 64],
        "neck_hidden_sizes": [16, 16, 16, 16, 16, 16, 64],
    },
    "pvt": {"image_size": 64, "hidden_sizes": [16, 32, 64, 64], "num_attention_heads": [1, 2, 4, 4]},
    "regnet": {"groups_width": 16, "hidden_sizes": [32, 32, 64, 64]},
    "bit": {"num_groups": 8, "hidden_sizes": [32, 32, 64, 64]},
    "sam": {
        "vision_config": {"output_channels": 64, "window_size": 2, "global_attn_indexes": [1]},
        "mask_decoder_config": {"iou_head_hidden_dim": 32},
        "prompt_encoder_config": {"image_embedding_size": 4},
    },
    "segformer": {"image_size": 64},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "vjepa2": {
        "crop_size": 32,
        "frames_per_clip": 4,
        "pred_hidden_size": 32,
        "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": 2,
    },
    "vivit": {"tubelet_size": [2, 8, 8], "num_frames": 4},
}

HEADS = (
    dict.fromkeys(_CLASSIFIERS, "ImageClassification")
    | dict.fromkeys(_TOWERS + _VIDEO, "")
    | {"deit": "DeiTForImageClassification", "levit": "LevitForImageClassification"}
)
INPUTS = dict.fromkeys(_VIDEO, video) | {"vit_mae": masked}
