"""Passes as they are written on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from awqc.cli.passes import edit, make_pass
from awqc.errors import ConfigError, PipelineError
from awqc.passes.clip_weights import ClipWeights
from awqc.passes.round_weights import RoundWeights
from awqc.pipeline import Pipeline

NAMES = ", ".join(Pipeline.default().names())
PASS = """
from dataclasses import dataclass
from typing import ClassVar
import awqc

@dataclass(frozen=True)
class Mine(awqc.Pass):
    name: ClassVar[str] = "mine"
    share: float = 0.5
    which: tuple[str, ...] = ()
    def run(self, graph, context):
        pass

class Other:
    pass
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "torch.py"  # the name of a module that must stay what it is
    path.write_text(PASS)
    return path


def test_a_class_in_a_file(file: Path) -> None:
    import torch

    made = make_pass(f"{file}:Mine", Pipeline.default())
    assert (made.name, made.share, made.which) == ("mine", 0.5, ())
    made = make_pass(f"{file}:Mine(share=0.2, which=('a', 'b:c'))", Pipeline.default())
    assert (made.share, made.which) == (0.2, ("a", "b:c"))
    import sys

    assert sys.modules["torch"] is torch


def test_a_class_in_a_module() -> None:
    assert make_pass("awqc.passes.clip_weights:ClipWeights", Pipeline.default()) == ClipWeights()


def test_a_name() -> None:
    made = make_pass('round-weights(method="nearest")', Pipeline.default())
    assert made == RoundWeights(method="nearest")


def test_a_name_that_an_installed_package_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awqc.cli.passes.third_party_passes", lambda: {"theirs": ClipWeights})
    assert make_pass("theirs", Pipeline.default()) == ClipWeights()


def test_a_pipeline_is_edited_in_place_of_its_passes(file: Path) -> None:
    pipeline = edit(
        Pipeline.default(),
        before=[f"clip-weights={file}:Mine(share=0.1)"],
        after=[f"clip-weights={file}:Mine(share=0.2)"],
        replace=[f"round-weights={file}:Mine(share=0.3)"],
        without=["clip-weights"],
    )
    names = pipeline.names()
    assert "clip-weights" not in names
    assert "round-weights" not in names
    assert [p.share for p in pipeline if p.name == "mine"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("spelled", "message"),
    [
        (
            "prune",
            f"no pass is called 'prune': there are {NAMES}; of one of your own write module:Class or "
            "file.py:Class",
        ),
        ("no.such:Class", "pass no.such:Class: no.such cannot be imported: No module named 'no'"),
        (
            "no/such.py:Class",
            "pass no/such.py:Class: no/such.py cannot be imported: [Errno 2] No such file or directory: "
            f"'{Path.cwd()}/no/such.py'",
        ),
        ("{file}:Their", "pass {file}:Their: {file} has no class Their derived from awqc.Pass"),
        ("{file}:Other", "pass {file}:Other: {file} has no class Other derived from awqc.Pass"),
        (
            "{file}:Mine(size=3)",
            "pass {file}:Mine(size=3): Mine.__init__() got an unexpected keyword argument 'size'",
        ),
        *[
            (
                f"{{file}}:Mine{options}",
                f"pass {{file}}:Mine{options}: write options as Class(name=value, ...), values being "
                "numbers, quoted strings, True, False, None or tuples of these",
            )
            for options in ("(share=", "(0.2)", "(share=open('x'))", "(share=1) + 2")
        ],
    ],
)
def test_what_cannot_be_made(file: Path, spelled: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make_pass(spelled.replace("{file}", str(file)), Pipeline.default())
    assert str(raised.value) == message.replace("{file}", str(file))


@pytest.mark.parametrize("place", ["clip-weights", "clip-weights=", "Mine(share=0.2)"])
def test_a_place_without_a_name_or_a_pass(place: str) -> None:
    with pytest.raises(ConfigError) as raised:
        edit(Pipeline.default(), after=[place])
    example = "clip-weights=examples/keep_sensitive.py:KeepSensitive"
    assert str(raised.value) == f"--after {place}: write NAME=PASS, for example --after {example}"


def test_a_place_that_there_is_not() -> None:
    with pytest.raises(PipelineError) as raised:
        edit(Pipeline.default(), before=["prune=clip-weights"])
    assert str(raised.value) == f"no pass is called 'prune': there are {NAMES}"
