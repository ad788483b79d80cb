"""Calibration inputs as a model's forward takes them: keyword arguments, all of one shape."""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from awqc.calibration.tokens import CalibrationTokens
from awqc.errors import CalibrationError

#: What rows of tokens come with; everything else makes a mapping an input of a model.
_OF_TOKENS = frozenset({"input_ids", "attention_mask", "labels"})


@dataclass(frozen=True, eq=False)
class CalibrationInputs:
    """Calibration data as the model will see them.

    Args:
        batches: keyword arguments of the forward, each tensor of the same shape in every one of them.
        source: where they come from, readable.
        dropped: tokens, or batches where there are no tokens, that were read and not used.
        notes: what differs from what was asked, and what was left out and why, one line each.
        sha256: fingerprint of all values, the same on every machine.
    """

    batches: list[dict[str, Any]]
    source: str
    dropped: int
    notes: tuple[str, ...]
    sha256: str

    @property
    def samples(self) -> int:
        """Number of batches."""
        return len(self.batches)

    @property
    def seq_len(self) -> int:
        """Positions in the main input of each batch."""
        main = next(_tensors(self.batches[0]))[1]
        return main.shape[1] if main.ndim > 1 else main.shape[0]

    @property
    def tokens(self) -> int:
        """Token ids in all batches; positions of the main input where there are none."""
        ids = [t.numel() for name, t in _tensors(self.batches[0]) if name.endswith("input_ids")]
        return self.samples * (sum(ids) or self.seq_len)


def token_inputs(tokens: CalibrationTokens, module: nn.Module) -> CalibrationInputs:
    """Rows of tokens as inputs of ``module``; a decoder beside an encoder writes what that reads.

    Raises:
        CalibrationError: if the model does not read tokens.
    """
    main = getattr(module, "main_input_name", None)
    if main not in (None, "input_ids"):
        raise CalibrationError(
            f"{type(module).__name__} reads {main!r}, not tokens: give calib as a list of dicts of its "
            "inputs, such as its processor makes"
        )
    notes = list(tokens.notes)
    batches = [token_batch(row[None], module) for row in tokens.ids]
    if len(batches[0]) > 1:
        notes.append("the decoder is given the encoder's tokens, shifted: pass dicts for pairs of your own")
    return CalibrationInputs(batches, tokens.source, tokens.dropped, tuple(notes), tokens.sha256)


def token_batch(ids: Tensor, module: nn.Module) -> dict[str, Any]:
    """Arguments of ``module``'s forward for token ids ``(rows, n)``."""
    config = getattr(module, "config", None)
    parameters = list(_parameters(module))
    name = "input_ids" if "input_ids" in parameters or not parameters else parameters[0]
    batch = {name: ids}
    if "decoder_input_ids" in parameters:
        start = ids.new_full((len(ids), 1), _first_token(config))
        batch["decoder_input_ids"] = torch.cat([start, ids[:, :-1]], dim=1)
    return batch


def model_inputs(calib: Any, samples: int) -> CalibrationInputs | None:
    """``calib`` as inputs of a model, if that is what it is: mappings that hold more than tokens.

    Args:
        calib: one mapping, or a sequence of mappings, of argument names to tensors.
        samples: batches to use at most.

    Returns:
        The batches of the most frequent shape; None for calibration data of any other kind.

    Raises:
        CalibrationError: if a batch holds something that is no tensor and no plain value.
    """
    items = [calib] if isinstance(calib, Mapping) else calib
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        return None
    if not all(isinstance(item, Mapping) for item in items):
        return None
    if not any(_is_input(name, value) for item in items for name, value in item.items()):
        return None
    batches = [
        {name: value for name, value in item.items() if value is not None and name != "labels"}
        for item in items
    ]
    for number, batch in enumerate(batches):
        for name, value in batch.items():
            for leaf in tree_leaves(value):
                if not isinstance(leaf, Tensor | int | float | bool | None):
                    raise CalibrationError(
                        f"{name!r} of calibration batch {number} is of type {type(leaf).__name__}: inputs of "
                        "a model are tensors (a processor makes them with return_tensors='pt')"
                    )
    shapes = Counter(map(_shape, batches))
    common = max(shapes, key=lambda shape: shapes[shape])
    kept = [batch for batch in batches if _shape(batch) == common][:samples]
    notes = []
    if len(shapes) > 1:
        other = len(batches) - shapes[common]
        notes.append(
            f"{other} of {len(batches)} batches have another shape and were left out: pad them to one shape"
        )
    digest = hashlib.sha256()
    for batch in kept:
        for name, tensor in _tensors(batch):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return CalibrationInputs(
        kept,
        f"the {len(items)} batches given as calib",
        len(batches) - len(kept),
        tuple(notes),
        digest.hexdigest(),
    )


def _is_input(name: str, value: Any) -> bool:
    """Whether an argument is more than a row of tokens, or of text, can be: a tensor, or a nest of some."""
    nested = isinstance(value, Mapping | Sequence) and any(isinstance(x, Tensor) for x in tree_leaves(value))
    return nested or (isinstance(value, Tensor) and name not in _OF_TOKENS)


def _shape(batch: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(
        (keystr(path), tuple(v.shape), v.dtype) if isinstance(v, Tensor) else (keystr(path), v)
        for path, v in tree_flatten_with_path(dict(batch))[0]
    )


def _tensors(batch: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    found = tree_flatten_with_path(dict(batch))[0]
    names = ("_".join(keystr((key,)).strip("[]'.") for key in path) for path, _ in found)
    pairs = zip(names, (value for _, value in found), strict=True)
    return ((name, value) for name, value in pairs if isinstance(value, Tensor))


def _parameters(module: nn.Module) -> Iterator[str]:
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            yield name


def _first_token(config: Any) -> int:
    """What a decoder starts with."""
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int):
            return token
    return 0
