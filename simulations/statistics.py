"""Comparing two methods: in pairs, device by device of the same seed, with their interval.

Devices of a seed share the cloud model's training, so they are not as good as independent ones: an
interval over devices says how sure the mean over such devices is, and how many seeds agree in sign
says how much of it is a seed's luck.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and how sure it is.

    Attributes
    ----------
    mean : float
        nan without values.
    half_width : float
        Of its 95 % interval (t); infinite for less than two values.
    number : int
        Of values: devices of all seeds.
    seeds, agreeing : int
        How many seeds there are, and how many have a mean of the same sign.
    """

    mean: float
    half_width: float
    number: int
    seeds: int
    agreeing: int


def estimate(values: pd.Series[float]) -> Estimate:
    """Estimate a mean from values whose index has a level "seed"; nan are left out."""
    values = values.dropna()
    number = len(values)
    if number == 0:
        return Estimate(mean=math.nan, half_width=math.nan, number=0, seeds=0, agreeing=0)
    mean = float(values.mean())
    by_seed = values.groupby(level="seed").mean()
    return Estimate(
        mean=mean,
        half_width=half_width(values),
        number=number,
        seeds=len(by_seed),
        agreeing=int((by_seed * mean > 0).sum()),
    )


def half_width(values: pd.Series[float]) -> float:
    """Return the half-width of a mean's 95 % interval (t); infinite for less than two values."""
    number = len(values)
    if number < 2:
        return math.inf
    quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, number - 1))
    return quantile * float(values.std(ddof=1)) / math.sqrt(number)


def of_strategy(ends: pd.DataFrame, strategy: str, column: str) -> pd.Series[float]:
    """Return one column of a strategy's rows, by seed and device."""
    own = ends[ends["strategy"] == strategy]
    return own.set_index(["seed", "device"])[column]


def difference(first: pd.Series[float], second: pd.Series[float]) -> Estimate:
    """Estimate how much the first is above the second, over the devices that both have.

    Parameters
    ----------
    first, second : Series
        By seed and device.
    """
    return estimate((first - second).dropna())


def worst_tenth(values: pd.Series[float]) -> float:
    """Return the mean over seeds of the mean over the worst tenth of devices, at least one.

    Parameters
    ----------
    values : Series
        By seed and device; nan, of devices that are not evaluated, are left out.
    """
    worst = [
        float(own.nsmallest(max(1, len(own) // 10)).mean())
        for _, own in values.dropna().groupby(level="seed")
    ]
    return float(pd.Series(worst).mean()) if worst else math.nan
