"""How a device's training data moves at an adaptation step: a share of it is replaced.

The paper replaces 50 % of a device's data at each step (its section 6) and doesn't say by what.
Here: under label skew classes leave and others enter; under a Dirichlet division new samples come
with class proportions drawn anew; a person does other things than before; an even device just sees
more of the same. Fresh samples come from the device's pool and are none it holds; over many steps
a sample can return, and two devices can hold it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from simulations.environment.rows import Rows, apportion, fresh, join

Pool = Mapping[int, Rows]


def move_classes(
    held: Rows, labels: Rows, pool: Pool, share: float, rng: np.random.Generator
) -> Rows:
    """Let classes leave and others enter, and refresh the rest, until a share is replaced.

    Parameters
    ----------
    held : Rows
        What the device trains on.
    labels : Rows
        Label of each row of the training data.
    pool : dict[int, Rows]
        Class -> rows that the device may hold.
    share : float
        Of the samples, and of the classes (at least one, where there is another).
    rng : np.random.Generator
        Of this device and step.
    """
    unheld = fresh(pool, held)
    own, counts = np.unique(labels[held], return_counts=True)
    others = np.array([c for c, rows in unheld.items() if len(rows) and c not in own], np.int64)
    moving = min(max(1, round(share * len(own))), len(others)) if share > 0 else 0
    places = rng.choice(len(own), moving, replace=False)
    entering = rng.choice(others, moving, replace=False)
    parts = [
        rng.permutation(unheld[int(new)])[: counts[place]]
        for place, new in zip(places, entering, strict=True)
    ]
    staying = np.delete(np.arange(len(own)), places)
    more = max(0, round(share * len(held)) - int(counts[places].sum()))
    drop = apportion(min(more, int(counts[staying].sum())), counts[staying])
    for place, number in zip(staying, drop, strict=True):
        rows = held[labels[held] == own[place]]
        parts.append(_refreshed(rows, unheld.get(int(own[place]), rows[:0]), int(number), rng))
    return join(parts)


def redraw(
    held: Rows,
    pool: Pool,
    share: float,
    weights: NDArray[np.float64],
    rng: np.random.Generator,
) -> Rows:
    """Replace a share of the samples by fresh ones with the given class weights ``[C]``.

    Where a class has too few, the other fresh samples of the pool fill up; where these are too few
    as well, less is replaced.
    """
    unheld = fresh(pool, held)
    wanted = round(share * len(held))
    drawn = [
        rng.permutation(unheld[c])[:number]
        for c, number in enumerate(apportion(wanted, weights))
        if c in unheld
    ]
    left = np.setdiff1d(join(list(unheld.values())), join(drawn), assume_unique=True)
    missing = wanted - sum(len(rows) for rows in drawn)
    arriving = join([*drawn, rng.permutation(left)[:missing]])
    return join([rng.permutation(held)[len(arriving) :], arriving])


def _refreshed(rows: Rows, unheld: Rows, number: int, rng: np.random.Generator) -> Rows:
    """Replace a number of rows, or fewer where there are not enough others."""
    arriving = rng.permutation(unheld)[:number]
    return np.concatenate([rng.permutation(rows)[len(arriving) :], arriving])
