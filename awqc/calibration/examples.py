"""Inputs that a model takes, made up from its config: enough to trace it, not to calibrate it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from awqc.calibration.batches import token_batch
from awqc.errors import ConfigError


def example_inputs(module: nn.Module, tokens: int = 16) -> dict[str, Any]:
    """Arguments of ``module``'s forward: ``tokens`` token ids, or one image or piece of sound.

    Raises:
        ConfigError: if the model reads something else.
    """
    ids = torch.arange(tokens)[None] % 2
    main = getattr(module, "main_input_name", "input_ids")
    config = getattr(module, "config", None)
    if main == "input_ids" or config is None:
        return token_batch(ids, module)
    made = _signal(main, config)
    if made is None:
        raise ConfigError(
            f"{type(module).__name__} reads {main!r}, and its config does not say of what shape: use "
            "awqc.analyze(model, inputs) from Python"
        )
    beside = token_batch(ids, module)
    return {main: made, **{name: value for name, value in beside.items() if name.startswith("decoder")}}


def _signal(name: str, config: Any) -> Tensor | None:
    """An image, a spectrogram or a wave."""

    def stated(*names: str) -> int | None:
        found = (getattr(c, n, None) for n in names for c in (config, *_parts(config)))
        return next((f for f in found if isinstance(f, int)), None)

    side, mels = stated("image_size"), stated("num_mel_bins", "feature_size")
    if name == "pixel_values" and side is not None:
        return torch.zeros(1, stated("num_channels") or 3, side, side)
    if name == "input_features" and mels is not None:
        # A spectrogram is halved in time before it gets its positions.
        return torch.zeros(1, mels, 2 * (stated("max_source_positions") or 32))
    return torch.zeros(1, 4000) if name == "input_values" else None


def _parts(config: Any) -> Iterator[Any]:
    """The configs inside of ``config``."""
    return (getattr(config, name) for name in getattr(config, "sub_configs", {}) if hasattr(config, name))
