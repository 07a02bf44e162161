"""Shares with their intervals and tests, and quantiles. For analyze.py."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest


def by_interval(
    margin: np.ndarray, speed: np.ndarray, method: str, interval: float, highest: float
) -> list[dict[str, Any]]:
    """The negative speeds in each interval of margins up to `highest`, with Wilson's 95 % interval of their share."""
    rows = []
    for index in range(math.ceil(highest / interval - 1e-9)):
        inside = (margin >= index * interval) & (margin < (index + 1) * interval)
        row = {"method": method, "from": index * interval, "to": (index + 1) * interval}
        rows.append(row | proportion(speed[inside] < 0))
    return rows


def proportion(negative: np.ndarray) -> dict[str, Any]:
    """How many of how many, as a share with its 95 % interval; None in the place of a share of nothing."""
    number, total = int(negative.sum()), len(negative)
    low, high = interval_of(number, total)
    known = total > 0
    return {
        "negative": number,
        "total": total,
        "share": number / total if known else None,
        "low": low if known else None,
        "high": high if known else None,
    }


def interval_of(number: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson, 1927); (nan, nan) of nothing."""
    if total == 0:
        return math.nan, math.nan
    interval = binomtest(number, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test (McNemar, 1947): are two shares of the same examples equal?

    only_first, only_second: how many examples have the property in the first case only, and in the second only. If the
    shares are equal, either is as likely for each of these.
    """
    total = only_first + only_second
    return float(binomtest(only_first, total).pvalue) if total else 1.0


def paired(speeds: dict[str, np.ndarray], reference: str) -> dict[str, dict[str, Any]]:
    """Each other method against `reference`: how many examples only one of the two moves nearer, and McNemar's p.

    The p-value is that of these two updates over examples; another run's or another seed's updates are not in it.
    """
    if reference not in speeds:
        return {}
    result, nearer = {}, speeds[reference] < 0
    for method, speed in speeds.items():
        if method != reference:
            counts = int(((speed < 0) & ~nearer).sum()), int((nearer & ~(speed < 0)).sum())
            result[method] = {"only_it": counts[0], f"only_{reference}": counts[1], "p": mcnemar_p(*counts)}
    return result


def robust_shares(exact: np.ndarray, soft: np.ndarray, radii: Sequence[float]) -> list[dict[str, float]]:
    """The share of all examples whose margins exceed each radius."""
    return [{"eps": eps, "exact": float(np.mean(exact > eps)), "soft": float(np.mean(soft > eps))} for eps in radii]


def quantiles(values: np.ndarray) -> dict[str, Any]:
    """Accuracy, and quantiles of the margins of correct examples; a margin that was not found counts as the largest."""
    positive = np.sort(values[values > 0])
    row: dict[str, Any] = {"examples": len(values), "correct": len(positive)}
    for percent in (10, 25, 50, 75, 90):
        value = positive[round(percent / 100 * (len(positive) - 1))] if len(positive) else math.nan
        row[f"q{percent}"] = float(value) if math.isfinite(value) else None
    return row
