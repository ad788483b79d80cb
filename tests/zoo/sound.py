"""Models of speech and sound."""

from __future__ import annotations

from typing import Any

from tests.zoo.inputs import frames_last
from tests.zoo.sizes import words

_CTC = words("""
    data2vec-audio hubert lasr_ctc parakeet_ctc sew sew-d unispeech unispeech-sat wav2vec2 wav2vec2-bert
    wav2vec2-conformer wavlm
""")
_SEQ2SEQ = words("cohere_asr moonshine pop2piano speech_to_text speecht5 whisper")
_OTHER = words("audio-spectrogram-transformer qwen2_audio_encoder voxtral_encoder")
_FRAMED = words("audio-spectrogram-transformer cohere_asr lasr_ctc parakeet_ctc speech_to_text wav2vec2-bert")

_FRAMES = {"encoder_config": {"subsampling_conv_channels": 16}}
#: Model type -> fields that the sizes of everybody do not suit.
CHANGES: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {
        "patch_size": 4,
        "frequency_stride": 4,
        "time_stride": 4,
        "max_length": 128,
    },
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "parakeet_ctc": _FRAMES,
    "lasr_ctc": _FRAMES,
    "speech_to_text": {"conv_channels": 32, "input_feat_per_channel": 16},
    "speecht5": {
        "speech_decoder_prenet_units": 32,
        "speaker_embedding_dim": 32,
        "speech_decoder_postnet_units": 32,
        "max_speech_positions": 128,
    },
    "wav2vec2-bert": {"feature_projection_input_dim": 16},
}

HEADS = dict.fromkeys(_CTC, "CTC") | dict.fromkeys(_SEQ2SEQ, "SpeechSeq2Seq") | dict.fromkeys(_OTHER, "")
INPUTS = dict.fromkeys(_FRAMED, frames_last)
