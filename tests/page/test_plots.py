"""Plots hold what the report holds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from awqc.errors import ConfigError
from awqc.inspection.cost import Cost, Rates
from awqc.kernels.launch import Launch
from awqc.page.plots import bandwidth_by_shape, error_by_layer, loss_over_ratio, write_plots
from awqc.report import Report
from tests.page.reports import RATIOS, synthetic

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


def test_curves_are_those_of_the_groups() -> None:
    report = synthetic(2)
    figure = loss_over_ratio(report)
    assert figure is not None
    assert len(figure.axes) == len(report.groups) + 2  # six groups on two rows of four
    assert [axes.axison for axes in figure.axes] == [True] * 6 + [False] * 2
    axes, group = figure.axes[0], next(iter(report.groups.values()))
    assert axes.get_title(loc="left") == "net.blocks.0.norm"
    curve, chosen, _ = axes.lines
    losses = dict(zip(*(list(values) for values in curve.get_data()), strict=True))
    assert losses == {ratio: loss for family, ratio, loss in group.curve if family == "activation"}
    assert set(losses) == set(RATIOS)
    assert list(chosen.get_xdata()) == [group.ratio]


def test_of_many_groups_some_are_shown() -> None:
    figure = loss_over_ratio(synthetic(40))
    assert figure is not None
    assert len([axes for axes in figure.axes if axes.lines]) == 12


def test_errors_are_means_over_experts() -> None:
    report = synthetic(3, experts=4)
    figure = error_by_layer(report)
    assert figure is not None
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == "moe.experts.*.down"]
    nearest, stored = axes.lines
    rows = [report.linears[f"net.blocks.1.moe.experts.{e}.down.weight"] for e in range(4)]
    assert nearest.get_ydata()[1] == pytest.approx(sum(row.nearest_error or 0 for row in rows) / 4)
    assert stored.get_ydata()[1] == pytest.approx(sum(row.error or 0 for row in rows) / 4)
    assert axes.get_yscale() == "log"


def test_shapes_share_a_bar() -> None:
    """Bytes over seconds of all that are alike, by kernel."""

    def cost(kind: str, n: int, k: int, seconds: float | None) -> Cost:
        launches = [Launch("fast", n * k, 0)]
        return Cost(kind, "op", kind, kind, "", "", "", (n, k), launches, n * k, 0, seconds=seconds)

    costs = [cost("up", 40, 10, 1e-9), cost("gate", 40, 10, 3e-9), cost("down", 10, 40, 1e-9)]
    figure = bandwidth_by_shape([*costs, cost("head", 5, 5, None)], Rates(300e9, None, "made up"))
    assert figure is not None
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([200, 400])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["40 x 10\nup, gate", "10 x 40\ndown"]
    assert bandwidth_by_shape([], None) is None


def test_plots_are_files(tmp_path: Path) -> None:
    written = write_plots(synthetic(2), tmp_path / "plots")
    assert [file.name for file in written] == ["loss_over_ratio.png", "error_by_layer.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written)


def test_nothing_to_plot(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        write_plots(Report(), tmp_path)
    assert str(caught.value) == "there are neither search curves nor errors nor measured linears to plot"


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError) as caught:
        error_by_layer(synthetic(1))
    assert str(caught.value) == "plots need matplotlib: pip install 'awqc[plot]'"
