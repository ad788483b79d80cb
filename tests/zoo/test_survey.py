"""Every model of the zoo is captured, equal to eager execution, and folds without moving its output.

What was found in each is one line of ``tests/golden/zoo.txt``: rung of the capture, linears with a group and
linears seen, share of the parameters of all matrix products that have a group, and what refused the others.
A sample runs every time, all of them with ``-m zoo``.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.golden.compare import FOLDER, check_golden_line
from tests.zoo.catalog import CATALOG
from tests.zoo.plain import MODULES
from tests.zoo.sizes import words
from tests.zoo.survey import survey

GOLDEN = "zoo.txt"
#: Of each kind of architecture one or two, and all modules of plain torch.
SAMPLE = [
    *words("""
        deepseek_v3 falcon_h1 mamba2 mixtral qwen2_moe qwen3_next albert deberta-v2 mbart t5 convnext swin vit
        wav2vec2 whisper clip llava qwen2_vl
    """),
    *MODULES,
]


def check(name: str) -> None:
    row = survey(name)
    assert not row.failure.startswith("CRASH"), row.failure
    if not row.failure:
        assert row.fold < 1e-9
        # A forward that casts to float32 rounds to it in every op, whatever its weights are.
        rounding = 64 * row.nodes**0.5 * torch.finfo(torch.float32).eps
        assert row.eager < rounding or math.isnan(row.eager)
    check_golden_line(GOLDEN, row.summary())


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_is_understood_as_the_golden_file_says(name: str) -> None:
    check(name)


@pytest.mark.zoo
@pytest.mark.parametrize("name", [name for name in CATALOG if name not in SAMPLE])
def test_every_other_model_is_understood_as_the_golden_file_says(name: str) -> None:
    check(name)


def test_the_golden_file_keeps_what_awqc_promises() -> None:
    """97 of 100 captured, of 110 model types and 10 plain modules at least."""
    lines = (FOLDER / GOLDEN).read_text().splitlines()
    names = {line.split()[0] for line in lines}
    assert names == set(CATALOG)
    assert len(names - set(MODULES)) >= 110
    assert len(MODULES) >= 10
    captured = [line for line in lines if " of " in line]
    assert len(captured) >= 0.97 * len(lines)
