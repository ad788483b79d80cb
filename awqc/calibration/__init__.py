"""Calibration data: anything a user may have, turned into blocks of token ids."""

from awqc.calibration.batches import CalibrationInputs, model_inputs, token_batch, token_inputs
from awqc.calibration.examples import example_inputs
from awqc.calibration.limits import sequence_limit, vocabulary_size
from awqc.calibration.tokens import CalibrationTokens, all_tokens, load_tokens

__all__ = [
    "CalibrationInputs",
    "CalibrationTokens",
    "all_tokens",
    "example_inputs",
    "load_tokens",
    "model_inputs",
    "sequence_limit",
    "token_batch",
    "token_inputs",
    "vocabulary_size",
]
