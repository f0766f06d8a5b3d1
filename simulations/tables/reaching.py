"""What it took to be as good as FedAvg ever was: bytes and simulated seconds, seed by seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from simulations.summary import REFERENCE, first_reaching


@dataclass(frozen=True, kw_only=True)
class Reached:
    """How one strategy reached FedAvg's best accuracy.

    Attributes
    ----------
    spent : float
        Mean over the seeds in which it did; nan if it never did.
    ratio : float
        What FedAvg spent until then over what this strategy spent, geometric mean over the seeds in
        which both spent something; nan where FedAvg was never better than before its first round.
    seeds, reached, at_start : int
        All seeds, those in which it did, and those in which it was so good before its first round.
    """

    spent: float
    ratio: float
    seeds: int
    reached: int
    at_start: int


def reached(course: pd.DataFrame, strategy: str, *, accuracy: str, spent: str) -> Reached:
    """Tell what a strategy spent until it was as accurate as FedAvg at its best.

    Parameters
    ----------
    course : DataFrame
        See `rows.course`; without FedAvg nothing is reached.
    strategy : str
    accuracy : str
        Column of the mean accuracy: "sent" or "adapted".
    spent : str
        Column of what is spent so far: "bytes" or "clock".
    """
    own = course[course["strategy"] == strategy]
    reference = course[course["strategy"] == REFERENCE]
    seeds = sorted(set(own["seed"]) & set(reference["seed"]))
    amounts, ratios, at_start = [], [], 0
    for seed in seeds:
        target = reference.loc[reference["seed"] == seed, accuracy].max()
        mine = first_reaching(own[own["seed"] == seed], accuracy, target)
        if mine is None:
            continue
        amounts.append(float(mine[spent]))
        at_start += int(mine["round"] == 0)
        theirs = first_reaching(reference[reference["seed"] == seed], accuracy, target)
        if theirs is not None and theirs["round"] > 0 and amounts[-1] > 0:
            ratios.append(math.log(theirs[spent] / amounts[-1]))
    return Reached(
        spent=_mean(amounts),
        ratio=math.exp(_mean(ratios)) if ratios else math.nan,
        seeds=len(seeds),
        reached=len(amounts),
        at_start=at_start,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
