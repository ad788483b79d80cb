"""Calibration data: anything a user may have, turned into blocks of token ids."""

from awqc.calibration.limits import sequence_limit, vocabulary_size
from awqc.calibration.tokens import CalibrationTokens, all_tokens, load_tokens

__all__ = ["CalibrationTokens", "all_tokens", "load_tokens", "sequence_limit", "vocabulary_size"]
