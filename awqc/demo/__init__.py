"""A language model and two texts small enough to ship, so that ``awqc demo`` needs no download and no GPU.

Provenance. The model (Llama type, 2.9 million parameters, float16, context 512) was trained from scratch by
``examples/train_demo_model.py`` with its default options on English novels in the public domain, by
R. D. Blackmore, Florence L. Barclay, Arnold Bennett and Mary Elizabeth Braddon; the novels are not included.
The two texts were written for this project in the manner of those novels and are covered by its licence;
neither was trained on, and they are different stories, so calibrating on one and measuring on the other is
honest. The model continues a story for a few sentences; it knows nothing and makes no sense for long.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

_HERE = Path(__file__).parent

MODEL_PATH: Final = _HERE / "model"
"""A Hugging Face checkpoint directory: config, safetensors, tokenizer with a chat template."""

CALIBRATION_TEXT: Final = _HERE / "calibration.txt"
"""A story in UTF-8, about 4500 tokens of the model's tokenizer."""

EVALUATION_TEXT: Final = _HERE / "evaluation.txt"
"""Another story in UTF-8, about 2200 tokens of the model's tokenizer."""
