"""Shares, their intervals and tests, against recounts and published figures."""

import math

import numpy as np
import pytest

from analysis.statistics import by_interval, interval_of, mcnemar_p, paired, proportion, quantiles


def test_methods_are_paired_example_by_example():
    speeds = {"dyart": [1, 1, -1, -1, 1], "at": [-1, -1, -1, 1, -1], "clean": [1, 1, -1, -1, 1]}
    pairs = paired({name: np.array(values) for name, values in speeds.items()}, "dyart")
    assert pairs == {
        "at": {"only_it": 3, "only_dyart": 1, "p": 0.625},  # 2 (C(4, 0) + C(4, 1)) / 2^4
        "clean": {"only_it": 0, "only_dyart": 0, "p": 1.0},
    }
    assert paired({"at": np.array([1.0])}, "dyart") == {}


def test_intervals_hold_each_example_once():
    margin, speed = np.array([0.0, 0.5, 1.0, 2.9, 3.0]), np.array([-1.0, 1.0, -1.0, -1.0, -1.0])
    rows = by_interval(margin, speed, "at", 1.0, 3.0)
    assert [(row["from"], row["to"], row["negative"], row["total"]) for row in rows] == [
        (0, 1, 1, 2),
        (1, 2, 1, 1),
        (2, 3, 1, 1),
    ]
    assert (rows[0]["low"], rows[0]["high"]) == interval_of(1, 2)
    assert proportion(np.array([]))["share"] is None


def test_quantiles_are_of_correct_examples_and_count_unfound_margins_as_largest():
    row = quantiles(np.array([0.0, 0.0, 1.0, 2.0, 3.0, math.inf, math.inf]))
    assert (row["examples"], row["correct"]) == (7, 5)
    assert (row["q10"], row["q25"], row["q50"], row["q75"], row["q90"]) == (1, 2, 3, None, None)
    assert quantiles(np.zeros(2))["q50"] is None


@pytest.mark.parametrize(("number", "total"), [(0, 10), (3, 10), (10, 10), (41, 1000)])
def test_intervals_of_shares_are_wilsons(number, total):
    """Where the share's distance to p is 1.96 standard deviations of p (Wilson, 1927)."""
    for end in interval_of(number, total):
        deviation = abs(number / total - end)
        assert deviation == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / total), abs=1e-6)
    low, high = interval_of(number, total)
    assert 0 <= low <= number / total <= high <= 1


def test_the_interval_of_nothing_is_not_a_number():
    assert all(math.isnan(end) for end in interval_of(0, 0))


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (3, 3), (1, 9), (9, 1), (0, 30), (120, 80)])
def test_mcnemars_p_is_twice_the_tail_of_fair_coins(only_first, only_second):
    total, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(total, count) for count in range(fewer + 1)) / 2**total
    assert mcnemar_p(only_first, only_second) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
