"""Compensated rounding (GPTQ) and coordinate descent against their formulas, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from awqc.quantization.columns import ColumnGrid
from awqc.quantization.loss import output_loss
from awqc.quantization.rounding import (
    compensated_codes,
    descend,
    feedback,
    in_place,
    visiting_order,
)
from awqc.quantized import Grid, Scheme, minmax_grid

#: More columns than one block of the implementation, and no multiple of it.
WIDTH, ROWS = 150, 12


def problem(
    width: int = WIDTH, rows: int = ROWS, bits: int = 3, seed: int = 0
) -> tuple[Tensor, Grid, Tensor]:
    """A weight, its min-max grid and the Gram matrix of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x = random(4 * width, width // 3) @ random(width // 3, width) + 0.3 * random(4 * width, width)
    weight = random(rows, width)
    return weight, minmax_grid(weight, Scheme(bits, 50)), x.T @ x


def compensated(weight: Tensor, grid: Grid, gram: Tensor, dampening: float = 0.01) -> Tensor:
    order = visiting_order(gram)
    factor = feedback(gram, order, dampening)
    return in_place(compensated_codes(weight, ColumnGrid.of(grid, order), factor, order), order)


def loss(weight: Tensor, grid: Grid, codes: Tensor, gram: Tensor) -> float:
    return float(output_loss(grid.decode(codes) - weight, gram))


def one_column_at_a_time(weight: Tensor, grid: Grid, gram: Tensor, dampening: float) -> Tensor:
    """Optimal brain quantization as its paper states it, without any factorization: after each column the
    remaining ones move by ``-(w_q - quant(w_q)) / [H_F^-1]_qq * [H_F^-1]_:,q``."""
    left, codes = weight.clone(), torch.zeros_like(weight)
    damped = gram + dampening * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    order = visiting_order(gram).tolist()
    for step, q in enumerate(order):
        remaining = torch.tensor(order[step:])
        inverse = torch.linalg.inv(damped[remaining][:, remaining])
        codes[:, q] = grid.encode(left)[:, q]
        error = (left[:, q] - grid.decode(codes)[:, q]) / inverse[0, 0]
        left[:, remaining] -= error[:, None] * inverse[:, 0]
    return codes


def test_it_is_the_update_of_the_paper() -> None:
    weight, grid, gram = problem()
    assert torch.equal(compensated(weight, grid, gram), one_column_at_a_time(weight, grid, gram, 0.01))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_correlated_inputs_make_it_better_than_nearest(bits: int) -> None:
    weight, grid, gram = problem(bits=bits)
    before = loss(weight, grid, grid.encode(weight), gram)
    assert loss(weight, grid, compensated(weight, grid, gram), gram) < 0.7 * before


def test_inputs_without_correlation_leave_nothing_to_compensate() -> None:
    """With a diagonal ``H`` the update is zero, so the codes are the nearest, to the bit."""
    weight, grid, gram = problem()
    codes = compensated(weight, grid, torch.diag(gram.diagonal()))
    assert torch.equal(codes, grid.encode(weight))


def test_codes_stay_within_the_levels() -> None:
    weight, grid, gram = problem(bits=2)
    codes = compensated(weight * 3, grid, gram)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= 0
    assert codes.max() <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_fewer_tokens_than_columns(tokens: int, dtype: torch.dtype) -> None:
    """A singular Gram matrix, zero even: dampening is raised until it can be factorized."""
    weight, grid, _ = problem()
    x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gram = (x.T @ x).to(dtype)
    order = visiting_order(gram)
    factor = feedback(gram, order)
    assert torch.isfinite(factor).all()
    narrow = Grid(grid.scales.to(dtype), grid.zeros.to(dtype), grid.scheme, grid.in_features)
    codes = in_place(compensated_codes(weight.to(dtype), ColumnGrid.of(narrow, order), factor, order), order)
    if tokens:
        gram = x.T @ x
        assert loss(weight, grid, codes.double(), gram) < loss(weight, grid, grid.encode(weight), gram)
    else:
        assert torch.equal(codes, narrow.encode(weight.to(dtype)))


def test_the_feedback_factors_the_damped_gram_matrix() -> None:
    _, _, gram = problem()
    order = visiting_order(gram)
    identity = torch.eye(WIDTH, dtype=gram.dtype)
    unit = feedback(gram, order, dampening=0.02).triu(1) + identity
    damped = gram[order][:, order] + 0.02 * gram.diagonal().mean() * identity
    # D is what is left when both unit triangles are divided out: it must be diagonal and positive.
    left = torch.linalg.solve_triangular(unit, damped, upper=True)
    middle = torch.linalg.solve_triangular(unit, left.T, upper=True)
    off = (middle - torch.diag(middle.diagonal())).abs().max()
    assert off <= WIDTH * torch.finfo(torch.float64).eps * torch.linalg.cond(damped) * middle.abs().max()
    assert (middle.diagonal() > 0).all()


class _Allocations(TorchDispatchMode):
    """Bytes of every tensor that an op makes and that is no view of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.sizes.append(tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize(("tokens", "dampening"), [(2048, 0.01), (200, 1e-9)])
def test_one_matrix_is_all_that_a_factorization_makes(tokens: int, dampening: float) -> None:
    """Of the size of a Gram matrix, also where it has to begin again with more dampening; and its bits are
    those of the plain way, where each step makes another."""
    width = 1100  # more than is copied at once, and no multiple of it
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, width)
    gram = x.T @ x
    order = visiting_order(gram)
    with _Allocations() as made:
        found = feedback(gram, order, dampening)
    assert sum(size >= gram.nbytes / 2 for size in made.sizes) == 1
    damped, added, failed = gram[order.flip(0)][:, order.flip(0)].clone(), 0.0, 0
    mean = damped.diagonal().mean()
    while True:
        damped.diagonal().add_((dampening - added) * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if not info:
            break
        added, dampening, failed = dampening, dampening * 10, failed + 1
    assert (failed > 0) == (tokens < width)
    assert torch.equal(found.triu(1), (lower / lower.diagonal()).flip(0, 1).triu(1))


def test_columns_are_visited_by_decreasing_energy_and_ties_in_order() -> None:
    assert visiting_order(torch.diag(torch.tensor([1.0, 5.0, 1.0, 9.0]))).tolist() == [3, 1, 0, 2]


def test_scaled_columns_are_the_same_problem_in_another_basis() -> None:
    """Rounding ``W diag(s)`` and undoing ``s``, or dividing the grid's columns by ``s``: one result."""
    weight, _, gram = problem()
    scales = torch.exp2(torch.arange(WIDTH, dtype=torch.float64) % 5 - 2)
    grid = minmax_grid(weight * scales, Scheme(3, 50))
    order = visiting_order(gram)
    factor = feedback(gram, order)
    columns = ColumnGrid.of(grid, order, scales.expand_as(weight))
    codes = in_place(compensated_codes(weight, columns, factor, order), order)
    # The direct way, with the factor of the scaled Gram matrix: H -> diag(1/s) H diag(1/s).
    dampened = gram + 0.01 * gram.diagonal().mean() * torch.eye(WIDTH, dtype=gram.dtype)
    moved = dampened / scales / scales[:, None]
    direct = compensated_codes(weight * scales, ColumnGrid.of(grid, order), feedback(moved, order, 0), order)
    assert torch.equal(codes, in_place(direct, order))


@pytest.mark.parametrize("start", ["nearest", "compensated"])
def test_descent_never_increases_the_loss(start: str) -> None:
    weight, grid, gram = problem()
    order = visiting_order(gram)
    columns = ColumnGrid.of(grid, order)
    placed = grid.encode(weight) if start == "nearest" else compensated(weight, grid, gram)
    codes, last = placed.T[order].contiguous(), loss(weight, grid, placed, gram)
    first = last
    for _ in range(4):
        codes = descend(codes, weight, columns, gram, order)
        now = loss(weight, grid, in_place(codes, order), gram)
        assert now <= last * (1 + 1e-12)
        last = now
    assert last < first


def test_one_step_of_descent_is_the_best_code_given_all_others() -> None:
    """Against trying every code of every column in turn."""
    weight, grid, gram = problem(width=9, rows=3, bits=2)
    order = visiting_order(gram)
    expected = grid.encode(weight)
    for column in order.tolist():
        tried = []
        for code in range(4):
            candidate = expected.clone()
            candidate[:, column] = code
            error = grid.decode(candidate) - weight
            tried.append(((error @ gram) * error).sum(-1))
        expected[:, column] = torch.stack(tried).argmin(0).double()
    start = grid.encode(weight).T[order].contiguous()
    found = in_place(descend(start, weight, ColumnGrid.of(grid, order), gram, order), order)
    assert torch.equal(found, expected)


def test_neither_changes_what_it_is_given() -> None:
    weight, grid, gram = problem()
    order = visiting_order(gram)
    given = [weight, gram, grid.scales, grid.zeros]
    copies = [t.clone() for t in given]
    codes = compensated_codes(weight, ColumnGrid.of(grid, order), feedback(gram, order), order)
    before = codes.clone()
    descend(codes, weight, ColumnGrid.of(grid, order), gram, order)
    assert torch.equal(codes, before)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


def test_several_weights_at_once_are_rounded_as_each_alone() -> None:
    """In float64, where sums in another order move no code; more columns than fit one block."""
    generator = torch.Generator().manual_seed(9)
    count, rows, width = 3, 6, 80
    weights = torch.randn(count, rows, width, generator=generator).double()
    x = torch.randn(count, 200, width, generator=generator).double()
    grams = x.mT @ x
    orders = [visiting_order(gram) for gram in grams]
    factors = [feedback(gram, order) for gram, order in zip(grams, orders, strict=True)]
    columns = [
        ColumnGrid.of(minmax_grid(weight, Scheme(3, 16)), order)
        for weight, order in zip(weights, orders, strict=True)
    ]
    before = weights.clone()
    found = compensated_codes(weights, ColumnGrid.stack(columns), torch.stack(factors), torch.stack(orders))
    assert torch.equal(weights, before)
    assert found.shape == (width, count, rows)
    for i in range(count):
        assert torch.equal(found[:, i], compensated_codes(weights[i], columns[i], factors[i], orders[i]))
