"""What ``awqc eval --json`` has measured, for the page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from awqc.errors import ConfigError


@dataclass(frozen=True)
class Measured:
    """A model on a text.

    Args:
        text: where the text came from.
        tokens: predictions made.
        perplexity: of the compiled model.
        reference: perplexity of the original, None if it was not compared.
        kl: mean ``KL(original || compiled)`` in nats.
        agreement: share of predictions where both rank the same token first.
    """

    text: str
    tokens: int
    perplexity: float
    reference: float | None = None
    kl: float | None = None
    agreement: float | None = None


def read_evaluation(file: Path) -> Measured:
    """Read what ``awqc eval MODEL --text TEXT --against ORIGINAL --json`` printed into ``file``.

    Raises:
        ConfigError: if it is not that.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        reference = found.get("reference")
        return Measured(
            text=str(found["text"]),
            tokens=int(found["perplexity"]["tokens"]),
            perplexity=float(found["perplexity"]["value"]),
            reference=None if reference is None else float(reference["value"]),
            kl=found.get("kl"),
            agreement=found.get("top1_agreement"),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise ConfigError(
            f"{file} is not what 'awqc eval --json' prints ({what}): make it with "
            "'awqc eval MODEL --text TEXT --against ORIGINAL --json > FILE'"
        ) from error
