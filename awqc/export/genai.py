"""``genai_config.json``: what onnxruntime-genai must know to generate with an exported model."""

from __future__ import annotations

from typing import Any

from torch import nn

from awqc.calibration import sequence_limit
from awqc.export.decoder import Interface

#: Name of the file within the directory of a model.
CONFIG_FILE = "genai_config.json"
#: Tokens, where the model's config states no limit.
_UNLIMITED = 4096


def genai_config(model: nn.Module, interface: Interface, filename: str) -> dict[str, Any] | None:
    """The settings of onnxruntime-genai for the model in ``filename``.

    Returns:
        None if its generator could not run the model: one without past keys and values, or whose layers
        keep keys and values of different shapes.
    """
    layers = interface.layers
    if not layers or len(set(layers)) > 1 or layers[0].key != layers[0].value:
        return None
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    generation = getattr(model, "generation_config", None) or config
    length = sequence_limit(config) or _UNLIMITED
    inputs = {name: name for name in interface.inputs if "." not in name}
    parts = ("key", "value")
    special = {
        name: getattr(generation, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    # It generates padded batches, so it asks for a token to pad with.
    if special["pad_token_id"] is None:
        eos = special["eos_token_id"]
        special["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    return {
        "model": {
            "type": "decoder",
            **{name: token for name, token in special.items() if token is not None},
            "context_length": length,
            "vocab_size": text.vocab_size,
            "decoder": {
                "filename": filename,
                "head_size": layers[0].key,
                "hidden_size": text.hidden_size,
                "num_attention_heads": text.num_attention_heads,
                "num_key_value_heads": layers[0].heads,
                "num_hidden_layers": len(layers),
                "inputs": inputs | {f"past_{part}_names": f"past_key_values.%d.{part}" for part in parts},
                "outputs": {"logits": "logits"}
                | {f"present_{part}_names": f"present.%d.{part}" for part in parts},
            },
        },
        "search": {"max_length": length, "do_sample": False, "past_present_share_buffer": False},
    }
