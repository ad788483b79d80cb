"""Every error a user can meet. Each message says what was found, where, and what to do."""

from __future__ import annotations


class AwqcError(Exception):
    """Base of all errors raised on purpose; the command line prints it without a traceback."""


class ConfigError(AwqcError):
    """An option or argument that cannot be honoured."""


class CaptureError(AwqcError):
    """The model could not be captured as a graph, or the graph disagrees with eager execution."""


class PipelineError(AwqcError):
    """Passes are ordered so that one would run without what it requires."""


class VerifyError(AwqcError):
    """A pass left the graph malformed, or changed a function that it promised to keep."""


class CalibrationError(AwqcError):
    """Calibration data that is missing, unreadable, too long or not finite."""


class NoTokenizerError(CalibrationError):
    """Text without the tokenizer that its model reads it through."""


class NonFiniteError(AwqcError):
    """NaN or Inf in a weight or an activation."""


class CheckpointError(AwqcError):
    """A checkpoint that cannot be read, written, or carried by a format."""


class JournalError(AwqcError):
    """A journal of another compile, a damaged one, or one that cannot be written."""


class RankError(AwqcError):
    """Another process of a job has ended, or does not answer."""


class BackendError(AwqcError):
    """An unknown backend, or a linear that no backend can run."""
