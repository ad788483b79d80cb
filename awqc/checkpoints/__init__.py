"""Checkpoints on disk: safetensors, the formats of quantized linears, and atomic writing."""

from awqc.checkpoints.artifact import Artifact
from awqc.checkpoints.atomic import atomic_directory, check_output
from awqc.checkpoints.awq import AwqFormat
from awqc.checkpoints.compressed_tensors import CompressedTensors
from awqc.checkpoints.format import (
    CheckpointFormat,
    LinearReader,
    check_format,
    check_input_scales,
    formats,
    get_format,
    register_format,
)
from awqc.checkpoints.read import Checkpoint, open_checkpoint
from awqc.checkpoints.record import SearchRecord, fingerprint, hash_tensor, hash_tokens
from awqc.checkpoints.tensors import TensorFiles
from awqc.checkpoints.write import QuantizedStream, write_checkpoint

__all__ = [
    "Artifact",
    "AwqFormat",
    "Checkpoint",
    "CheckpointFormat",
    "CompressedTensors",
    "LinearReader",
    "QuantizedStream",
    "SearchRecord",
    "TensorFiles",
    "atomic_directory",
    "check_format",
    "check_input_scales",
    "check_output",
    "fingerprint",
    "formats",
    "get_format",
    "hash_tensor",
    "hash_tokens",
    "open_checkpoint",
    "register_format",
    "write_checkpoint",
]
