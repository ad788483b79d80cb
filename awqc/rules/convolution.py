"""Convolutions: channel by channel a scale passes, between channels it is undone in the weight."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from awqc.rules import Sample, example, rule
from awqc.scaleflow.op import Op
from awqc.scaleflow.scaled import Scaled, Value
from awqc.views import shape

aten = torch.ops.aten

_X = example(2, 4, 7)
_CHANNELS = torch.arange(4, dtype=torch.int32)[:, None]
_ROWS = torch.arange(6, dtype=torch.int32)[:, None, None]
_DENSE, _GROUPED, _EACH, _TWICE = example(6, 4, 3), example(6, 2, 3), example(4, 1, 3), example(8, 1, 3)
_OPTIONS = ([1], [1], [1])
_IMAGE = example(2, 4, 5, 5)


@rule(
    aten.conv1d.default,
    samples=[
        Sample((_X, _DENSE, example(6)), scale={0: _CHANNELS}, parameters=(1, 2)),
        Sample((_X, _DENSE), scale={0: _CHANNELS}, alive=0),
        Sample(
            (_X, _DENSE, example(6)), scale={0: _CHANNELS, 2: _ROWS[:, 0, 0] + 4}, parameters=(1, 2), alive=4
        ),
        Sample((_X, _DENSE, example(6)), scale={1: _ROWS}, parameters=(1, 2)),
        Sample((_X, _DENSE, example(6)), scale={1: _ROWS}, parameters=(1,), alive=0),
        Sample((_X, _DENSE), scale={1: _CHANNELS}, parameters=(1,), alive=0),
        Sample((_X, _DENSE), scale={0: torch.arange(7, dtype=torch.int32)}, parameters=(1,), alive=0),
        Sample((_X, _GROUPED, None, *_OPTIONS, 2), scale={0: _CHANNELS}, parameters=(1,)),
        Sample((_X, _GROUPED, None, *_OPTIONS, 2), scale={1: _ROWS}, parameters=(1,)),
        Sample((_X, _EACH, example(4), *_OPTIONS, 4), scale={0: _CHANNELS}, parameters=(1, 2)),
        Sample((_X, _EACH, None, *_OPTIONS, 4), scale={0: _CHANNELS}),
        Sample((_X, _EACH, None, *_OPTIONS, 4), scale={0: _CHANNELS, 1: _CHANNELS[:, None] + 4}, alive=4),
        Sample((_X[0], _DENSE), scale={0: _CHANNELS}, parameters=(1,), alive=0),
        Sample((_X, _TWICE, None, *_OPTIONS, 4), scale={0: _CHANNELS}),
    ],
)
@rule(
    aten.conv2d.default,
    samples=[
        Sample((_IMAGE, example(6, 4, 3, 3), example(6)), scale={0: _CHANNELS[..., None]}, parameters=(1,)),
        Sample((_IMAGE, example(6, 4, 1, 1), example(6)), scale={1: _ROWS[..., None]}, parameters=(1, 2)),
    ],
)
@rule(
    aten.conv3d.default,
    samples=[
        Sample(
            (_IMAGE[:, :, None], example(6, 4, 1, 3, 3)),
            scale={0: _CHANNELS[..., None, None]},
            parameters=(1,),
        )
    ],
)
def convolve(op: Op) -> Value:
    """``y[o] = sum_c w[o, c] * x[c] + b[o]``: where each channel is convolved by itself its scale passes, and
    the bias joins; else the weight undoes it. Scaled rows of the weight scale the result."""
    x, weight, bias = op.args[0], op.args[1], op.arg(2, "bias")
    value, rows = op.value(x), op.value(weight)
    if len(shape(x)) != len(shape(weight)):
        op.poison(value, "an image without a batch is not followed")
        op.poison(rows, "an image without a batch is not followed")
        return None
    groups = op.arg(6, "groups", 1)
    if value is not None and not all(value.constant_along(d) for d in range(value.ids.ndim) if d != 1):
        op.poison(value, "its scale differs from place to place")
        value = None
    if rows is not None and not _of_rows(rows) and not (value is not None and _cancels(value, rows, groups)):
        op.poison(rows, "the channels that are summed carry different scales")
        op.poison(value, "the weight that reads it is scaled otherwise")
        return None
    if value is not None and shape(weight)[1] != 1:
        if rows is None:
            _undo(op, value, weight, groups)
        elif not _cancels(value, rows, groups):
            op.poison(value, "the weight that reads it is scaled otherwise")
            op.poison(rows, "its input is scaled otherwise")
        value = rows = None
    elif value is not None and rows is not None:
        op.poison(rows, "its input is scaled already")
        rows = None
    if value is None and rows is None:
        op.poison(op.value(bias), "a bias alone cannot be scaled")
        return None
    if rows is not None:
        ids, degree = _first(rows.ids), rows.degree
    else:
        assert value is not None
        ids, degree = _channels(value).repeat_interleave(shape(weight)[0] // groups), value.degree
    if isinstance(bias, fx.Node) and not op.join(bias, ids, degree):
        op.poison(Scaled(ids), f"the bias {bias} is not scaled along")
        return None
    spread = ids.reshape(-1, *[1] * (len(op.shape) - 2))
    return Scaled(spread.expand(op.shape), degree)


def _of_rows(weight: Scaled) -> bool:
    return all(weight.constant_along(dim) for dim in range(1, weight.ids.ndim))


def _first(ids: Tensor) -> Tensor:
    """``ids`` at the first index of every dimension but the first."""
    while ids.ndim > 1:
        ids = ids[..., 0]
    return ids


def _channels(x: Scaled) -> Tensor:
    """The ids ``(C,)`` of the input's channels."""
    return _first(x.ids[0])


def _columns(x: Scaled, size: tuple[int, ...], groups: int) -> Tensor:
    """Ids of the shape of a weight ``(O, C / groups, ...)`` whose columns undo ``x``."""
    each = _channels(x).reshape(groups, 1, -1).expand(groups, size[0] // groups, -1)
    return each.reshape(size[0], -1, *[1] * (len(size) - 2)).expand(size)


def _cancels(x: Scaled, weight: Scaled, groups: int) -> bool:
    columns = _columns(x, tuple(weight.ids.shape), groups)
    return x.degree == -weight.degree and torch.equal(weight.ids, columns)


def _undo(op: Op, value: Scaled, weight: fx.Node, groups: int) -> None:
    if not op.join(weight, _columns(value, shape(weight), groups), -value.degree):
        reason = "cannot undo the scale: it is no parameter, or is scaled otherwise already"
        op.poison(value, f"{weight} {reason}")
