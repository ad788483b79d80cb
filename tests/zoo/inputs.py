"""Inputs for a model that nobody has described: by the names in its signature and the sizes in its config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.sizes import CONTEXT, IMAGE, PATCH, SPECIAL

TOKENS = 16
Inputs = dict[str, Tensor]


def token_ids(tokens: int = TOKENS, seed: int = 1) -> Tensor:
    """``(1, tokens)`` ids of text."""
    return torch.randint(3, SPECIAL, (1, tokens), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int) -> Tensor:
    """Standard normal values of this shape, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def boxes(tokens: int = TOKENS) -> Tensor:
    """``(1, tokens, 4)`` left, top, right and bottom of each token, below 50."""
    corners = torch.randint(0, 50, (1, tokens, 2, 2), generator=torch.Generator().manual_seed(3))
    return corners.sort(dim=2).values.flatten(2)


def sizes(config: Any) -> Callable[..., int]:
    """Looks a number up in ``config`` or in one of the configs inside it."""

    def size(*names: str, default: int) -> int:
        inner = [c for c in vars(config).values() if hasattr(c, "to_dict")]
        for name in names:
            for where in (config, *inner):
                value = vars(where).get(name)
                value = value[0] if isinstance(value, (list, tuple)) and value else value
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return default

    return size


def sample(name: str, config: Any) -> Tensor | None:
    """A value for the argument ``name`` of a forward; None where it is not known what that means."""
    size = sizes(config)
    channels, side = size("num_channels", default=3), size("image_size", "input_size", default=IMAGE)
    values: dict[str, Callable[[], Tensor]] = {
        "input_ids": token_ids,
        "decoder_input_ids": lambda: token_ids(seed=2),
        "qformer_input_ids": token_ids,
        "pixel_values": lambda: noise(1, channels, side, side),
        "pixel_values_videos": lambda: noise(
            1, size("num_frames", "frames_per_clip", default=2), channels, side, side
        ),
        "input_features": lambda: noise(
            1,
            size("num_mel_bins", "feature_size", default=16),
            2 * size("max_source_positions", default=CONTEXT),
        ),
        "input_values": lambda: noise(1, 1600),
        "inputs": lambda: token_ids(size("max_position_embeddings", default=CONTEXT)),
        "noise": lambda: noise(1, (side // size("patch_size", default=PATCH)) ** 2),
        "bbox": boxes,
        "attention_mask": lambda: torch.ones(1, TOKENS, dtype=torch.long),
        "visual_feats": lambda: noise(1, 4, size("visual_feat_dim", default=64)),
        "visual_pos": lambda: noise(1, 4, 4).sigmoid(),
        "flattened_patches": lambda: torch.cat([torch.ones(1, 4, 2), noise(1, 4, 3 * PATCH**2)], -1),
    }
    return values[name]() if name in values else None


def inputs_of(model: nn.Module, also: Iterable[str] = ()) -> Inputs:
    """What the forward of ``model`` needs.

    Args:
        model: its main input, arguments without a default, and the decoder's ids if it has a decoder.
        also: further arguments to give.
    """
    config: Any = model.config
    parameters = inspect.signature(model.forward).parameters
    names = dict.fromkeys([getattr(model, "main_input_name", "input_ids")])
    names |= dict.fromkeys(
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind == parameter.POSITIONAL_OR_KEYWORD
    )
    if getattr(config, "is_encoder_decoder", False):
        names["decoder_input_ids"] = None
    found = {name: sample(name, config) for name in [*names, *also] if name in parameters}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise ValueError(f"no sample for {', '.join(missing)}: describe the inputs in the table of the zoo")
    return {name: value for name, value in found.items() if value is not None}


def pairs(model: nn.Module) -> Inputs:
    """Text and an image side by side."""
    return inputs_of(model, ("input_ids", "pixel_values", "bbox", "visual_feats", "visual_pos"))


def masked(model: nn.Module) -> Inputs:
    """An image with the noise that decides which of its patches are seen: drawn by the forward, otherwise."""
    return inputs_of(model, ("noise",))


def video(model: nn.Module) -> Inputs:
    """A clip under the name of an image."""
    clip = sample("pixel_values_videos", model.config)
    assert clip is not None
    return {"pixel_values": clip}


def frames_last(model: nn.Module) -> Inputs:
    """Sound as frames of features, ``(1, frames, features)``."""
    features = sample("input_features", model.config)
    assert features is not None
    found = inputs_of(model)
    return {
        name: features.mT if name in ("input_features", "input_values") else v for name, v in found.items()
    }


def image_chat(model: nn.Module) -> Inputs:
    """Text with one image in it: as many placeholder tokens as the image has features."""
    pixels = sample("pixel_values", model.config)
    assert pixels is not None
    return _chat(model, pixels)


def tile_chat(model: nn.Module) -> Inputs:
    """The same with the image as one tile, ``(1, 1, channels, height, width)``."""
    pixels = sample("pixel_values", model.config)
    assert pixels is not None
    return _chat(model, pixels[None])


def _chat(model: Any, pixels: Tensor) -> Inputs:
    with torch.no_grad():
        features = model.get_image_features(pixel_values=pixels)
    features = getattr(features, "pooler_output", features)
    features = features if isinstance(features, (list, tuple)) else [features]
    count = sum(part.numel() // part.shape[-1] for part in features)
    return {"input_ids": with_image(model, count), "pixel_values": pixels}


def patch_chat(model: nn.Module) -> Inputs:
    """Text with one image of 4 x 4 patches in it, each a row, merged two by two."""
    vision: Any = model.config.vision_config
    size = sizes(vision)
    patch, time = size("patch_size", default=PATCH), size("temporal_patch_size", default=2)
    pixels = noise(16, size("in_channels", "in_chans", default=3) * time * patch**2)
    ids = with_image(model, 16 // size("spatial_merge_size", default=2) ** 2)
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids >= SPECIAL).long(),
    }


def with_image(model: nn.Module, count: int) -> Tensor:
    """Ids of text with ``count`` placeholders of an image in the middle."""
    config: Any = model.config
    placeholder = getattr(config, "image_token_id", None) or config.image_token_index
    text = token_ids()
    return torch.cat([text[:, :6], torch.full((1, count), placeholder), text[:, 6:]], 1)
