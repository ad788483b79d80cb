"""A report as PNGs, the loss over the ratio and the error by layer; a measured graph, the bandwidth by shape.

Needs matplotlib (``awqc[plot]``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from awqc.errors import ConfigError
from awqc.page.data import mean
from awqc.page.layers import Layers
from awqc.report import GroupRow, LinearRow, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from awqc.inspection.cost import Cost, Rates

#: Curves in one figure; of more groups, as many evenly spaced ones.
_CURVES = 12
_COLOURS = ("#175e8f", "#bf6038", "#5b6169", "#70281d")


def write_plots(
    report: Report, folder: Path, costs: Sequence[Cost] = (), rates: Rates | None = None
) -> list[Path]:
    """Write every plot that there is data for, as ``NAME.png``.

    Args:
        report: of a compile; an empty one has nothing to plot.
        folder: made if it is not there.
        costs: of the linears of a graph, measured.
        rates: of the device that they were measured on.

    Raises:
        ConfigError: if matplotlib is not installed, or there is nothing to plot.
    """
    figures = {
        "loss_over_ratio": loss_over_ratio(report),
        "error_by_layer": error_by_layer(report),
        "bandwidth_by_shape": bandwidth_by_shape(costs, rates),
    }
    there = {name: figure for name, figure in figures.items() if figure is not None}
    if not there:
        raise ConfigError("there are neither search curves nor errors nor measured linears to plot")
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in there.items():
        figure.savefig(folder / f"{name}.png", dpi=144)
    return [folder / f"{name}.png" for name in there]


def loss_over_ratio(report: Report) -> Figure | None:
    """Search loss of every family over the ratio, relative to no scale, one small plot for each group.

    Of more than a dozen groups, a dozen evenly spaced ones. None if no group was searched.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    searched = [group for group in report.groups.values() if len(group.curve) > 1]
    if not searched:
        return None
    shown = searched[:: -(-len(searched) // _CURVES)]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = _figure(3.1 * columns, 2.3 * rows + 0.4)
    grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
    for axes, group in zip(grid, shown, strict=False):
        _curve(axes, group)
    for axes in grid[len(shown) :]:
        axes.axis("off")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False, fontsize=8)
    figure.suptitle("Search loss over the ratio (1 = no scale)", x=0.01, ha="left", fontsize=10)
    return figure


def _curve(axes: Axes, group: GroupRow) -> None:
    families = [name for name in dict.fromkeys(family for family, _, _ in group.curve) if name != "identity"]
    for family, colour in zip(families, _COLOURS, strict=False):
        points = sorted((ratio, loss) for name, ratio, loss in group.curve if name == family)
        axes.plot(*zip(*points, strict=True), color=colour, marker=".", markersize=4, lw=1.2, label=family)
        chosen = [
            point for point in points if group.applied and (group.family, group.ratio) == (family, point[0])
        ]
        for ratio, loss in chosen:
            axes.plot(ratio, loss, "o", markersize=8, markerfacecolor="none", markeredgecolor="#1f2328")
    axes.axhline(1.0, color="#8b8f94", lw=0.8, ls=":")
    _quiet(axes, group.name.removesuffix(".weight"))


def error_by_layer(report: Report) -> Figure | None:
    """Relative output error over the layers by kind of linear: rounded to nearest, and as stored.

    None if no linear has an error.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    layers = Layers(row.name for row in report.linears.values())
    kinds: dict[str, dict[int, list[LinearRow]]] = {}
    for row in report.quantized():
        place = layers.place(row.name)
        if row.error is not None and place.index >= 0:
            kinds.setdefault(place.kind, {}).setdefault(place.index, []).append(row)
    if not kinds:
        return None
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = _figure(3.1 * columns, 2.3 * rows + 0.4)
    grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes, (kind, by_layer) in zip(grid, kinds.items(), strict=False):
        _errors(axes, kind, by_layer)
    for axes in grid[len(kinds) :]:
        axes.axis("off")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    figure.suptitle("Relative error of outputs by layer", x=0.01, ha="left", fontsize=10)
    return figure


def _errors(axes: Axes, kind: str, by_layer: dict[int, list[LinearRow]]) -> None:
    order = sorted(by_layer)
    nearest = [mean(row.nearest_error for row in by_layer[i]) for i in order]
    stored = [mean(row.error for row in by_layer[i]) for i in order]
    _line(axes, order, nearest, _COLOURS[2], "rounded to nearest")
    _line(axes, order, stored, _COLOURS[1], "as stored")
    axes.set_yscale("log")
    _quiet(axes, kind)


def bandwidth_by_shape(costs: Sequence[Cost], rates: Rates | None) -> Figure | None:
    """Bytes that each shape of linear must move over the time it takes, beside those of a streaming read.

    None if nothing was measured.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    by_shape: dict[tuple[str, str], list[Cost]] = {}
    for cost in costs:
        if cost.seconds and cost.features:
            kernels = " + ".join(dict.fromkeys(launch.kernel for launch in cost.launches))
            by_shape.setdefault(("{} x {}".format(*cost.features), kernels), []).append(cost)
    if not by_shape:
        return None
    order = list(dict.fromkeys(kernel for _, kernel in by_shape))
    figure = _figure(9, 0.42 * len(by_shape) + 1.4)
    axes = figure.subplots()
    for position, ((_, kernel), alike) in enumerate(by_shape.items()):
        rate = sum(cost.bytes for cost in alike) / sum(cost.seconds or 0 for cost in alike) / 1e9
        colour = _COLOURS[order.index(kernel) % len(_COLOURS)]
        axes.barh(position, rate, color=colour, height=0.7, label=kernel)
    names = [
        f"{shape}\n{', '.join(dict.fromkeys(cost.kind for cost in alike))}"
        for (shape, _), alike in by_shape.items()
    ]
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.invert_yaxis()
    if rates is not None:
        axes.axvline(rates.read / 1e9, color="#1f2328", lw=1, ls="--", label="streaming read")
    axes.set_xlabel("GB/s of codes, scales, input and result", fontsize=7)
    handles, labels = axes.get_legend_handles_labels()
    each = dict(zip(labels, handles, strict=True))
    figure.legend(
        each.values(), each.keys(), loc="outside lower center", ncols=len(each), frameon=False, fontsize=7
    )
    _quiet(axes, "Bandwidth by shape")
    axes.tick_params(axis="y", labelsize=6)
    return figure


def _line(axes: Axes, x: Sequence[int], y: Sequence[float | None], colour: str, label: str) -> None:
    points = [(i, value) for i, value in zip(x, y, strict=True) if value]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, marker=".", markersize=4, lw=1.2, label=label)


def _quiet(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=7, loc="left")
    axes.tick_params(labelsize=7, color="#8b8f94")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#8b8f94")


def _figure(width: float, height: float) -> Figure:
    """A figure of its own: no window, no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'awqc[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")
