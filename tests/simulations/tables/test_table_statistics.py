"""Pairs, intervals, worst devices, and what it takes to be as good as FedAvg."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from simulations.statistics import difference, of_strategy, worst_tenth
from simulations.tables.reaching import reached


def ends(values: dict[str, dict[tuple[int, int], float]]) -> pd.DataFrame:
    rows = [
        {"strategy": name, "seed": seed, "device": device, "adapted": value}
        for name, own in values.items()
        for (seed, device), value in own.items()
    ]
    return pd.DataFrame(rows)


def series(frame: pd.DataFrame, name: str) -> "pd.Series[float]":
    return of_strategy(frame, name, "adapted")


@given(
    values=st.lists(
        st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=12, unique=True
    )
)
def test_a_difference_is_a_paired_t_interval(values: list):
    keys = [(number % 2, number) for number in range(len(values))]
    frame = ends(
        {
            "a": {key: value[0] for key, value in zip(keys, values, strict=True)},
            "b": {key: value[1] for key, value in zip(keys[::-1], values[::-1], strict=True)},
        }
    )
    found = difference(series(frame, "a"), series(frame, "b"))
    first, second = np.array(values).T
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    if np.std(first - second) > 1e-9:
        assert found.mean - found.half_width == pytest.approx(interval.low, abs=1e-9)
        assert found.mean + found.half_width == pytest.approx(interval.high, abs=1e-9)
    assert (found.number, found.seeds) == (len(values), 2)


def test_only_devices_that_both_have_are_compared_and_seeds_vote():
    frame = ends(
        {
            "a": {(0, 0): 0.9, (0, 1): 0.8, (1, 0): 0.5, (2, 0): 0.7, (3, 9): 0.0},
            "b": {(0, 0): 0.5, (0, 1): 0.6, (1, 0): 0.6, (2, 0): 0.6},
        }
    )
    found = difference(series(frame, "a"), series(frame, "b"))
    assert found.mean == pytest.approx((0.4 + 0.2 - 0.1 + 0.1) / 4)
    assert (found.number, found.seeds, found.agreeing) == (4, 3, 2)


def test_one_value_has_no_interval_and_none_no_mean():
    frame = ends({"a": {(0, 0): 0.9}, "b": {(0, 0): 0.5}, "c": {(0, 5): 0.5}})
    one = difference(series(frame, "a"), series(frame, "b"))
    assert math.isinf(one.half_width)
    none = difference(series(frame, "a"), series(frame, "c"))
    assert none.number == 0
    assert math.isnan(none.mean)


def test_the_worst_tenth_is_of_each_seed():
    frame = ends({"a": {(s, d): s / 2 + d / 100 for s in (0, 1) for d in range(20)}})
    assert worst_tenth(series(frame, "a")) == pytest.approx((0.005 + 0.505) / 2)
    few = ends({"a": {(0, d): d / 10 for d in range(1, 4)}})
    assert worst_tenth(series(few, "a")) == pytest.approx(0.1)
    sampled = ends({"a": {(0, d): d / 10 if d < 9 else math.nan for d in range(1, 31)}})
    assert worst_tenth(series(sampled, "a")) == pytest.approx(0.1)  # of 8 devices, not of 30


def course(**strategies: list[tuple[int, float, float]]) -> pd.DataFrame:
    """Points (round, accuracy, megabytes) of each strategy, of two equal seeds."""
    rows = [
        {"strategy": name, "seed": seed, "round": r, "sent": a, "bytes": b * 1e6, "clock": b}
        for name, points in strategies.items()
        for seed in (0, 1)
        for r, a, b in points
    ]
    return pd.DataFrame(rows)


FEDAVG = [(0, 0.5, 0.0), (1, 0.7, 10.0), (2, 0.8, 20.0), (3, 0.75, 30.0)]


@pytest.mark.parametrize(
    ("own", "spent", "ratio", "how_many", "at_start"),
    [
        ([(0, 0.5, 1.0), (1, 0.9, 5.0), (2, 0.95, 9.0)], 5e6, 4.0, 2, 0),
        ([(0, 0.8, 2.0), (1, 0.7, 5.0)], 2e6, 10.0, 2, 2),
        ([(0, 0.5, 1.0), (1, 0.79, 5.0)], math.nan, math.nan, 0, 0),
    ],
)
def test_bytes_until_fedavg_was_at_its_best(own, spent, ratio, how_many, at_start):
    there = reached(course(fedavg=FEDAVG, eclm=own), "eclm", accuracy="sent", spent="bytes")
    assert there.spent == pytest.approx(spent, nan_ok=True)
    assert there.ratio == pytest.approx(ratio, nan_ok=True)
    assert (there.seeds, there.reached, there.at_start) == (2, how_many, at_start)


def test_nothing_is_said_of_ratios_where_fedavg_was_best_at_the_start():
    falling = [(0, 0.8, 1.0), (1, 0.7, 10.0)]
    there = reached(
        course(fedavg=falling, eclm=[(0, 0.7, 2.0), (1, 0.9, 3.0)]),
        "eclm",
        accuracy="sent",
        spent="bytes",
    )
    assert math.isnan(there.ratio)
    assert there.reached == 2


def test_without_fedavg_nothing_is_reached():
    there = reached(course(eclm=FEDAVG), "eclm", accuracy="sent", spent="bytes")
    assert (there.seeds, there.reached) == (0, 0)
