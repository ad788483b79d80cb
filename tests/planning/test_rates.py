"""Rates are measured, and turn work into time."""

from dataclasses import asdict, fields, replace
from typing import get_args

import pytest

from awqc.planning import Rates, measure
from awqc.quantized import Scheme
from awqc.work import Unit, Work


@pytest.fixture(scope="module")
def rates() -> Rates:
    return measure(scheme=Scheme(3, 64))


def test_every_unit_has_a_rate(rates: Rates) -> None:
    assert {field.name for field in fields(Rates)} == set(get_args(Unit))
    positive = {name: rate for name, rate in asdict(rates).items() if rate > 0}
    assert set(positive) >= set(get_args(Unit)) - {"columns", "elements"}  # a difference may vanish
    assert rates.columns + rates.elements > 0


def test_time_is_work_by_rate(rates: Rates) -> None:
    none = replace(rates, **dict.fromkeys(asdict(rates), 0.0))
    assert replace(none, flops=2.0, read=3.0).seconds(Work(flops=5, read=7, moved=11)) == 31
    assert rates.seconds(Work()) == 0


def test_a_product_takes_no_less_than_the_fastest_cpu_needs(rates: Rates) -> None:
    assert 1e-14 < rates.flops < 1e-7
    assert 1e-13 < rates.written < 1e-4
