"""Two compiles side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from awqc.checkpoints import write_checkpoint
from awqc.comparison import (
    Compiled,
    comparable_weights,
    compare,
    open_compiled,
    weight_difference,
)
from awqc.errors import CheckpointError
from awqc.quantized import Scheme, packed_bytes, quantize
from awqc.report import GroupRow, LinearRow, Report

SHAPE = (32, 64)


def report(bits: int = 4, error: float = 0.01, ratio: float = 0.3) -> Report:
    scheme = str(Scheme(bits, 32))
    rows = [
        LinearRow(
            name, *SHAPE, decision="quantized", scheme=scheme, group="norm", nearest_error=0.02, error=e
        )
        for name, e in (("a", error), ("b", 0.02))
    ]
    return Report(
        config={"bits": bits},
        linears={f"{row.name}.weight": row for row in rows},
        groups={"norm": GroupRow("norm", ["a", "b"], 64, 64, "activation", ratio, applied=True)},
    )


def side(values: Report) -> Compiled:
    return Compiled(Path("x"), values, None)


def checkpoint(folder: Path, bits: int, seed: int = 0, shape: tuple[int, int] = SHAPE) -> Path:
    """One linear ``a`` of random weights, in awqc's own format."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return write_checkpoint(
        folder,
        format="awqc",
        tensors=[],
        quantized={"a": quantize(weight, Scheme(bits, 32))},
        config={"model_type": "x"},
    )


def test_a_compile_and_itself() -> None:
    found = compare(side(report()), side(report()))
    assert (found.linears, found.same, found.options) == ([], 2, {})
    assert found.errors == (0.015, 0.015)


def test_what_differs_is_named_with_both_values() -> None:
    found = compare(side(report()), side(report(bits=3, error=0.03)))
    assert [one.name for one in found.linears] == ["a", "b"]  # the larger change first
    first, second = found.linears
    assert first.fields == ["scheme", "error", "bytes"]
    assert second.fields == ["scheme", "bytes"]
    assert (first.a.error, first.b.error) == (0.01, 0.03)
    assert first.change == pytest.approx(2.0)
    assert (first.a.bytes, first.b.bytes) == tuple(packed_bytes(*SHAPE, Scheme(b, 32)) for b in (4, 3))
    assert found.sizes == (2 * first.a.bytes, 2 * first.b.bytes)
    assert found.options == {"bits": (4, 3)}


def test_another_scale_is_a_difference() -> None:
    found = compare(side(report()), side(report(ratio=0.5)))
    assert [one.fields for one in found.linears] == [["scale"], ["scale"]]
    assert (found.linears[0].a.scale, found.linears[0].b.scale) == ("activation 0.3", "activation 0.5")


def test_a_linear_that_one_side_lacks() -> None:
    other = report()
    del other.linears["b.weight"]
    assert compare(side(report()), side(other)).only_a == ["b"]
    assert compare(side(other), side(report())).only_b == ["b"]


def test_without_an_error_there_is_no_change() -> None:
    rows = report()
    rows.linears["a.weight"].error = None
    (one,) = compare(side(report()), side(rows)).linears
    assert one.change is None
    assert replace(one, a=one.b, b=one.a).change is None


def test_checkpoints_without_reports(tmp_path: Path) -> None:
    a, b = (open_compiled(checkpoint(tmp_path / f"{bits}", bits)) for bits in (4, 3))
    assert comparable_weights(a, b) == ["a"]
    difference = weight_difference(a, b, "a")
    assert a.checkpoint is not None
    assert b.checkpoint is not None
    first, second = a.checkpoint.weight("a").dequantize(), b.checkpoint.weight("a").dequantize()
    assert difference == pytest.approx(float((first - second).norm() / first.norm()))
    (one,) = compare(a, b, {"a": difference}).linears
    assert one.fields == ["bytes", "weights"]
    # Codes and zeros of 4 or 3 bits, packed by 8, scales of 16; and the shape, two integers.
    n, groups = 32, 2
    assert one.a.bytes == n * 64 * 4 // 8 + n * 4 + n * groups * 2 + 16
    assert one.b.bytes == n * 64 * 3 // 8 + n * 3 + n * groups * 2 + 16


def test_weights_of_different_models(tmp_path: Path) -> None:
    a = open_compiled(checkpoint(tmp_path / "a", 4))
    b = open_compiled(checkpoint(tmp_path / "b", 4, shape=(32, 32)))
    with pytest.raises(CheckpointError) as caught:
        weight_difference(a, b, "a")
    assert str(caught.value) == (
        f"linear 'a' is (32, 64) in {tmp_path / 'a'} and (32, 32) in {tmp_path / 'b'}: "
        "these are different models"
    )


def test_what_is_neither_checkpoint_nor_report(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_compiled(tmp_path)
    assert str(caught.value) == f"{tmp_path} holds neither a quantized checkpoint nor awqc_report.json"
